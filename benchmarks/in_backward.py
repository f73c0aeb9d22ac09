"""Memory and time of a training step of BERT-base with the step inside of the backward pass, and after it.

    python benchmarks/in_backward.py

Each way runs in a process of its own, which reports the most memory that it had (resident on a CPU, allocated on a GPU).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM

from agr_hf import AGRAdamW, step_in_backward
from agr_hf.environment import environment
from agr_hf.files import write_text

RESULTS = Path(__file__).parent / "results/in-backward.json"
TOKENS = 32


def train(inside: bool, steps: int, device: str, threads: int, queue) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig()).to(device)
    optimizer = AGRAdamW(model.parameters())
    if inside:
        step_in_backward(optimizer)
    ids = torch.randint(1000, 30_000, (1, TOKENS), device=device)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    numel = sum(param.numel() for param in model.parameters())
    queue.put({"peak_mib": peak / 2**20, "seconds": statistics.median(seconds[2:]), "parameters": numel})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rows = {}
    for name, inside in (("after the backward pass", False), ("inside of it", True)):
        queue = context.Queue()
        given = (inside, arguments.steps, arguments.device, arguments.threads, queue)
        process = context.Process(target=train, args=given)
        process.start()
        rows[name] = queue.get()
        process.join()
        print(f"{name:24s} {rows[name]['peak_mib']:8.0f} MiB at most, {1000 * rows[name]['seconds']:.0f} ms a step")
    results = {"ways": rows, "tokens": TOKENS, **environment(torch.device(arguments.device))}
    write_text(arguments.out, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
