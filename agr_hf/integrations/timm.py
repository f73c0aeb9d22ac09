"""timm: the optimizers by name, with AGR by layer type where timm is given the model."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch

from agr_hf.integrations import private
from agr_hf.optim.param_groups import set_agr_flags
from agr_hf.optim.registry import OPTIMIZERS


def register() -> None:
    """Add the package's names to timm; see `agr_hf.register`."""
    from timm.optim import OptimInfo

    registry = private.timm_registry()
    for info in OPTIMIZERS.values():
        if not info.ours or _knows(registry, info.timm_name):
            continue
        betas = inspect.signature(info.cls).parameters["betas"].default
        registry.register(
            OptimInfo(
                name=info.timm_name,
                opt_class=info.cls,
                description=f"{info.description} ({info.source})",
                has_betas=True,
                num_betas=len(betas),
            )
        )
    if not getattr(registry.create_optimizer, "sets_agr_flags", False):
        registry.create_optimizer = _with_agr_flags(registry.create_optimizer)


def _knows(registry: Any, name: str) -> bool:
    # timm has an Adan of its own under the name; that one stays what it is.
    try:
        registry.get_optimizer_info(name)
    except ValueError:
        return False
    return True


def _with_agr_flags(create: Any) -> Any:
    """timm makes the groups and shows an optimizer class only these: which layers they are of is set afterwards."""

    def create_optimizer(model_or_params: Any, opt: str, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = create(model_or_params, _timm_name(opt), *args, **kwargs)
        if isinstance(model_or_params, torch.nn.Module) and optimizer.defaults.get("agr"):
            set_agr_flags(optimizer.param_groups, model_or_params)
        return optimizer

    create_optimizer.sets_agr_flags = True  # type: ignore[attr-defined]
    return create_optimizer


def _timm_name(opt: str) -> str:
    """timm takes what is before an underscore for a wrapper such as lookahead, and "agr_adamw" for "adamw"."""
    for info in OPTIMIZERS.values():
        if info.ours and "_" in info.name and re.search(rf"(^|_){info.name}$", opt.lower()):
            return opt[: -len(info.name)] + info.timm_name
    return opt
