"""What a step works on: one parameter's part in it, and the batches that a rule sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from agr_hf.optim.backends import multi_tensor as mt
from agr_hf.optim.backends.cpu import BLOCK
from agr_hf.optim.backends.multi_tensor import Scalar
from agr_hf.optim.layout import Layout
from agr_hf.optim.norms import local

# Elements updated at a time on other devices than the CPU: a few pieces of scratch of 16 MiB (float32).
DEVICE_BLOCK = 4_194_304


class Work:
    """One parameter's part in this step, everything local to this rank."""

    __slots__ = (
        "coupled",
        "first",
        "grad",
        "group",
        "layout",
        "needs_norm",
        "norm",
        "param",
        "psi",
        "scalars",
        "square",
        "state",
        "step",
        "target",
        "whole",
    )

    def __init__(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        self.whole = grad  # a DTensor keeps its mesh here
        self.grad = local(grad)
        self.param = local(param)
        self.target: Tensor | None = None
        self.layout = Layout(self.param)
        if self.layout.view(self.param) is None:
            # A view with holes (a slice of a larger tensor) is updated in a dense copy and written back.
            self.target, self.param = self.param, self.layout.relaid(self.param)
        self.group = group
        self.state: dict[str, Tensor] = {}  # local, in the parameter's layout
        self.scalars: dict[str, Tensor] = {}  # "step" and the rule's 0-dim state
        self.step: Scalar = 0.0  # steps made, this one included
        self.first = False  # the state was made in this step
        self.psi = False  # AGR applies to this tensor in this step
        self.needs_norm = False
        self.coupled = False  # weight decay is part of the gradient
        self.norm = torch.zeros((), device="cpu")  # l1 norm of the whole effective gradient, once reduced
        self.square = torch.zeros((), device="cpu")  # sum of squares of the whole raw gradient, likewise

    @property
    def dtype(self) -> torch.dtype:
        """What the update is computed in."""
        return torch.promote_types(self.param.dtype, torch.float32)

    @property
    def on_host(self) -> bool:
        """Whether the host may look at numbers of this tensor without waiting for a device."""
        return self.param.is_cpu and not self.group["capturable"]


class Batch:
    """Pieces of tensors of one group that are updated together.

    Every list has one entry for each piece. Tensors are 1-D, float32 or float64, on one device, and aligned: element i
    of a parameter, its gradient and its state belong together. `grads` may be `.grad` itself and must not be written.
    """

    def __init__(
        self, params: list[Tensor], grads: list[Tensor], state: dict[str, list[Tensor]], works: list[Work]
    ) -> None:
        self.params = params
        self.grads = grads
        self.state = state
        self.works = works
        self.group = works[0].group
        self.psi = works[0].psi
        self.needs_norm = works[0].needs_norm
        self.first = works[0].first
        self.on_host = works[0].on_host

    @property
    def steps(self) -> list[Scalar]:
        """How many steps each tensor has made, this one included."""
        return [work.step for work in self.works]

    @property
    def step_tensors(self) -> list[Tensor]:
        return [work.scalars["step"] for work in self.works]

    @property
    def norms(self) -> list[Scalar]:
        """l1 norm of each whole gradient: numbers where the host knows them, else 0-dim tensors."""
        return self._scalars([work.norm for work in self.works])

    def scalars_of(self, key: str) -> list[Scalar]:
        """An entry of the rule's `scalar_state` for each tensor, as the step before left it."""
        return self._scalars([work.scalars[key] for work in self.works])

    def _scalars(self, tensors: Sequence[Tensor]) -> list[Scalar]:
        return [tensor.item() if self.on_host else tensor for tensor in tensors]

    @property
    def lr(self) -> Scalar:
        lr = self.group["lr"]
        if isinstance(lr, Tensor):
            if lr.is_cpu and not self.group["capturable"]:
                return lr.item()
            return lr.reshape(()).to(self.params[0].device, torch.float64)  # 1 - lr * weight_decay needs the digits
        return float(lr)


# A parameter's flat tensors: "param", "grad" and its state keys.
Flats = dict[str, Tensor]


def batches(works: Sequence[Work], scale: Scalar) -> Iterator[tuple[Batch, list[tuple[Tensor, Tensor]]]]:
    """Cut the tensors of one group into batches with their effective gradients.

    The effective gradient is scale * grad, plus weight_decay * param where decay is L2. With each batch come the
    (target, source) pairs to copy after the update: half-precision parameters are updated in a wide copy.
    """
    alike: dict[tuple[Any, ...], list[Work]] = {}
    for work in works:
        if work.param.numel():
            key = (work.param.device, work.param.dtype, work.grad.dtype, work.needs_norm, work.psi, work.first)
            alike.setdefault(key, []).append(work)
    for members in alike.values():
        for pieces in _cut(members):
            yield _batch(pieces, scale)


def _cut(works: list[Work]) -> Iterator[list[tuple[Work, Flats]]]:
    """Lists of aligned pieces with at most a block of elements together; whole tensors where foreach is set."""
    foreach = works[0].group["foreach"]
    limit = BLOCK if works[0].param.is_cpu else DEVICE_BLOCK
    pending: list[tuple[Work, Flats]] = []
    room = limit
    for work in works:
        flats = {key: work.layout.flat(tensor) for key, tensor in work.state.items()}
        flats["param"] = work.layout.flat(work.param)
        flats["grad"] = work.layout.flat(work.grad)
        size = work.param.numel()
        if foreach is False:
            yield [(work, flats)]
        elif foreach:
            pending.append((work, flats))
        elif size > limit:
            blocks = {key: tensor.split(limit) for key, tensor in flats.items()}
            for i in range(len(blocks["param"])):
                yield [(work, {key: parts[i] for key, parts in blocks.items()})]
        else:
            if size > room:
                yield pending
                pending, room = [], limit
            pending.append((work, flats))
            room -= size
    if pending:
        yield pending


def _batch(pieces: list[tuple[Work, Flats]], scale: Scalar) -> tuple[Batch, list[tuple[Tensor, Tensor]]]:
    works = [work for work, _ in pieces]
    dtype, group = works[0].dtype, works[0].group
    params = [flats["param"] for _, flats in pieces]
    grads = [flats["grad"] for _, flats in pieces]
    written: list[tuple[Tensor, Tensor]] = []
    if params[0].dtype != dtype:
        wide = [param.to(dtype) for param in params]
        written = list(zip(params, wide, strict=True))
        params = wide
    if grads[0].dtype != dtype:
        grads = [grad.to(dtype) for grad in grads]
    if isinstance(scale, Tensor):
        grads = list(mt.mul(grads, scale.to(device=grads[0].device, dtype=dtype)))
    elif scale != 1.0:
        grads = list(mt.mul(grads, scale))
    if works[0].coupled:
        grads = list(mt.add(grads, params, alpha=group["weight_decay"]))
    state = {key: [flats[key] for _, flats in pieces] for key in works[0].state}
    return Batch(params, grads, state, works), written
