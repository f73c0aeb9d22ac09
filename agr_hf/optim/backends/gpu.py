"""The backend of GPUs: Triton kernels over tables of addresses (triton_kernels.py), for the rules of Adam and of Adan.

What a step tells the kernels lies in small tables on the device. They are sent where they changed: addresses when a gradient
moved, numbers when the learning rate did. Nothing is read from the device, and under `capturable` the learning rate, the
steps and the end of AGR are read there, so that a CUDA graph repeats the step and not its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from agr_hf.optim.backends.capture import untraced
from agr_hf.optim.backends.tables import GROUP_NUMBERS, TablePart, can_serve
from agr_hf.optim.part import Present, Row, Sums
from agr_hf.optim.rounding import COMPENSATION
from agr_hf.optim.shards import Scalar, as_vector

if TYPE_CHECKING:
    from agr_hf.optim.step import StepOptimizer

DEVICES = ("cuda", "xpu")  # ROCm calls itself cuda
CHUNK = 32_768  # elements of a program
BLOCK = 1024


def why_not() -> str | None:
    """What keeps the kernels from being there, or None."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


def serves(optimizer: StepOptimizer, row: Row, present: Present) -> bool:
    """Whether this backend computes a row: by the options of its group, and by what its tensors are."""
    return can_serve(optimizer, row, present, lambda tensor: tensor.device.type in DEVICES) and why_not() is None


class Table:
    """Numbers of the host on a device, sent where they changed."""

    def __init__(self, device: torch.device, dtype: torch.dtype, length: int) -> None:
        self.tensor = torch.zeros(length, dtype=dtype, device=device)
        self.sent: Any = None
        self._recorded: list[Tensor] = []

    def send(self, values: Any) -> None:
        if values == self.sent:
            return
        self.sent = values[:]
        source = torch.tensor(values, dtype=self.tensor.dtype, device="cpu")
        if self.tensor.device.type == "cuda":
            source = source.pin_memory()  # so that the host need not wait
            if torch.cuda.is_current_stream_capturing():
                self._recorded.append(source)  # each replay reads it again
        self.tensor.copy_(source, non_blocking=True)


