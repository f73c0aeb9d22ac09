"""The backend of every device: a rule over lists of tensors, in batches.

A rule is written once, as `StepOptimizer.update(batch)`, in the operations of `multi_tensor`. It sees aligned flat tensors
in float32 or float64; memory formats, low precision, blocks and clipping are done here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from agr_hf.optim.backends import multi_tensor as mt
from agr_hf.optim.backends.look import read_look
from agr_hf.optim.layout import Layout
from agr_hf.optim.norms import BLOCK, by_device_and_dtype, sum_on_cpu, sums_of_pieces
from agr_hf.optim.part import Part, Present, Row, Sums
from agr_hf.optim.rounding import COMPENSATION, draw, round_at_random
from agr_hf.optim.shards import Scalar, local, widest

# Elements updated at a time on other devices than the CPU: a few pieces of scratch of 16 MiB (float32).
DEVICE_BLOCK = 4_194_304
# A parameter's flat tensors: "param", "grad" and its state keys.
Flats = dict[str, Tensor]


class Item:
    """One parameter in one step, everything local to this rank."""

    def __init__(self, row: Row, param: Tensor, grad: Tensor, state: dict[str, Tensor], layout: Layout) -> None:
        self.row, self.group = row, row.group
        self.param, self.grad, self.state, self.layout = param, grad, state, layout
        self.target: Tensor | None = None
        if layout.view(param) is None:
            # A view with holes (a slice of a larger tensor) is updated in a dense copy and written back.
            self.target, self.param = param, layout.relaid(param)
        self.step: Scalar = 0.0  # steps made, this one included
        self.scalars: dict[str, Tensor] = {}  # the rule's numbers
        self.is_first = False  # of this tensor's steps
        self.psi = row.psi
        self.first_random: int | Tensor | None = None  # number of its first element, where it is rounded at random
        self.norm: Scalar = 0.0  # of the whole effective gradient, where it is needed

    @property
    def dtype(self) -> torch.dtype:
        """What the update is computed in."""
        return torch.promote_types(self.param.dtype, torch.float32)


class Kept:
    """A piece of a parameter or of its state in few bits, that is computed in many, and rounded after the update."""

    def __init__(self, item: Item, key: str, flats: Flats, start: int, dtype: torch.dtype) -> None:
        self.target, self.wide = flats[key], flats[key].to(dtype)
        self.rest = flats.get(COMPENSATION) if key == "param" else None
        if self.rest is not None:
            self.wide += self.rest
        self.first, self.shift = item.first_random, 0 if key == "param" else 16  # the other half of the same bits
        self.start = start

    def write(self) -> None:
        if self.first is None or self.target.dtype != torch.bfloat16:
            self.target.copy_(self.wide)
        else:
            bits = draw(self.first + self.start, self.wide.numel(), self.wide.device)
            self.target.copy_(round_at_random(self.wide, (bits >> self.shift) & 0xFFFF))
        if self.rest is not None:
            self.rest.copy_(self.wide.sub_(self.target))


class Batch:
    """Pieces of tensors of one group that are updated together.

    Every list has one entry for each piece. Tensors are 1-D, float32 or float64, on one device, and aligned: element i of a
    parameter, its gradient and its state belong together. `grads` may be `.grad` itself and must not be written.
    """

    def __init__(
        self, params: list[Tensor], grads: list[Tensor], state: dict[str, list[Tensor]], items: list[Item]
    ) -> None:
        self.params = params
        self.grads = grads
        self.state = state
        self.items = items
        self.group = items[0].group
        self.psi = items[0].psi
        self.needs_norm = items[0].row.needs_norm
        self.is_first = items[0].is_first
        self.on_host = items[0].row.on_host

    @property
    def steps(self) -> list[Scalar]:
        """How many steps each tensor has made, this one included."""
        return [item.step for item in self.items]

    @property
    def norms(self) -> list[Scalar]:
        """l1 norm of each whole gradient: numbers where the host knows them, else 0-dim tensors."""
        return [item.norm for item in self.items]

    def read_scalars(self, key: str) -> list[Scalar]:
        """An entry of the rule's `scalar_state` for each tensor, as the step before left it."""
        return [item.scalars[key].item() if self.on_host else item.scalars[key] for item in self.items]

    @property
    def lr(self) -> Scalar:
        lr = self.group["lr"]
        if isinstance(lr, Tensor):
            if lr.is_cpu and not self.group["capturable"]:
                return lr.item()
            device = self.params[0].device
            return lr.reshape(()).to(device, widest(device))  # 1 - lr * weight_decay needs the digits
        return float(lr)


