"""The one table of names: integrations, tests, cards and docs are driven by it."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from agr_hf.errors import UserError, suggest
from agr_hf.optim.acprop import ACProp
from agr_hf.optim.adal import AdaL
from agr_hf.optim.adan import Adan, AGRAdan
from agr_hf.optim.agr_adam import AGRAdam, AGRAdamW
from agr_hf.optim.nosadam import NosAdam
from agr_hf.optim.param_groups import agr_param_groups

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OptimizerInfo:
    """One optimizer by name.

    Attributes:
        name: what users write, as in `--optim agr_adamw`.
        cls: the optimizer class.
        title: how papers and cards write it.
        description: one line.
        source: where the rule is published.
        defaults: arguments that belong to the name (`amsgrad`).
    """

    name: str
    cls: type[torch.optim.Optimizer]
    title: str
    description: str
    source: str
    defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """Whether this package implements it, or torch does."""
        return self.cls.__module__.startswith("agr_hf.")

    @property
    def timm_name(self) -> str:
        """The name in timm, whose factory reads the text behind the last underscore as the whole name."""
        return self.name.replace("_", "")


_AGR = "arXiv 2407.16944"
_ADAM = "arXiv 1412.6980"
OPTIMIZERS: dict[str, OptimizerInfo] = {
    info.name: info
    for info in (
        OptimizerInfo("agr_adamw", AGRAdamW, "AdamW(AGR)", "AdamW with AGR, decoupled decay", f"{_AGR}, algorithm 2"),
        OptimizerInfo("agr_adam", AGRAdam, "Adam(AGR)", "Adam with AGR, L2 decay", f"{_AGR}, algorithm 2"),
        OptimizerInfo("agr_adan", AGRAdan, "Adan(AGR)", "Adan with AGR", f"{_AGR}, algorithm 1"),
        OptimizerInfo("adal", AdaL, "AdaL", "Adam on l1-scaled gradients", "arXiv 2107.01525, algorithm 1"),
        OptimizerInfo("adan", Adan, "Adan", "adaptive Nesterov momentum", "arXiv 2208.06677"),
        OptimizerInfo("acprop", ACProp, "ACProp", "centred second moment, asynchronous update", "Zhuang et al. 2021"),
        OptimizerInfo("nosadam", NosAdam, "NosAdam", "Adam that weighs the past more", "Huang et al. 2019"),
        OptimizerInfo("adam", torch.optim.Adam, "Adam", "torch's Adam", _ADAM),
        OptimizerInfo("adamw", torch.optim.AdamW, "AdamW", "torch's AdamW", "arXiv 1711.05101"),
        OptimizerInfo(
            "amsgrad", torch.optim.Adam, "AMSGrad", "torch's Adam with amsgrad", "Reddi et al. 2018", {"amsgrad": True}
        ),
        OptimizerInfo("rmsprop", torch.optim.RMSprop, "RMSprop", "torch's RMSprop", "Tieleman 2012"),
        OptimizerInfo("sgd", torch.optim.SGD, "SGD", "torch's SGD with momentum 0.9", "torch", {"momentum": 0.9}),
    )
}


def list_optimizers() -> list[str]:
    """Names that `create_optimizer` takes: the package's own first, then torch's for comparison."""
    return list(OPTIMIZERS)


def optimizer_info(name: str) -> OptimizerInfo:
    """The record of an optimizer; a ValueError lists the names for one that is unknown."""
    if name not in OPTIMIZERS:
        raise UserError(
            f"there is no optimizer {name!r}{suggest(name, OPTIMIZERS)}; the names are {', '.join(OPTIMIZERS)}"
        )
    return OPTIMIZERS[name]


def add_optimizer(reference: str) -> OptimizerInfo:
    """Add an optimizer of another package to the table of names, under the text that names it.

    Args:
        reference: `module:Class`, as in "schedulefree:AdamWScheduleFree". The module is imported, so it must be trusted.

    Raises:
        ValueError: there is no such module or class, or the class is no optimizer.
    """
    module, _, name = reference.partition(":")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"there is no optimizer {reference!r}: {error}; write it as MODULE:CLASS") from None
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise UserError(f"{reference!r} is no torch.optim.Optimizer")
    info = OptimizerInfo(reference, cls, name, f"{name} of {module}", module)
    OPTIMIZERS[reference] = info
    return info


def create_optimizer(
    name: str, model_or_params: nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]], **kwargs: Any
) -> torch.optim.Optimizer:
    """Make an optimizer by name.

    Args:
        name: one of `list_optimizers()`.
        model_or_params: a model, whose parameters are then grouped by `agr_param_groups` with the given `weight_decay`
            (the optimizer's default where none is given, 0.01 for "agr_adamw": pass 0 in the place of an Adam without
            decay); or parameters or groups, taken as they are.
        **kwargs: arguments of the optimizer; they win over those that the name stands for.

    Raises:
        ValueError: the name is unknown, or a hyperparameter is out of range.
        TypeError: the optimizer has no such argument.

    Example:
        >>> optimizer = create_optimizer("agr_adamw", model, lr=1e-3, weight_decay=0.05)
    """
    info = optimizer_info(name)
    accepted = inspect.signature(info.cls).parameters
    unknown = [key for key in kwargs if key not in accepted]
    if unknown:
        options = ", ".join(key for key in accepted if key != "params")
        raise TypeError(f"{name} has no option {', '.join(unknown)}; it has {options}")
    arguments = {**info.defaults, **kwargs}
    params: Any = model_or_params
    if isinstance(model_or_params, nn.Module):
        default = accepted["weight_decay"].default
        if default and "weight_decay" not in arguments:
            logger.info("%s decays weights by its default, %g; weight_decay=0 is none", name, default)
        arguments.setdefault("weight_decay", default)
        params = agr_param_groups(model_or_params, weight_decay=arguments["weight_decay"])
        for group in params:
            if "agr" not in accepted:
                del group["agr"]
            elif arguments.get("agr") is False:
                group["agr"] = False
    return info.cls(params, **arguments)
