"""Times and memory of steps, side by side in one process.

Each entrant owns its parameters, gradients and state: an entrant that stepped on another's would find part of them in the
cache. Only the entrants of one comparison are in memory at a time.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from contestants import CONTESTANTS, REFERENCE, Contestant
from torch import Tensor, nn

Shapes = list[tuple[int, ...]]

LEAST_ROUNDS = 7
YARDSTICK_ELEMENTS = 2**26  # 256 MiB, beyond most caches
CALL_ROUNDS = 25


def compare(contestants: list[Contestant], shapes: Shapes, arguments) -> list[dict]:
    """The rows of contestants that are measured together, the reference first; a status says why one was not."""
    device, numel = arguments.device, sum(math.prod(shape) for shape in shapes)
    rows = [{"contestant": c.name, "status": "not installed"} for c in contestants if not c.is_installed()]
    contestants = [c for c in contestants if c.is_installed()]
    needed, available = sum(4 * numel * c.tensors for c in contestants), available_memory(device)
    if available is not None and needed > 0.9 * available:  # the rest is for what steps need for a moment
        status = f"needs {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} are free"
        return rows + [{"contestant": c.name, "status": status} for c in contestants]
    entrants, found = [], {}
    for contestant in contestants:
        try:
            entrant, found[contestant.name] = enter(contestant, shapes, device)
            entrants.append(entrant)
        except Exception as error:
            if contestant.package is None and not contestant.compiles:
                raise
            reason = str(error).strip().partition("\n")[0]
            status = f"fails: {type(error).__name__}: {reason[:100]}"
            rows.append({"contestant": contestant.name, "status": status})
    seconds = time_together(entrants, arguments.rounds, arguments.seconds)
    del entrants[:], entrant
    free_unused_memory(device)
    in_place_rate, copy_rate = time_yardsticks(device)
    for name, measured in found.items():
        contestant = CONTESTANTS[name]
        own, rival = [turn[name] for turn in seconds], contestant.against
        rows.append({
            "contestant": name,
            "status": "measured",
            "rounds": len(own),
            "milliseconds": 1e3 * statistics.median(own),
            "ratio": statistics.median(turn[name] / turn[REFERENCE] for turn in seconds),
            "against": rival if rival in found else None,
            "ratio_against": statistics.median(turn[name] / turn[rival] for turn in seconds) if rival in found else None,
            "bandwidth_share": contestant.bytes * numel / statistics.median(own) / in_place_rate,
            "in_place_gigabytes_per_second": in_place_rate / 1e9,
            "copy_gigabytes_per_second": copy_rate / 1e9,
            **measured,
        })  # fmt: skip
    return rows


def enter(contestant: Contestant, shapes: Shapes, device: str) -> tuple[Entrant, dict]:
    """An entrant that has made its state, and what is measured of it alone."""
    if contestant.compiles:
        torch.compiler.reset()  # instances share the code that counts its recompilations
    entrant = Entrant(contestant, shapes, device)
    first_step = entrant.step()
    entrant.step()
    memory = entrant.peak_extra_memory()
    call = None if contestant.compiles else time_call(contestant, shapes, device)
    return entrant, {
        "first_step_seconds": first_step,
        "call_milliseconds": None if call is None else 1e3 * call,
        "extra_memory_mib": None if memory is None else memory / 2**20,
    }


def merge_reference(rows: list[dict]) -> dict:
    """One row of those that the reference has, a comparison each: the medians."""
    measured = [row for row in rows if row["status"] == "measured"]
    if not measured:
        return rows[0]
    numbers = {
        key: statistics.median(row[key] for row in measured) for key, value in measured[0].items()
        if isinstance(value, float)
    }  # fmt: skip
    return {**measured[0], **numbers, "rounds": sum(row["rounds"] for row in measured)}


class Entrant:
    """A contestant with tensors of its own."""

    def __init__(self, contestant: Contestant, shapes: Shapes, device: str) -> None:
        self.name = contestant.name
        self.device = device
        generator = torch.Generator(device).manual_seed(0)
        self.params = [nn.Parameter(tensor) for tensor in make_tensors(shapes, 0.02, generator)]
        self._gradients = itertools.cycle([make_tensors(shapes, 1e-3, generator) for _ in range(2)])
        self.optimizer, self._step = contestant.build(self.params)

    def take_gradients(self) -> None:
        """As a backward pass does it after `zero_grad`: new tensor objects at other addresses than in the last step."""
        self.optimizer.zero_grad(set_to_none=True)
        for p, grad in zip(self.params, next(self._gradients), strict=True):
            p.grad = grad.detach()

    def step(self) -> float:
        """Seconds of one step, with new gradients that are not part of the time."""
        self.take_gradients()
        synchronize(self.device)
        start = time.perf_counter()
        self._step()
        synchronize(self.device)
        return time.perf_counter() - start

    def peak_extra_memory(self) -> int | None:
        """Bytes that a step needs at its peak beyond what it found; None where the system does not tell."""
        self.take_gradients()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self._step()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        free_unused_memory(self.device)  # what malloc keeps would hide what the step takes
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark; Linux alone has it
        except OSError:
            return None
        before = read_status("VmRSS")
        self._step()
        return max(read_status("VmHWM") - before, 0)


def make_tensors(shapes: Shapes, scale: float, generator: torch.Generator) -> list[Tensor]:
    """Normal numbers, one block of them again and again: random numbers for all would take longer than the steps."""
    largest = max(math.prod(shape) for shape in shapes)
    block = torch.randn(min(largest, 2**20), generator=generator, device=generator.device) * scale
    tensors = [torch.empty(shape, device=generator.device) for shape in shapes]
    for tensor in tensors:
        for piece in tensor.view(-1).split(block.numel()):
            piece.copy_(block[: piece.numel()])
    return tensors


def time_together(entrants: list[Entrant], rounds: int, seconds: float) -> list[dict[str, float]]:
    """Rounds of one step of each, in turning order, until `rounds` are done or the time is up: the seconds by name."""
    results: list[dict[str, float]] = []
    end = time.perf_counter() + seconds
    with no_garbage_collection():
        while len(results) < min(rounds, LEAST_ROUNDS) or (len(results) < rounds and time.perf_counter() < end):
            turn = len(results) % len(entrants)
            results.append({entrant.name: entrant.step() for entrant in entrants[turn:] + entrants[:turn]})
    return results


def time_call(contestant: Contestant, shapes: Shapes, device: str) -> float:
    """Seconds of a step on as many tensors of as many dimensions, but of two elements each.

    What is left is Python, torch's dispatch and the entry into each kernel. One element would not do: AGR leaves it alone.
    """
    tiny = Entrant(contestant, [(2, *(1 for _ in shape[1:])) for shape in shapes], device)
    time_together([tiny], 3, 0.0)
    return statistics.median(turn[tiny.name] for turn in time_together([tiny], CALL_ROUNDS, 1.0))


def time_yardsticks(device: str) -> tuple[float, float]:
    """Bytes a second, read and written together, of a large tensor changed in place, and of one copied to another.

    A copy on a CPU often reads what it overwrites, which is not counted: steps, which work in place, can be faster.
    """
    source, target = (torch.ones(YARDSTICK_ELEMENTS, device=device) for _ in range(2))

    def time_pass(work: Callable[[], object]) -> float:
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        return time.perf_counter() - start

    def rate(work: Callable[[], object]) -> float:
        time_pass(work)
        return 8 * YARDSTICK_ELEMENTS / statistics.median(time_pass(work) for _ in range(5))

    return rate(lambda: target.add_(1.0)), rate(lambda: target.copy_(source))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def no_garbage_collection():
    """As timeit does it: a collection would be charged to whoever happens to run."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def free_unused_memory(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):  # glibc
        ctypes.CDLL(None).malloc_trim(0)


def available_memory(device: str) -> int | None:
    """Bytes that new tensors can have; None where the system does not tell."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        return read_kilobytes("/proc/meminfo", "MemAvailable")
    except OSError:
        return None


def read_status(key: str) -> int:
    return read_kilobytes("/proc/self/status", key)


def read_kilobytes(path: str, key: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{path} has no line {key}")