class ListsPart(Part):
    """Rows computed by operations over lists."""

    def __init__(self, optimizer: Any, rows: list[Row], present: Present, new: Collection[int]) -> None:
        super().__init__(optimizer, rows, present, new)
        self.items: list[Item] = []

    def look(self, present: Present) -> bool:
        self.items = []
        if not all(column.fits() for column in self.columns):
            return False
        live = [present.grads[i] is not None for i in self.indices]
        self.set_live(live)
        for k, (row, state) in enumerate(zip(self.rows, self.states, strict=True)):
            if not live[k]:
                continue
            param = present.params[row.index]
            grad: Any = present.grads[row.index]
            self.optimizer.check_tensors(param, grad)
            held, layout = present.locals[row.index], Layout(present.locals[row.index])
            if (
                held.device != self.device
                or read_look(held) != self.param_looks[k]
                or read_look(local(grad)) != self.grad_looks[k]
            ):
                return False  # the fastest backend for it may be another one
            self.optimizer.lay_state(param, row.group, layout, state)
            keys = self.optimizer.tensor_state(param, row.group) if held.numel() else ()
            tensors = {key: local(state[key]) for key in keys}
            item = Item(row, held, local(grad), tensors, layout)
            item.scalars = {key: column.views[k] for key, column in self.scalars.items()}
            item.is_first = self.first[k]  # a recorded step cannot ask
            self.items.append(item)
        return True

    def add_sums(self, sums: Sums, scales: Sequence[Scalar], squares: bool, coupled_only: bool) -> None:
        wanted = [item for item in self.items if item.row.needs_norm]
        raw = [] if coupled_only else [item for item in wanted if not item.row.adds_decay]
        for item, total in zip(raw, _sums([item.grad for item in raw], raw, 1), strict=True):
            sums.norms[item.row.index] = total
        if squares:
            for item, total in zip(self.items, _sums([i.grad for i in self.items], self.items, 2), strict=True):
                sums.squares[item.row.index] = total
            return
        coupled = [item for item in wanted if item.row.adds_decay]
        for item in coupled:
            sums.norms[item.row.index] = 0.0
        for batch, _ in self._batches(coupled, scales):
            for item, total in zip(batch.items, _sums(batch.grads, batch.items, 1), strict=True):
                sums.norms[item.row.index] = sums.norms[item.row.index] + total

    def update(self, sums: Sums | None, scales: Sequence[Scalar]) -> None:
        if sums is None:
            sums = Sums([0.0] * (self.indices[-1] + 1), [])
            self.add_sums(sums, scales, squares=False, coupled_only=False)
        numbers = self.steps.vector
        # float64: 1 - 0.999^t loses four digits in float32.
        on_device = self.rows[0].group["capturable"]
        steps = numbers.to(widest(numbers.device)).unbind() if on_device else numbers.tolist()
        if self.random_bits is not None:
            first = self.random_bits.first(numbers)
            drawn = zip(self.items, compress(first.unbind() if on_device else first.tolist(), self.live), strict=True)
            for (item, number), at_random in zip(drawn, compress(self.at_random, self.live), strict=True):
                item.first_random = number if at_random else None
        for item, step in zip(self.items, compress(steps, self.live), strict=True):
            item.step = step
            if not on_device:
                item.is_first = step == 1
        self.norms, self.scales = [sums.norms[row.index] for row in self.rows], scales
        for item in self.items:
            item.norm = sums.norms[item.row.index]
            if not item.row.adds_decay:
                item.norm = item.norm * abs(scales[item.row.group_index])  # type: ignore[operator]
        _guard([item for item in self.items if item.psi])
        for batch, written in self._batches(self.items, scales):
            self.optimizer.update(batch)
            for kept in written:
                kept.write()
        for item in self.items:
            if item.target is not None:
                item.target.copy_(item.param)
        self.optimizer.finish(self.items)
        self.first = [first and not live for first, live in zip(self.first, self.live, strict=True)]
        self.items = []

    def _batches(self, items: Sequence[Item], scales: Sequence[Scalar]) -> Iterator[tuple[Batch, list[Kept]]]:
        """Cut tensors into batches of one group with their effective gradients.

        The effective gradient is scale * grad, plus weight_decay * param where decay is L2. Half-precision
        parameters and moments are updated in a wide copy, which is rounded after the update.
        """
        alike: dict[tuple[Any, ...], list[Item]] = {}
        for item in items:
            if item.param.numel():
                row = item.row
                key = (row.group_index, item.param.dtype, item.grad.dtype, row.needs_norm, item.psi, item.is_first)
                alike.setdefault(key, []).append(item)
        for members in alike.values():
            for pieces in _cut(members):
                yield _batch(pieces, scales[members[0].row.group_index])


