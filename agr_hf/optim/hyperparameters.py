"""Ranges of the hyperparameters, checked for every group, with messages that say what to do."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor


def check_group(group: dict[str, Any], optimizer: str, betas_count: int) -> None:
    """Raise a ValueError naming the argument, its value and its range for the first option that is out of range."""

    def refuse(key: str, allowed: str) -> None:
        raise ValueError(f"{optimizer}: {key}={group[key]!r} is not allowed; it must be {allowed}")

    lr = group["lr"]
    if isinstance(lr, Tensor):
        # The value of a tensor on a device is not looked at: reading it would wait for the device.
        if lr.numel() != 1 or (lr.is_cpu and not is_at_least_zero(lr.item())):
            refuse("lr", "a number >= 0, or a tensor with one such element")
    elif not is_at_least_zero(lr):
        refuse("lr", "a number >= 0, or a tensor with one such element")
    betas = group["betas"]
    if (
        not isinstance(betas, (tuple, list))
        or len(betas) != betas_count
        or not all(is_at_least_zero(beta) and beta < 1 for beta in betas)
    ):
        refuse("betas", f"{betas_count} numbers >= 0 and < 1")
    for key in ("eps", "weight_decay", "gamma"):
        if key in group and not is_at_least_zero(group[key]):
            refuse(key, "a number >= 0")
    norm = group["max_grad_norm"]
    if norm is not None and not (is_at_least_zero(norm) and norm > 0):
        refuse("max_grad_norm", "a number > 0, or None for no clipping")
    for key in ("maximize", "capturable", "proximal", "decoupled"):
        if key in group and not isinstance(group[key], bool):
            refuse(key, "True or False")
    for key in ("foreach", "fused"):
        if group[key] is not None and not isinstance(group[key], bool):
            refuse(key, "True, False, or None for the fastest of the device")
    if group["fused"] and (group["foreach"] is not None or group["capturable"]):
        refuse(
            "fused", "None or False together with foreach or capturable: they are different ways to compute the step"
        )
    if "agr_steps" in group:
        _check_agr(group, refuse)


def with_plain_numbers(group: dict[str, Any]) -> None:
    """Make numbers of numpy and their likes Python's: a state_dict must load with `weights_only=True`."""
    for key in ("lr", "eps", "weight_decay", "gamma", "max_grad_norm"):
        if isinstance(group.get(key), Real):
            group[key] = float(group[key])
    group["betas"] = tuple(float(beta) for beta in group["betas"])


def _check_agr(group: dict[str, Any], refuse: Any) -> None:
    flags = group["agr"]
    if not isinstance(flags, bool) and not (
        isinstance(flags, list) and len(flags) == len(group["params"]) and all(isinstance(flag, bool) for flag in flags)
    ):
        refuse("agr", "True, False, or a list with one of them for each parameter of the group")
    steps = group["agr_steps"]
    if steps is not None and not is_count(steps):
        refuse("agr_steps", "a whole number >= 0, or None to apply AGR to the end")
    if steps is not None and group["capturable"]:
        refuse(
            "agr_steps",
            "None together with capturable=True: a CUDA graph repeats what it recorded; set group['agr'] = False and "
            "record again",
        )
    if not is_count(group["min_ndim"]):
        refuse("min_ndim", "a whole number >= 0")
    if group["second_moment"] not in ("raw", "regularized"):
        refuse("second_moment", "'raw' (the paper) or 'regularized' (the authors' code)")


def is_at_least_zero(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) and float(value) >= 0


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
