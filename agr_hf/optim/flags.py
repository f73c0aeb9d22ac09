"""A group's `agr`: one answer for all of its parameters, or one for each; and the optimizer that has the groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def agr_flags(group: Mapping[str, Any]) -> list[bool]:
    """Whether AGR is wanted for each parameter of a group; a group that does not say wants it for all."""
    flags = group.get("agr", True)
    if not isinstance(flags, list):
        return [bool(flags)] * len(group["params"])
    if len(flags) != len(group["params"]):
        raise ValueError(
            f"a group has {len(group['params'])} parameters and an `agr` for {len(flags)}; where parameters are added to a "
            "group or taken out of it, do the same to its list, or make groups with one answer each: agr_param_groups(model)"
        )
    return list(flags)


def is_suspended(group: Mapping[str, Any]) -> bool:
    """Whether AGR is not applied in a group for now, whatever its `agr` says: `SuspendAGR` turns it on again with the key
    `agr_suspended`, on the layers that it was on."""
    return bool(group.get("agr_suspended"))


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper, or the optimizer itself."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if isinstance(inner, torch.optim.Optimizer) else optimizer
