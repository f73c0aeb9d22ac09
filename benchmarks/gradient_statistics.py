"""What GradientStatistics costs: the time of one measurement against that of one training step.

    python benchmarks/gradient_statistics.py [--model resnet18] [--batch-size 16] [--rounds 15] [--threads 2] [--out FILE]

Steps and measurements are interleaved. The share is measurement / (every * step): what a run pays on average.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import timm
import torch

from agr_hf import create_optimizer
from agr_hf.environment import environment
from agr_hf.files import write_text
from agr_hf.integrations.callbacks import GradientStatistics
from agr_hf.optim.statistics import agr_gradients, gradient_statistics


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="a timm architecture (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = timm.create_model(arguments.model, num_classes=100).to(arguments.device)
    optimizer = create_optimizer("agr_adamw", model)
    images = torch.randn(arguments.batch_size, 3, arguments.image_size, arguments.image_size, device=arguments.device)
    labels = torch.randint(100, (arguments.batch_size,), device=arguments.device)

    def step():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    def measure():
        gradient_statistics(agr_gradients(model, optimizer))

    def timed(function):
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    step()
    rounds = [(timed(step), timed(measure)) for _ in range(arguments.rounds)]
    ratio = statistics.median(m / s for s, m in rounds)
    every = GradientStatistics().every
    results = {
        "model": arguments.model,
        "batch_size": arguments.batch_size,
        "image_size": arguments.image_size,
        "rounds": arguments.rounds,
        "step_ms": 1e3 * statistics.median(s for s, _ in rounds),
        "measurement_ms": 1e3 * statistics.median(m for _, m in rounds),
        "measurement_over_step": ratio,
        "share_at_default_interval": ratio / every,
        "budget": 0.02,
        **environment(torch.device(arguments.device)),
    }
    print(f"{arguments.model}, {arguments.batch_size} images of {arguments.image_size}x{arguments.image_size}, "
          f"{results['device']}, {torch.get_num_threads()} threads, medians of {arguments.rounds} rounds")  # fmt: skip
    print(f"step {results['step_ms']:.1f} ms, measurement {results['measurement_ms']:.1f} ms: {ratio:.2f} of a step; "
          f"every {every} steps {100 * ratio / every:.2f}% (budget 2%)")  # fmt: skip
    if arguments.out:
        write_text(arguments.out, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
