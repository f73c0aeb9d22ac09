"""What the compiled backends read of a step's tensors: addresses, and flags of what is applied to each."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from agr_hf.optim.backends.look import TYPES
from agr_hf.optim.layout import Layout
from agr_hf.optim.shards import local

if TYPE_CHECKING:
    from agr_hf.optim.part import Row
    from agr_hf.optim.step import StepOptimizer

DTYPES = (torch.float32, torch.bfloat16)
# Flags of a tensor; the same in native.c and triton_kernels.py.
PSI, SECOND_REGULARIZED, COUPLED, SCALED_BY_NORM = 1, 2, 4, 8
PARAM_BF16, GRAD_BF16, MOMENT_BF16, AT_RANDOM = 16, 32, 64, 128


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's memory holds its elements: not so where torch negates it, or takes it for zero, as it reads."""
    return type(tensor) in TYPES and tensor.dtype in DTYPES and not tensor.is_neg() and not torch._is_zerotensor(tensor)


def flags_of_rows(
    optimizer: StepOptimizer,
    rows: Sequence[Row],
    params: Sequence[Tensor],
    grad_dtypes: Sequence[torch.dtype],
    at_random: Sequence[bool],
) -> list[int]:
    return [
        PSI * row.psi
        | SECOND_REGULARIZED * (row.group.get("second_moment") == "regularized")
        | COUPLED * row.adds_decay
        | SCALED_BY_NORM * optimizer.uses_norms
        | PARAM_BF16 * (param.dtype == torch.bfloat16)
        | GRAD_BF16 * (grad_dtype == torch.bfloat16)
        | MOMENT_BF16 * (row.group["state_dtype"] is not None)
        | AT_RANDOM * draws
        for row, param, grad_dtype, draws in zip(rows, params, grad_dtypes, at_random, strict=True)
    ]


def kinds_of_rows(
    params: Sequence[Tensor], grads: Sequence[Any], states: Sequence[dict[str, Any]], keys: Sequence[str]
) -> list[Tensor]:
    """Param, gradient and state of each row, for `describe`; a gradient that is not here looks like its parameter."""
    kinds = [param if grad is None else grad for param, grad in zip(params, grads, strict=True)]
    columns = [[local(state[key]) for state in states] for key in keys]
    return [tensor for row in zip(params, kinds, *columns, strict=True) for tensor in row]


def laid_otherwise(layouts: Sequence[Layout], grads: Sequence[Any]) -> dict[int, Layout]:
    """Rows whose gradient has another memory order than their parameter: it is copied into this order in each step."""
    return {
        k: layout
        for k, (layout, grad) in enumerate(zip(layouts, grads, strict=True))
        if grad is not None and layout.view(grad) is None
    }


def lay_gradients(grads: list[Any], copied: dict[int, Layout], addresses: array[int]) -> list[Any]:
    """The gradients to be held until the step is done, some as copies, whose addresses are put in the place of theirs."""
    if not copied:
        return grads
    # Not all are in the memory of a `.grad`: a DTensor's that is laid otherwise than its parameter was laid anew.
    held = [
        layout.flat(grad) if grad is not None and (layout := copied.get(k)) else grad for k, grad in enumerate(grads)
    ]
    for k in copied:
        addresses[len(grads) + k] = 0 if grads[k] is None else held[k].data_ptr() or 1
    return held
