"""Options of the optimizers, each once: its type, default, range and how it is read from text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Annotated, Any, Literal, TypedDict, get_type_hints

import torch
from torch import Tensor

from agr_hf.errors import UserError


def is_at_least_zero(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) and float(value) >= 0


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _read_flag(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


@dataclass(frozen=True)
class Option:
    """An option of a parameter group.

    Attributes:
        default: its value where none is given.
        allowed: completes "it must be ...".
        accepts: whether a value is allowed.
        read: turns text (of `optim_args`) into a value; KeyError or ValueError where it cannot.
    """

    default: Any
    allowed: str
    accepts: Callable[[Any], bool]
    read: Callable[[str], Any]


def _optional(option: Option) -> Option:
    return Option(
        option.default,
        option.allowed,
        lambda value: value is None or option.accepts(value),
        lambda text: None if text == "None" else option.read(text),
    )


def _flag(default: bool | None, allowed: str = "True or False") -> Option:
    return Option(default, allowed, _is_flag, _read_flag)


_IMPLEMENTATION = "True, False, or None for the fastest of the device"


class StepOptions(TypedDict, total=False):
    """Options that every optimizer of the package has."""

    max_grad_norm: Annotated[
        float | None,
        _optional(
            Option(None, "a number > 0, or None for no clipping", lambda v: is_at_least_zero(v) and v > 0, float)
        ),
    ]
    foreach: Annotated[bool | None, _optional(_flag(None, _IMPLEMENTATION))]
    fused: Annotated[bool | None, _optional(_flag(None, _IMPLEMENTATION))]
    maximize: Annotated[bool, _flag(False)]
    rounding: Annotated[
        Literal["nearest", "stochastic", "kahan"],
        Option(
            "nearest",
            "'nearest', 'stochastic' or 'kahan'",
            lambda v: v in ("nearest", "stochastic", "kahan"),
            str,
        ),
    ]
    rounding_seed: Annotated[int, Option(0, "a whole number >= 0", is_count, int)]
    state_dtype: Annotated[
        Literal["bfloat16"] | torch.dtype | None,
        _optional(Option(None, "bfloat16, or None for float32", lambda v: v in ("bfloat16", torch.bfloat16), str)),
    ]
    capturable: Annotated[bool, _flag(False)]


class AGROptions(StepOptions, total=False):
    """Options of optimizers with AGR."""

    agr: Annotated[
        bool | list[bool],
        Option(
            True,
            "True, False, or a list with one of them for each parameter of the group",
            lambda v: _is_flag(v) or (isinstance(v, list) and all(map(_is_flag, v))),
            _read_flag,
        ),
    ]
    agr_steps: Annotated[
        int | None, _optional(Option(None, "a whole number >= 0, or None to apply AGR to the end", is_count, int))
    ]
    min_ndim: Annotated[int, Option(2, "a whole number >= 0", is_count, int)]
    second_moment: Annotated[
        Literal["raw", "regularized"],
        Option(
            "raw", "'raw' (the paper) or 'regularized' (the authors' code)", ("raw", "regularized").__contains__, str
        ),
    ]


class AdanOptions(StepOptions, total=False):
    """Options of Adan."""

    proximal: Annotated[bool, _flag(True)]


class AGRAdanOptions(AGROptions, AdanOptions, total=False):
    """Options of Adan with AGR."""


class AdaLOptions(StepOptions, total=False):
    """Options of AdaL."""

    decoupled: Annotated[bool, _flag(False)]


class NosAdamOptions(StepOptions, total=False):
    """Options of NosAdam."""

    gamma: Annotated[float, Option(0.1, "a number >= 0", is_at_least_zero, float)]


def read_options(definition: type) -> dict[str, tuple[Any, Option]]:
    """Type and `Option` of each entry of a TypedDict above, in the order of its bases and then its own."""
    hints = get_type_hints(definition, include_extras=True)
    return {name: (hint.__origin__, hint.__metadata__[0]) for name, hint in hints.items()}


def _refuse(group: Mapping[str, Any], optimizer: str, key: str, allowed: str) -> None:
    raise UserError(f"{optimizer}: {key}={group[key]!r} is not allowed; it must be {allowed}")


def check_numbers(group: Mapping[str, Any], optimizer: str, betas_count: int) -> None:
    """Raise a ValueError where a step cannot compute with what was written into a group since it was checked.

    A range is not looked at: a schedule may end a rounding error below 0.
    """
    lr, betas, limit = group["lr"], group["betas"], group["max_grad_norm"]
    # As in nearly every step of everybody, at a tenth of the time that asking for Real takes.
    numbers = (lr, *betas, group["eps"], group["weight_decay"]) if type(betas) is tuple and limit is None else ()
    if len(numbers) == betas_count + 3 and all(type(number) is float for number in numbers):
        return
    if not (lr.numel() == 1 if isinstance(lr, Tensor) else isinstance(lr, Real)):
        _refuse(group, optimizer, "lr", "a number, or a tensor with one element")
    if not (isinstance(betas, (tuple, list)) and len(betas) == betas_count and all(isinstance(b, Real) for b in betas)):
        _refuse(group, optimizer, "betas", f"{betas_count} numbers")
    for key in ("eps", "weight_decay"):
        if not isinstance(group[key], Real):
            _refuse(group, optimizer, key, "a number")
    if limit is not None and not (isinstance(limit, Real) and float(limit) > 0):
        _refuse(group, optimizer, "max_grad_norm", "a number > 0, or None for no clipping")


def check_options(group: Mapping[str, Any], optimizer: str, options: Mapping[str, Option]) -> None:
    """Raise a ValueError that names the first option that is none of what is allowed."""
    for key, option in options.items():
        if not option.accepts(group[key]):
            _refuse(group, optimizer, key, option.allowed)


def check_group(group: Mapping[str, Any], optimizer: str, options: Mapping[str, Option], betas_count: int) -> None:
    """Raise a ValueError that names the argument, its value and its range for the first one that is out of range."""

    def refuse(key: str, allowed: str) -> None:
        _refuse(group, optimizer, key, allowed)

    lr, betas = group["lr"], group["betas"]
    # The value of a tensor on a device is not looked at: reading it would wait for the device.
    is_rate = lr.numel() == 1 and (not lr.is_cpu or is_at_least_zero(lr.item())) if isinstance(lr, Tensor) else None
    if is_rate is False or (is_rate is None and not is_at_least_zero(lr)):
        refuse("lr", "a number >= 0, or a tensor with one such element")
    if (
        not isinstance(betas, (tuple, list))
        or len(betas) != betas_count
        or not all(is_at_least_zero(beta) and beta < 1 for beta in betas)
    ):
        refuse("betas", f"{betas_count} numbers >= 0 and < 1")
    for key in ("eps", "weight_decay"):
        if not is_at_least_zero(group[key]):
            refuse(key, "a number >= 0")
    check_options(group, optimizer, options)
    if isinstance(group.get("agr"), list) and len(group["agr"]) != len(group["params"]):
        refuse(
            "agr",
            f"a list with one entry for each of the {len(group['params'])} parameters of the group; where something shares "
            "out a group's parameters (ZeroRedundancyOptimizer does), give it groups with one answer each: "
            "agr_param_groups(model)",
        )
    if group["fused"] and group["foreach"] is not None:
        refuse("fused", "None or False together with foreach: they compute the step in different ways")


def use_plain_numbers(group: dict[str, Any]) -> None:
    """Make numbers of numpy and the like Python's: a state_dict must load with `weights_only=True`."""
    for key, value in group.items():
        if isinstance(value, Real) and not isinstance(value, (bool, int)):
            group[key] = float(value)
    if group["state_dtype"] is not None:
        group["state_dtype"] = "bfloat16"  # text, for files that know no dtypes
    group["lr"] = group["lr"] if isinstance(group["lr"], Tensor) else float(group["lr"])
    group["betas"] = tuple(float(beta) for beta in group["betas"])