def _cut(items: list[Item]) -> Iterator[list[tuple[Item, Flats, int]]]:
    """Lists of aligned pieces, each with the number of its first element, with at most a block of elements together; whole
    tensors where foreach is set."""
    foreach = items[0].group["foreach"]
    limit = BLOCK if items[0].param.is_cpu else DEVICE_BLOCK
    pending: list[tuple[Item, Flats, int]] = []
    room = limit
    for item in items:
        flats = {key: item.layout.flat(tensor) for key, tensor in item.state.items()}
        flats["param"] = item.layout.flat(item.param)
        flats["grad"] = item.layout.flat(item.grad)
        size = item.param.numel()
        if foreach is False:
            yield [(item, flats, 0)]
        elif foreach:
            pending.append((item, flats, 0))
        elif size > limit:
            blocks = {key: tensor.split(limit) for key, tensor in flats.items()}
            for i in range(len(blocks["param"])):
                yield [(item, {key: parts[i] for key, parts in blocks.items()}, i * limit)]
        else:
            if size > room:
                yield pending
                pending, room = [], limit
            pending.append((item, flats, 0))
            room -= size
    if pending:
        yield pending


def _batch(pieces: list[tuple[Item, Flats, int]], scale: Scalar) -> tuple[Batch, list[Kept]]:
    items = [item for item, _, _ in pieces]
    dtype, group = items[0].dtype, items[0].group
    written: list[Kept] = []

    def widened(key: str) -> list[Tensor]:
        tensors = [flats[key] for _, flats, _ in pieces]
        if tensors[0].dtype == dtype:
            return tensors
        kept = [Kept(item, key, flats, start, dtype) for item, flats, start in pieces]
        written.extend(kept)
        return [piece.wide for piece in kept]

    params = widened("param")
    grads = [flats["grad"] for _, flats, _ in pieces]
    if grads[0].dtype != dtype:
        grads = [grad.to(dtype) for grad in grads]
    if isinstance(scale, Tensor):
        grads = list(mt.mul(grads, scale.to(device=grads[0].device, dtype=dtype)))
    elif scale != 1.0:
        grads = list(mt.mul(grads, scale))
    if items[0].row.adds_decay:
        grads = list(mt.add(grads, params, alpha=group["weight_decay"]))
    state = {key: widened(key) for key in items[0].state if key != COMPENSATION}
    return Batch(params, grads, state, items), written


def _sums(tensors: Sequence[Tensor], items: Sequence[Item], power: int) -> list[Scalar]:
    """sum|x| (power 1) or sum x^2 (power 2) of each: a number where the host may look at it, else a 0-dim tensor."""
    sums: list[Scalar] = [0.0] * len(tensors)
    for indices in by_device_and_dtype(tensors):
        alike = [tensors[i] for i in indices]
        if items[indices[0]].row.on_host:
            totals: Sequence[Scalar] = [sum_on_cpu(tensor, power).item() for tensor in alike]
        else:
            totals = sums_of_pieces(alike, power)
        for i, total in zip(indices, totals, strict=True):
            sums[i] = total
    return sums


def _guard(items: Sequence[Item]) -> None:
    """Psi(g) = g where the norm is zero, infinite or NaN: on the host by not asking, on a device by dividing by inf."""
    on_device = [item for item in items if not item.row.on_host]
    for item in items:
        if item.row.on_host:
            item.psi = bool(0.0 < item.norm < float("inf"))
    for indices in by_device_and_dtype([item.norm for item in on_device]):  # type: ignore[misc]
        stacked = torch.stack([on_device[i].norm for i in indices])  # type: ignore[misc]
        usable = (stacked > 0) & (stacked < float("inf"))
        limits = [on_device[i].group["agr_steps"] for i in indices]
        if any(limit is not None for limit in limits):
            # A recorded step ends AGR by itself.
            last = torch.tensor([math.inf if limit is None else limit for limit in limits], device="cpu")
            steps = torch.stack([torch.as_tensor(on_device[i].step) for i in indices])
            usable &= steps <= last.to(steps.device, non_blocking=True)
        for i, norm in zip(indices, torch.where(usable, stacked, float("inf")).unbind(), strict=True):
            on_device[i].norm = norm
