"""The optimizers; imports torch and nothing else."""

from agr_hf.optim.acprop import ACProp
from agr_hf.optim.adal import AdaL
from agr_hf.optim.adan import Adan, AGRAdan
from agr_hf.optim.agr_adam import AGRAdam, AGRAdamW
from agr_hf.optim.attach import attach_agr
from agr_hf.optim.in_backward import step_in_backward
from agr_hf.optim.norms import l1_norms
from agr_hf.optim.nosadam import NosAdam
from agr_hf.optim.param_groups import agr_param_groups
from agr_hf.optim.psi import agr
from agr_hf.optim.registry import create_optimizer, list_optimizers
from agr_hf.optim.zero import fragment_norms

__all__ = [
    "ACProp",
    "AGRAdam",
    "AGRAdamW",
    "AGRAdan",
    "AdaL",
    "Adan",
    "NosAdam",
    "agr",
    "agr_param_groups",
    "attach_agr",
    "create_optimizer",
    "fragment_norms",
    "l1_norms",
    "list_optimizers",
    "step_in_backward",
]
