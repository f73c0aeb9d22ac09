"""What the step's collective costs on 2 to 16,384 ranks: a calculation, and a check of it on gloo processes of this machine.

    python benchmarks/collective.py                      # the table and the picture; needs no processes
    python benchmarks/collective.py --measure 2 4 8      # and measured times of all-reduces beside calculated ones

Where layers are sharded, a step adds up two numbers a layer (sums of |g|, and of g^2 where it clips) over the ranks that
share a layer: one all-reduce of 16 bytes a layer, however many parameters there are. Its time by latency and bandwidth:

    ring        2 (p - 1) (a + n / (p B))         what gloo does
    tree        2 ceil(log2 p) (a + n / B)        what NCCL takes for few bytes
    in a host, then among hosts                   the tree over hosts, between two passes in the host

with a latency a and a bandwidth B of each message, n bytes, p ranks. Beside it stand the reduce-scatter of the gradients
that the same step needs (bfloat16, ring), and the time of the computation. The sums need all gradients of the step, so that
nothing of the collective overlaps with the backward pass; it is all added to the step.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

from agr_hf.environment import environment
from agr_hf.files import replaced_file, write_text

BYTES_A_LAYER = 2 * 8  # two float64 sums
# Of a message in a host and among hosts: seconds and bytes a second. Bandwidths are those of the data sheets: NVLink of an
# H100, 900 GB/s both ways together (nvidia.com/en-us/data-center/h100), and NDR InfiniBand, 400 Gb/s a port. Latencies are
# at the upper end of what is published for NCCL's small messages, 5 us in a host and 10 us with the network in between.
HOST, NETWORK = (5e-6, 450e9), (10e-6, 50e9)
RANKS_A_HOST = 8
# LLaMA's 7B: parameters and tensors; tokens of a rank in a step; what an H100 makes of its 989 Tflop/s in bfloat16.
PARAMETERS, LAYERS, TOKENS, FLOPS = 6.74e9, 291, 8192, 0.4 * 989e12
WORLDS = [2**k for k in range(1, 15)]


def ring(ranks: int, size: float, latency: float, bandwidth: float) -> float:
    """Seconds of an all-reduce of `size` bytes."""
    return 2 * (ranks - 1) * (latency + size / (ranks * bandwidth))


def tree(ranks: int, size: float, latency: float, bandwidth: float) -> float:
    return 2 * math.ceil(math.log2(ranks)) * (latency + size / bandwidth) if ranks > 1 else 0.0


def flat_ring(ranks: int, size: float) -> float:
    """One ring through all hosts: the slowest link sets the pace."""
    return ring(ranks, size, *(HOST if ranks <= RANKS_A_HOST else NETWORK))


def hosts_tree(ranks: int, size: float) -> float:
    """A reduction in each host, the tree among hosts, and back."""
    return tree(min(ranks, RANKS_A_HOST), size, *HOST) + tree(max(1, ranks // RANKS_A_HOST), size, *NETWORK)


def sharded_in_a_host(ranks: int, size: float) -> float:
    """HSDP: replicas have the same gradients after their own all-reduce, and only the ranks that share a layer add up."""
    return tree(min(ranks, RANKS_A_HOST), size, *HOST)


def reduce_scatter(ranks: int, parameters: float) -> float:
    latency, bandwidth = HOST if ranks <= RANKS_A_HOST else NETWORK
    return (ranks - 1) * (latency + 2 * parameters / (ranks * bandwidth))


def calculate() -> list[dict[str, float]]:
    size = LAYERS * BYTES_A_LAYER
    compute = 6 * PARAMETERS * TOKENS / FLOPS
    return [
        {
            "ranks": ranks,
            "bytes": size,
            "messages_ring": 2 * (ranks - 1),
            "messages_tree": 2 * math.ceil(math.log2(ranks)),
            "ring_seconds": flat_ring(ranks, size),
            "tree_seconds": hosts_tree(ranks, size),
            "hsdp_seconds": sharded_in_a_host(ranks, size),
            "reduce_scatter_seconds": reduce_scatter(ranks, PARAMETERS),
            "compute_seconds": compute,
        }
        for ranks in WORLDS
    ]


def measure(worlds: list[int]) -> list[dict[str, float]]:
    """All-reduces on gloo processes here, beside the ring's formula with a latency that two of them show."""
    found = []
    latency = None
    for ranks in sorted({2, *worlds}):
        with tempfile.TemporaryDirectory() as folder:
            context = multiprocessing.get_context("spawn")
            queue = context.Queue()
            workers = [
                context.Process(target=time_all_reduces, args=(rank, ranks, folder, queue)) for rank in range(ranks)
            ]
            for worker in workers:
                worker.start()
            seconds = queue.get(timeout=300)
            for worker in workers:
                worker.join()
        size = LAYERS * BYTES_A_LAYER
        if latency is None:
            latency = seconds / (2 * (ranks - 1))
        found.append({
            "ranks": ranks, "bytes": size, "measured_seconds": seconds, "ring_seconds": ring(ranks, size, latency, 10e9),
        })  # fmt: skip
    return found


