"""Tensors of a step, what is applied to them, and the part of them that one backend computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, Any
from weakref import proxy

import torch
from torch import Tensor

from agr_hf.optim.backends.look import read_grads, read_look
from agr_hf.optim.rounding import RandomBits
from agr_hf.optim.shards import Scalar, as_number, is_dtensor, local, reduced, widest

if TYPE_CHECKING:
    from agr_hf.optim.step import StepOptimizer


class Present:
    """The tensors of one step, in the order of the groups: parameters, gradients (None where there is none), and what this
    rank holds of both."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self.params: list[Tensor] = []
        for group in groups:
            self.params += group["params"]
        self.grads: list[Tensor | None]
        self.grads, plain = read_grads(self.params)
        self.locals, self.local_grads = self.params, self.grads
        if not plain:
            self.grads = [
                None if grad is None else reduced(grad, param)
                for param, grad in zip(self.params, self.grads, strict=True)
            ]
            self.locals = [local(param) for param in self.params]
            self.local_grads = [None if grad is None else local(grad) for grad in self.grads]

    @property
    def is_idle(self) -> bool:
        """Whether no tensor has a gradient, and each is whole."""
        return all(grad is None for grad in self.grads) and not any(map(is_dtensor, self.params))


@dataclass(frozen=True)
class Row:
    """What is applied to one parameter.

    Attributes:
        index: place among all parameters of the groups.
        group, group_index: its group.
        psi: AGR applies in this and the following steps.
        needs_norm: the rule needs its l1 norm.
        adds_decay: weight decay is part of the gradient (L2).
        on_host: the host may look at its numbers without waiting for a device.
    """

    index: int
    group: dict[str, Any]
    group_index: int
    psi: bool
    needs_norm: bool
    adds_decay: bool
    on_host: bool


class Column:
    """One number of each row (its steps, say) in one vector, of which each state holds its element as a 0-dim view.

    One addition then counts a thousand tensors. Numbers that were loaded or replaced since are taken over by a new column.
    """

    def __init__(self, key: str, states: Sequence[dict[str, Any]], dtype: torch.dtype, device: torch.device) -> None:
        self.key, self.states = key, states
        self.vector = torch.stack([as_number(state[key], dtype, device) for state in states])
        self.views = list(self.vector.unbind())
        self.addresses = list(map(Tensor.data_ptr, self.views))
        for state, view in zip(states, self.views, strict=True):
            state[key] = view

    def fits(self) -> bool:
        """Whether every state still holds its element of the vector, in the memory of the vector."""
        key = self.key
        found = [state.get(key) for state in self.states]
        return all(map(is_, found, self.views)) and list(map(Tensor.data_ptr, self.views)) == self.addresses


@dataclass
class Sums:
    """Of each parameter in the order of the groups, over all ranks: the l1 norm and the sum of squares of its gradient, 0
    where there is none or nobody asks. The norm is of the raw gradient, or where the gradient includes weight decay of the
    effective one, after clipping."""

    norms: list[Scalar]
    squares: list[Scalar]


class Part(ABC):
    """Rows of a plan that one backend computes. A backend is a subclass that states these three:

    - `look(present)`: take the tensors of this step; False where they, or the numbers of the rows (`columns`), are not those
      that the part was made for.
    - `add_sums(sums, scales, squares, coupled_only)`: write this rank's norms into `sums.norms` for the rows that need them,
      and where `squares` is set also sums of squares, of every row. Norms of gradients that include weight decay depend on
      the scale: with `squares`, which are taken before the scale is known, they are left out, and `coupled_only` asks for
      them alone.
    - `update(sums, scales)`: change parameters and state. Where `sums` is None (no clipping, no shards) the backend takes
      the norms itself.

    `new` names the rows whose state is of this step. `scales` has, for each group, what its gradients are multiplied by: -1
    to maximize, times the clipping factor.
    """

    def __init__(self, optimizer: StepOptimizer, rows: list[Row], present: Present, new: Collection[int]) -> None:
        # A proxy: a cycle would keep the state alive after its optimizer.
        self.optimizer: StepOptimizer = proxy(optimizer)
        self.rows = rows
        self.indices = [row.index for row in rows]
        self.states = [optimizer.state[present.params[i]] for i in self.indices]
        # What parameters and gradients look like; where there is no gradient yet, like its parameter.
        params = [present.locals[i] for i in self.indices]
        grads = [present.local_grads[i] for i in self.indices]
        self.param_looks = list(map(read_look, params))
        self.grad_looks = [read_look(p if g is None else g) for p, g in zip(params, grads, strict=True)]
        self.live: list[bool] = []  # which rows have a gradient in this step
        # Of each row in this step, where it was needed, and what gradients were multiplied by: see `Sums` and `update`.
        self.norms: Any = []
        self.scales: Sequence[Scalar] = []
        device = self.device = present.locals[self.indices[0]].device
        counted_on = device if rows[0].group["capturable"] else torch.device("cpu")
        self.steps = Column("step", self.states, torch.float32, counted_on)
        # A recorded step cannot ask whether it is the first of a tensor: that is read here, of state that was loaded.
        is_new = [i in new for i in self.indices]
        self.first = is_new if all(is_new) else [not step for step in self.steps.vector.tolist()]
        self.scalars = {
            key: Column(key, self.states, self.number_dtype(device), device) for key in optimizer.scalar_state
        }
        self.columns = [self.steps, *self.scalars.values()]
        # Which rows round at random, and what they draw.
        self.at_random = [
            row.group["rounding"] == "stochastic"
            and torch.bfloat16 in (param.dtype, *optimizer.tensor_state(param, row.group).values())
            for row, param in zip(rows, params, strict=True)
        ]
        self.random_bits = None
        if any(self.at_random):
            self.random_bits = RandomBits(
                rows, [present.params[i] for i in self.indices], counted_on, optimizer.first_index
            )

    def number_dtype(self, device: torch.device) -> torch.dtype:
        """Of the rule's numbers of each row."""
        return widest(device)

    @abstractmethod
    def look(self, present: Present) -> bool: ...

    @abstractmethod
    def add_sums(self, sums: Sums, scales: Sequence[Scalar], squares: bool, coupled_only: bool) -> None: ...

    @abstractmethod
    def update(self, sums: Sums | None, scales: Sequence[Scalar]) -> None: ...

    def set_live(self, live: list[bool]) -> None:
        if live != self.live:
            self.live = live
            vector = self.steps.vector
            self._increment = (
                None if all(live) else torch.tensor(live, dtype=vector.dtype, device="cpu").to(vector.device)
            )

    def count(self, skipped: bool | Tensor) -> None:
        """Count this step of the rows that have a gradient; a tensor says on the device whether it is `skipped`."""
        self.skipped = skipped
        increment = 1.0 if self._increment is None else self._increment
        if isinstance(skipped, Tensor):
            increment = increment * skipped.logical_not().to(self.steps.vector)
        self.steps.vector.add_(increment)
