"""AGR and AdaL, optimizers for deep networks, at home in the Hugging Face ecosystem."""

from agr_hf.integrations import register
from agr_hf.optim import (
    ACProp,
    AdaL,
    Adan,
    AGRAdam,
    AGRAdamW,
    AGRAdan,
    NosAdam,
    agr,
    agr_param_groups,
    attach_agr,
    create_optimizer,
    fragment_norms,
    l1_norms,
    list_optimizers,
    step_in_backward,
)
from agr_hf.version import __version__

__all__ = [
    "ACProp",
    "AGRAdam",
    "AGRAdamW",
    "AGRAdan",
    "AdaL",
    "Adan",
    "NosAdam",
    "__version__",
    "agr",
    "agr_param_groups",
    "attach_agr",
    "create_optimizer",
    "fragment_norms",
    "l1_norms",
    "list_optimizers",
    "register",
    "step_in_backward",
]