def time_all_reduces(rank: int, ranks: int, folder: str, queue: multiprocessing.Queue) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    sums = torch.ones(2 * LAYERS, dtype=torch.float64)
    times = []
    for _ in range(300):
        distributed.barrier()
        start = time.perf_counter()
        distributed.all_reduce(sums)
        times.append(time.perf_counter() - start)
        sums.fill_(1.0)
    if rank == 0:
        queue.put(statistics.median(times[50:]))
    distributed.destroy_process_group()


def draw(rows: list[dict[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), facecolor="white", layout="constrained")
    axes = figure.subplots()
    lines = {
        "compute_seconds": ("the step's computation", "#000000"),
        "reduce_scatter_seconds": ("reduce-scatter of the gradients", "#999999"),
        "ring_seconds": ("sums: one ring through all ranks", "#D55E00"),
        "tree_seconds": ("sums: in the host, then a tree (NCCL)", "#0072B2"),
        "hsdp_seconds": ("sums under HSDP: in the host", "#009E73"),
    }
    for key, (label, color) in lines.items():
        axes.plot([row["ranks"] for row in rows], [1e3 * row[key] for row in rows], color=color, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("ranks")
    axes.set_ylabel("milliseconds (calculated)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    axes.set_title(f"The step's collective: {LAYERS} layers, {PARAMETERS / 1e9:.3g}B parameters")
    with replaced_file(path) as temporary:
        figure.savefig(temporary, dpi=130, facecolor="white", format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--measure", type=int, nargs="+", default=[], metavar="RANKS", help="gloo processes to time here"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "collective.json")
    arguments = parser.parse_args()
    rows = calculate()
    print(
        f"calculated: {LAYERS} layers, {rows[0]['bytes']:,} bytes; "
        f"computation {1e3 * rows[0]['compute_seconds']:.0f} ms a step"
    )
    print(
        f"{'ranks':>6} {'ring ms':>9} {'tree ms':>8} {'HSDP ms':>8} {'reduce-scatter ms':>18} {'tree, % of step':>16}"
    )
    for row in rows:
        step = row["compute_seconds"] + row["reduce_scatter_seconds"]
        print(
            f"{row['ranks']:>6} {1e3 * row['ring_seconds']:>9.3f} {1e3 * row['tree_seconds']:>8.3f} "
            f"{1e3 * row['hsdp_seconds']:>8.3f} {1e3 * row['reduce_scatter_seconds']:>18.1f} "
            f"{100 * row['tree_seconds'] / step:>16.3f}"
        )
    results = {"calculated": rows, "measured": measure(arguments.measure) if arguments.measure else [], **environment()}
    for row in results["measured"]:
        print(
            f"gloo, {row['ranks']} processes on {os.cpu_count()} cores: {1e3 * row['measured_seconds']:.3f} ms, "
            f"by the ring's formula {1e3 * row['ring_seconds']:.3f} ms"
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(arguments.out, json.dumps(results, indent=2) + "\n")
    draw(rows, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
