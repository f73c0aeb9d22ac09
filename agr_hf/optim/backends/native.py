"""The native backend of the CPU: one pass over all tensors in C (native.c), through tables of addresses.

It serves float32 and bfloat16 parameters and gradients in any mix, with float32 state, for the rules of Adam and of Adan.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from agr_hf.optim.backends import gpu
from agr_hf.optim.backends.capture import untraced
from agr_hf.optim.backends.look import WHY_NOT, _native
from agr_hf.optim.backends.tables import DTYPES, TablePart, can_serve
from agr_hf.optim.part import Present, Row, Sums
from agr_hf.optim.shards import Scalar

if TYPE_CHECKING:
    from agr_hf.optim.step import StepOptimizer

logger = logging.getLogger(__name__)
# Rules of native.c by the name that an optimizer states; its `state_keys` are in the order of the loops' arguments.
RULES = {"adam": 0, "adan": 1}
# Modes of a call; the same in native.c.
SUMS_ONLY, SQUARES, COUPLED_ONLY, NORMS_GIVEN = 1, 2, 4, 8
NUMBERS = 16

_said = False


def is_available() -> bool:
    """Whether the extension was built; says once why not and what to do."""
    global _said
    if _native is None and not _said:
        _said = True
        logger.warning(
            "agr_hf was installed without its native CPU step (%s): steps take the slower multi-tensor path; install a C "
            "compiler and build the package again. `agr-hf env` shows what is there",
            WHY_NOT,
        )
    return _native is not None


def find_openmp() -> bool:
    """Compute in the threads of torch's OpenMP: as its wheels carry it, or as the loader finds it."""
    carried = sorted(map(str, (Path(torch.__file__).parent / "lib").glob("lib*omp*")))
    return any(_native.use_openmp(library) for library in (*carried, "libgomp.so.1", "libiomp5.so", "libomp.so"))


if _native is not None:
    find_openmp()


def select_instructions(name: str | None = None) -> str:
    """Compute with the instruction set `name` (avx512, avx2, baseline) from now on, or with the widest; its name.

    Raises:
        ValueError: this processor does not have it.
    """
    return _native.select_isa(name)


def missing_kernel(rule: str | None, param: Tensor) -> str | None:
    """What keeps the native step from a parameter, to follow "has no fused kernel", or None."""
    if rule is None or not (param.is_cpu or (param.device.type in gpu.DEVICES and gpu.why_not() is None)):
        return f"on {param.device.type}"
    if param.dtype not in DTYPES:
        return f"for {param.dtype} (only for float32 and bfloat16)"
    return None if _native is not None or not param.is_cpu else f"here: it was not built ({WHY_NOT})"


def serves(optimizer: StepOptimizer, row: Row, present: Present) -> bool:
    """Whether this backend computes a row: by the options of its group, and by what its tensors are."""
    return row.on_host and can_serve(optimizer, row, present, lambda tensor: tensor.is_cpu) and is_available()


class NativePart(TablePart):
    """Rows that native.c computes. `fixed` does not change; addresses, classes and numbers are a step's."""

    def __init__(self, optimizer: StepOptimizer, rows: list[Row], present: Present, new: Collection[int]) -> None:
        super().__init__(optimizer, rows, present, new)
        self.rule = RULES[optimizer.native_rule or ""]
        self.fixed = array("q", self.numels + self.flags)
        self.group_slots = array("q", self.slots)
        self.norms = array("d", bytes(8 * len(rows)))
        self.squares = array("d", bytes(8 * len(rows)))
        self.counted: float | list[float]  # steps made, this one included: of all rows, or of each

    def count(self, skipped: bool | Tensor) -> None:
        # In C: an operation of torch takes as long as fifty small tensors here, for its code is cold by the time of a step.
        self.counted = _native.count(self.steps.vector.data_ptr(), bytes(self.live))

    def number_dtype(self, device: torch.device) -> torch.dtype:
        return torch.float64  # native.c reads and writes doubles

    def add_sums(self, sums: Sums, scales: Sequence[Scalar], squares: bool, coupled_only: bool) -> None:
        if not coupled_only:
            self.norms = array("d", bytes(8 * len(self.rows)))
        self._run(SUMS_ONLY | SQUARES * squares | COUPLED_ONLY * coupled_only, *self._classes(scales))
        for found, written in ((self.norms, sums.norms), (self.squares, sums.squares)):
            if self.is_whole:
                written[:] = found.tolist()
            else:
                for i, total in zip(self.indices, found, strict=True):
                    written[i] = total

    def update(self, sums: Sums | None, scales: Sequence[Scalar]) -> None:
        self.scales = scales
        if sums is not None:
            norms: list[Any] = sums.norms if self.is_whole else [sums.norms[i] for i in self.indices]
            self.norms = array("d", norms)
        self.count_change()  # now, while what torch knows of the tensors is in the cache
        self._run(0 if sums is None else NORMS_GIVEN, *self._classes(scales))
        self.let_go()

    @untraced  # torch.compile cannot trace C
    def _run(self, mode: int, classes: array[int], numbers: array[float]) -> None:
        before = self.scalars["pre_l1_norm"].vector.data_ptr() if "pre_l1_norm" in self.scalars else 0
        first = b"" if self.random_bits is None else array("q", self.random_bits.first(self.steps.vector).tolist())
        _native.run(
            self.rule, len(self.optimizer.state_keys), mode, torch.get_num_threads(), self.addresses, self.fixed,
            classes, numbers, self.norms, self.squares, before, first,
        )  # fmt: skip

    def _classes(self, scales: Sequence[Scalar]) -> tuple[array[int], array[float]]:
        """A class of each row and the numbers of each class: rows of one group and step count share them."""
        numbers = array("d")
        if isinstance(self.counted, float):  # of all rows
            for index, group in self.groups.items():
                numbers.extend(self._numbers(index, group, self.counted, scales))
            return self.group_slots, numbers
        found: dict[tuple[int, float], int] = {}
        classes = array("q")
        for row, step in zip(self.rows, self.counted, strict=True):
            key = (row.group_index, step)
            if key not in found:
                found[key] = len(found)
                numbers.extend(self._numbers(row.group_index, row.group, step, scales))
            classes.append(found[key])
        return classes, numbers

    def _numbers(self, index: int, group: dict[str, Any], step: float, scales: Sequence[Scalar]) -> list[float]:
        """Of a group and step count, as native.c reads them: what is multiplied once a step and not once an element."""
        step = step or 1.0  # a row without any gradient yet, which is not computed
        lr, eps, decay = float(group["lr"]), group["eps"], group["weight_decay"]
        betas = group["betas"]
        coupled = self.optimizer.l2_decay(group)
        head = [float(scales[index]), decay if coupled else 0.0, 1 - betas[0], betas[1], 1 - betas[1]]
        if self.rule == RULES["adam"]:
            rest = [
                1.0 if coupled else 1 - lr * decay,
                lr / (1 - betas[0] ** step),
                (1 - betas[1] ** step) ** -0.5,
                eps,
            ]
        else:
            rest = [
                betas[2],
                1 - betas[2],
                1.0 if group["proximal"] else 1 - lr * decay,
                1 / (1 + lr * decay) if group["proximal"] else 1.0,
                lr / (1 - betas[0] ** step),
                lr * betas[1] / (1 - betas[1] ** step),
                (1 - betas[2] ** step) ** -0.5,
                eps,
                float(step == 1),
            ]
        return head + rest + [0.0] * (NUMBERS - len(head) - len(rest))