class GPUPart(TablePart):
    """Rows that triton_kernels.py computes."""

    def __init__(self, optimizer: StepOptimizer, rows: list[Row], present: Present, new: Collection[int]) -> None:
        super().__init__(optimizer, rows, present, new)
        chunk_row: list[int] = []
        chunk_at: list[int] = []
        first_chunk = [0]
        for k, numel in enumerate(self.numels):
            # An empty shard has one too: it keeps the numbers of its whole tensor.
            starts = range(0, max(numel, 1), CHUNK)
            chunk_row += [k] * len(starts)
            chunk_at += starts
            first_chunk.append(len(chunk_row))
        self.chunks = len(chunk_row)
        device = self.device

        def constant(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device="cpu").to(device)

        self.chunk_row, self.chunk_at = constant(chunk_row), constant(chunk_at)
        self.first_chunk = constant(first_chunk)
        self.row_numels, self.row_flags, self.row_slots = map(constant, (self.numels, self.flags, self.slots))
        self.table = Table(device, torch.int64, len(self.addresses))
        self.numbers = Table(device, torch.float64, GROUP_NUMBERS * len(self.groups))
        self.host_steps = Table(device, torch.float64, len(rows))
        self.host_random = Table(device, torch.int64, len(rows))

        def sums(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.float64, device=device)

        self.chunk_norms, self.chunk_squares = sums(self.chunks), sums(self.chunks)
        self.row_norms, self.norms_after = sums(len(rows)), sums(len(rows))

    def add_sums(self, sums: Sums, scales: Sequence[Scalar], squares: bool, coupled_only: bool) -> None:
        self._launch_sums(scales, squares=squares, coupled_only=coupled_only, handed_out=True)
        norms = self._add_chunks(self.chunk_norms).unbind()
        totals = self._add_chunks(self.chunk_squares).unbind() if squares else norms
        for row, norm, total in zip(self.rows, norms, totals, strict=True):
            if row.needs_norm and (row.adds_decay or not coupled_only) and not (squares and row.adds_decay):
                sums.norms[row.index] = norm
            if squares:
                sums.squares[row.index] = total

    def update(self, sums: Sums | None, scales: Sequence[Scalar]) -> None:
        given = self.row_norms
        if sums is None and any(row.needs_norm for row in self.rows):
            self._launch_sums(scales, squares=False, coupled_only=False, handed_out=False)
        elif sums is not None:
            given = as_vector([sums.norms[i] for i in self.indices], self.device.type).to(torch.float64)
        self._launch_update(given, scales, norms_given=sums is not None)
        self.count_change()
        self.let_go()

    @untraced
    def _launch_sums(self, scales: Sequence[Scalar], *, squares: bool, coupled_only: bool, handed_out: bool) -> None:
        from agr_hf.optim.backends.triton_kernels import sums_kernel

        self._send(scales)
        with self._on_device():
            sums_kernel[(self.chunks,)](
                self.table.tensor, len(self.rows), self._rest(), self.chunk_row, self.chunk_at,
                self.row_numels, self.row_flags, self.row_slots, self.numbers.tensor, self.chunk_norms, self.chunk_squares,
                SQUARES=squares, COUPLED_ONLY=coupled_only, HANDED_OUT=handed_out,
                HAS_REST=COMPENSATION in self.keys, CHUNK=CHUNK, BLOCK=BLOCK,
            )  # fmt: skip

    @untraced
    def _add_chunks(self, chunk_sums: Tensor) -> Tensor:
        from agr_hf.optim.backends.triton_kernels import add_chunks_kernel

        sums = torch.zeros_like(self.row_norms)
        with self._on_device():
            add_chunks_kernel[(len(self.rows),)](self.first_chunk, chunk_sums, sums, BLOCK=128)
        return sums

    @untraced
    def _launch_update(self, given: Tensor, scales: Sequence[Scalar], *, norms_given: bool) -> None:
        from agr_hf.optim.backends.triton_kernels import update_kernel

        self._send(scales)
        steps, first_random = self.steps.vector, None
        if self.random_bits is not None:
            first_random = self.random_bits.first(steps)
        if not self.rows[0].group["capturable"]:
            self.host_steps.send(steps.tolist())
            steps = self.host_steps.tensor
            if first_random is not None:
                self.host_random.send(first_random.tolist())
                first_random = self.host_random.tensor
        before = self.scalars["pre_l1_norm"].vector if "pre_l1_norm" in self.scalars else None
        skipped = self.skipped.to(self.row_norms) if isinstance(self.skipped, Tensor) else None
        with self._on_device():
            update_kernel[(self.chunks,)](
                self.table.tensor, len(self.rows), self._rest(), self.chunk_row, self.chunk_at, self.first_chunk,
                self.row_numels, self.row_flags, self.row_slots, self.numbers.tensor, steps,
                self.host_random.tensor if first_random is None else first_random, self.chunk_norms, given,
                self.row_norms, self.row_norms if before is None else before, self.norms_after,
                self.row_norms if skipped is None else skipped, SKIPS=skipped is not None,
                ADAN=self.optimizer.native_rule == "adan", NORMS_GIVEN=norms_given,
                HAS_REST=COMPENSATION in self.keys, DRAWS=first_random is not None, KEEPS_NORM=before is not None,
                CHUNK=CHUNK, BLOCK=BLOCK,
            )  # fmt: skip
        if before is not None:
            before.copy_(self.norms_after)

    def _on_device(self) -> Any:
        """Triton launches on the current device; its interpreter knows no device."""
        return nullcontext() if self.device.type == "cpu" else torch.get_device_module(self.device).device(self.device)

    def _rest(self) -> Tensor:
        """The column of what Kahan's compensation keeps; any other where there is none."""
        return self.table.tensor[-len(self.rows) :]

    def _send(self, scales: Sequence[Scalar]) -> None:
        self.table.send(self.addresses)
        numbers: list[float] = []
        on_device: list[tuple[int, Tensor]] = []
        for index, group in self.groups.items():
            first: list[float] = []
            for value in (scales[index], group["lr"]):
                # What a device knows is copied there, and not waited for.
                if isinstance(value, Tensor) and (not value.is_cpu or group["capturable"]):
                    on_device.append((len(numbers) + len(first), value))
                    value = 0.0
                first.append(float(value))
            steps = group.get("agr_steps") if group["capturable"] else None
            betas = group["betas"]
            numbers += [
                *first,
                group["eps"],
                group["weight_decay"],
                math.inf if steps is None else float(steps),
                float(group.get("proximal", False)),
                *betas,
                *[0.0] * (GROUP_NUMBERS - 6 - len(betas)),
            ]
        self.numbers.send(numbers)
        for place, value in on_device:
            self.numbers.tensor[place].copy_(value.reshape(()))
