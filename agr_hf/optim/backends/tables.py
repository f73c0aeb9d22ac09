"""What the compiled backends share: a table of the addresses of a step's tensors, and flags of what is applied to each."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from agr_hf.optim.backends.look import TYPES, describe, look
from agr_hf.optim.layout import Layout
from agr_hf.optim.part import Part, Present, Row
from agr_hf.optim.shards import local

if TYPE_CHECKING:
    from agr_hf.optim.step import StepOptimizer

DTYPES = (torch.float32, torch.bfloat16)
# Flags of a tensor; the same in native.c.
PSI, SECOND_REGULARIZED, COUPLED, SCALED_BY_NORM = 1, 2, 4, 8
PARAM_BF16, GRAD_BF16, MOMENT_BF16, AT_RANDOM = 16, 32, 64, 128
GROUP_NUMBERS = 10  # that a kernel reads of a group on a device


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


def can_serve(optimizer: StepOptimizer, row: Row, present: Present, is_here: Callable[[Tensor], bool]) -> bool:
    """Whether a compiled backend computes a row: by its rule, the options of its group, and what its tensors are."""
    group = row.group
    if optimizer.native_rule is None or group["foreach"] is not None or group["fused"] is False:
        return False
    param, grad = present.locals[row.index], present.local_grads[row.index]
    tensors = [param] if grad is None else [param, grad]
    return (
        all(is_here(tensor) and tensor.device == param.device and is_plain(tensor) for tensor in tensors)
        and Layout(param).view(param) is not None
    )


class TablePart(Part):
    """Rows of a compiled backend, which reads the addresses of their tensors from one table.

    Attributes:
        keys: of the state tensors, the same for all rows (see `Plan`).
        addresses: of this step; a column each of parameters, gradients and state tensors, with an entry for each row.
        numels, flags, slots: of the rows; the slot is the place of their group in `groups`.
        copied: rows whose gradient has another memory order than their parameter, and is copied into it in each step.
    """

    def __init__(self, optimizer: StepOptimizer, rows: list[Row], present: Present, new: Collection[int]) -> None:
        super().__init__(optimizer, rows, present, new)
        params = [present.locals[i] for i in self.indices]
        grads = [present.local_grads[i] for i in self.indices]
        self.keys = tuple(optimizer.tensor_state(params[0], rows[0].group))
        self.is_whole = len(rows) == len(present.params)
        self.has_shards = any(type(present.params[i]) not in TYPES for i in self.indices)
        layouts = [Layout(param) for param in params]
        for row, param, layout, state in zip(rows, params, layouts, self.states, strict=True):
            optimizer.lay_state(param, row.group, layout, state)
        self.copied = {
            k: layout
            for k, (layout, grad) in enumerate(zip(layouts, grads, strict=True))
            if grad is not None and layout.view(grad) is None
        }
        self.numels = [param.numel() for param in params]
        self.flags = flags_of_rows(optimizer, rows, params, [found[0] for found in self.grad_looks], self.at_random)
        self.groups = {row.group_index: row.group for row in rows}
        slots = {number: slot for slot, number in enumerate(self.groups)}
        self.slots = [slots[row.group_index] for row in rows]
        self.views = [
            (column.key, column.views, column.vector.data_ptr(), column.vector.element_size())
            for column in self.columns
        ]
        # A gradient that is not here looks like its parameter.
        kinds = [param if grad is None else grad for param, grad in zip(params, grads, strict=True)]
        columns = [[local(state[key]) for state in self.states] for key in self.keys]
        table = [tensor for row in zip(params, kinds, *columns, strict=True) for tensor in row]
        self.kept = describe(table)
        self.addresses = array("q", bytes(8 * len(rows) * (2 + len(self.keys))))
        self.params: list[Tensor] = []  # until the step is done, as `held`
        self.held: list[Any] = []

    def look(self, present: Present) -> bool:
        params: list[Any] = present.locals
        grads: list[Any] = present.local_grads
        if not self.is_whole:
            params, grads = [params[i] for i in self.indices], [grads[i] for i in self.indices]
        states = self.states
        if self.has_shards:
            states = [{key: local(value) for key, value in state.items()} for state in states]
        count = look(params, grads, states, self.keys, self.views, self.kept, self.addresses)
        if count < 0:
            return False
        self.set_live([True] * count if count == len(grads) else [grad is not None for grad in grads])
        self.params, self.held = params, grads
        if self.copied:
            # Not all are in the memory of a `.grad`: a DTensor's that is laid otherwise than its parameter was laid anew.
            self.held = [
                layout.flat(grad) if grad is not None and (layout := self.copied.get(k)) else grad
                for k, grad in enumerate(grads)
            ]
            for k in self.copied:
                self.addresses[len(grads) + k] = 0 if grads[k] is None else self.held[k].data_ptr() or 1
        return True

    def count_change(self) -> None:
        """As after every operation in place, a backward through a graph that holds the old weights raises."""
        torch.autograd.graph.increment_version(
            self.params if all(self.live) else list(compress(self.params, self.live))
        )

    def let_go(self) -> None:
        """End the step."""
        self.params, self.held = [], []
