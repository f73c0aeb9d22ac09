"""Time and peak extra memory of one optimizer step, side by side in one process.

    python benchmarks/step.py [--millions 100] [--rounds 15] [--threads 2] [--device cpu] [--out FILE]

Every variant owns its parameters, gradients and state. It is timed together with a reference, steps of the two alternating,
and the table gives medians and the median ratio of the rounds: to torch's fused AdamW, and where there is a budget against
something else, to that in rounds of their own. Memory is what a step adds at its peak to what was there before it: on the
CPU the resident set's high-water mark (Linux), on CUDA the allocator's.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import timm.optim
import torch

from agr_hf import AdaL, Adan, AGRAdamW, AGRAdan
from agr_hf.environment import environment
from agr_hf.files import write_text

REFERENCE = "torch AdamW fused"
# What a variant is to be compared with, and the ratio to reach; that with clipping is for GPUs.
BUDGETS = {
    "AGRAdamW": (REFERENCE, 1.15),
    "AGRAdamW max_grad_norm": ("clip + torch AdamW fused", 0.85),
    "AGRAdan": ("timm Adan", 1.0),
}


class NaiveAGRAdamW(torch.optim.AdamW):
    """The formulation of the authors: Psi in plain tensor operations, then AdamW, one tensor at a time."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = p.grad - p.grad.abs() / p.grad.abs().sum() * p.grad
        super().step()


def shapes(millions):
    """Layers of GPT-2's size (7.1M weights each) and an embedding of what remains."""
    layer = [(768, 2304), (2304,), (768, 768), (768,), (768, 3072), (3072,), (3072, 768), (768,), (768,), (768,)]
    size = sum(torch.Size(shape).numel() for shape in layer)
    layers = int(millions * 1e6 * 0.85) // size
    rest = int(millions * 1e6) - layers * size
    return layer * layers + [(rest // 768, 768)]


VARIANTS = {
    "torch AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
    "torch AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "AGRAdamW": lambda p: AGRAdamW(p),
    "AGRAdamW agr=False": lambda p: AGRAdamW(p, agr=False),
    "AGRAdamW foreach": lambda p: AGRAdamW(p, foreach=True),
    "AGR as the authors write it": lambda p: NaiveAGRAdamW(p, foreach=False),
    "clip + torch AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
    "AGRAdamW max_grad_norm": lambda p: AGRAdamW(p, max_grad_norm=1.0),
    "AdaL": lambda p: AdaL(p),
    "Adan": lambda p: Adan(p),
    "AGRAdan": lambda p: AGRAdan(p),
    "timm Adan": lambda p: timm.optim.Adan(p, no_prox=False),
}


class Variant:
    def __init__(self, name, sizes, device):
        generator = torch.Generator(device).manual_seed(0)
        self.params = [torch.nn.Parameter(torch.randn(s, device=device, generator=generator)) for s in sizes]
        for p in self.params:
            p.grad = torch.randn(p.shape, device=device, generator=generator)
        self.clips = name.startswith("clip")
        self.optimizer = VARIANTS[name](self.params)

    def step(self):
        if self.clips:
            torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()

    def timed(self, device):
        synchronize(device)
        start = time.perf_counter()
        self.step()
        synchronize(device)
        return time.perf_counter() - start


def timed_together(name, reference, sizes, device, rounds):
    """Pairs of seconds of one step of each, alternating; only these two are in memory."""
    pair = [Variant(one, sizes, device) for one in (name, reference)]
    for variant in pair:
        variant.step()
        variant.step()
    return [tuple(variant.timed(device) for variant in pair) for _ in range(rounds)]


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def peak_extra_memory(variant, device):
    """Bytes that a step needs at its peak beyond what it found; None where the system does not tell."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        variant.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return None
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except OSError:
        return None
    before = resident("VmRSS")
    variant.step()
    return max(resident("VmHWM") - before, 0)


def resident(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{key} is missing from /proc/self/status")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=100, help="millions of float32 parameters (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each variant (%(default)s)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="torch's CPU threads (%(default)s)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = shapes(arguments.millions)
    numel = sum(torch.Size(shape).numel() for shape in sizes)
    names = list(dict.fromkeys([REFERENCE, *arguments.variants]))
    if len(names) == 1:
        parser.error(f"--variants names {REFERENCE!r} alone, to which the others are compared; name another one too")
    memory = {}
    for name in names:  # alone in memory, so that nothing else moves the high-water mark
        variant = Variant(name, sizes, arguments.device)
        variant.step()  # makes the state
        memory[name] = peak_extra_memory(variant, arguments.device)
        del variant
    times, budgets = {}, []
    for name in names[1:]:
        times[name] = timed_together(name, REFERENCE, sizes, arguments.device, arguments.rounds)
        gc.collect()
    times[REFERENCE] = [(b, b) for pairs in times.values() for _, b in pairs]
    rows = [
        {
            "variant": name,
            "milliseconds": 1e3 * statistics.median(a for a, _ in times[name]),
            "ratio": statistics.median(a / b for a, b in times[name]),
            "extra_memory_mib": None if memory[name] is None else memory[name] / 2**20,
        }
        for name in names
    ]
    for name, (other, budget) in BUDGETS.items():
        if name in names:
            pairs = times[name]
            if other != REFERENCE:
                pairs = timed_together(name, other, sizes, arguments.device, arguments.rounds)
                gc.collect()
            ratio = statistics.median(a / b for a, b in pairs)
            budgets.append({"variant": name, "against": other, "ratio": ratio, "budget": budget})
    conditions = {
        "parameters": numel,
        "tensors": len(sizes),
        "rounds": arguments.rounds,
        **environment(torch.device(arguments.device)),
    }
    print(f"{numel:,} float32 parameters in {len(sizes)} tensors, {arguments.device}: {conditions['device']}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.rounds} rounds")  # fmt: skip
    print(f"{'variant':30} {'ms':>9} {'x fused':>8} {'extra MiB':>10}")
    for row in rows:
        extra = "?" if row["extra_memory_mib"] is None else f"{row['extra_memory_mib']:.1f}"
        print(f"{row['variant']:30} {row['milliseconds']:9.1f} {row['ratio']:8.2f} {extra:>10}")
    budget = max(0.01 * 4 * numel, 64 * 2**20) / 2**20
    for row in budgets:
        print(f"{row['variant']} / {row['against']}: {row['ratio']:.2f} (budget {row['budget']:.2f})")
    print(f"extra memory: budget {budget:.0f} MiB")
    if arguments.out:
        results = {"rows": rows, "budgets": budgets, "memory_budget_mib": budget, **conditions}
        write_text(arguments.out, json.dumps(results, indent=2) + "\n")
        print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
