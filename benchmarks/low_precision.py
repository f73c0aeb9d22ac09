"""Train in bfloat16 and in float32 with AGRAdamW, over seeds: loss and memory of each way to round.

    python benchmarks/low_precision.py
    python benchmarks/low_precision.py --seeds 2 --workloads digits --out digits.json

Two small models that train in seconds on a CPU: the demo's ViT on scikit-learn's digits, and an ALBERT of 0.6 million
parameters on the embedded text. Runs of one seed share initial weights and batches. The losses are of the validation
split, in float32. What is in the JSON already is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AlbertConfig, AlbertForPreTraining, set_seed

from agr_hf import AGRAdamW
from agr_hf.environment import environment
from agr_hf.experiments.paired import compare_paired, give_verdicts
from agr_hf.files import write_text
from agr_hf.tasks.digits import digits_model, load_digits
from agr_hf.tasks.sentence_order import PretrainingCollator, SentenceChunks
from agr_hf.tasks.text import load_articles, train_tokenizer

RESULTS = Path(__file__).parent / "results/low-precision.json"
BASELINE = "float32"
VARIANTS = {
    BASELINE: (torch.float32, {}),
    "float32, first moment bfloat16": (torch.float32, {"state_dtype": torch.bfloat16}),
    "bfloat16 nearest": (torch.bfloat16, {"rounding": "nearest"}),
    "bfloat16 stochastic": (torch.bfloat16, {"rounding": "stochastic"}),
    "bfloat16 kahan": (torch.bfloat16, {"rounding": "kahan"}),
    "bfloat16 stochastic, first moment bfloat16": (
        torch.bfloat16,
        {"rounding": "stochastic", "state_dtype": torch.bfloat16},
    ),
    "bfloat16 kahan, first moment bfloat16": (torch.bfloat16, {"rounding": "kahan", "state_dtype": torch.bfloat16}),
}


class Digits:
    """200 steps of 64 images."""

    lr, steps, batch = 1e-3, 204, 64

    def __init__(self) -> None:
        self.data = load_digits()

    def make_model(self) -> torch.nn.Module:
        return digits_model()

    def batches(self, generator: torch.Generator):
        train = self.data["train"]
        for _ in range(self.steps):
            index = torch.randint(len(train), (self.batch,), generator=generator)
            yield {"pixel_values": train.pixel_values[index], "labels": train.labels[index]}

    def validation(self):
        data = self.data["validation"]
        yield {"pixel_values": data.pixel_values, "labels": data.labels}


class Albert:
    """300 steps of 16 pairs of segments of at most 64 tokens."""

    lr, steps, batch, length = 1e-3, 300, 16, 64

    def __init__(self) -> None:
        articles = {split: load_articles("pydoc-topics", split) for split in ("train", "validation")}
        self.tokenizer = train_tokenizer(articles["train"], 2000)
        self.train = SentenceChunks(articles["train"], self.tokenizer, self.length)
        self.held_out = SentenceChunks(articles["validation"], self.tokenizer, self.length, dynamic=False)
        self.collate = PretrainingCollator(self.tokenizer)

    def make_model(self) -> torch.nn.Module:
        return AlbertForPreTraining(
            AlbertConfig(
                vocab_size=len(self.tokenizer), embedding_size=64, hidden_size=128, num_hidden_layers=4,
                num_attention_heads=4, intermediate_size=512, max_position_embeddings=128,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        )  # fmt: skip

    def batches(self, generator: torch.Generator):
        for step in range(self.steps):
            self.train.set_epoch(step)
            index = torch.randint(len(self.train), (self.batch,), generator=generator).tolist()
            yield self.collate([self.train[i] for i in index])

    def validation(self):
        for start in range(0, len(self.held_out), 64):
            yield self.collate([self.held_out[i] for i in range(start, min(start + 64, len(self.held_out)))])


WORKLOADS = {"digits": Digits, "albert": Albert}


def train(workload, variant: str, seed: int) -> dict:
    """Train once; validation loss, and bytes of a parameter with its gradient and state."""
    dtype, options = VARIANTS[variant]
    set_seed(seed)
    model = workload.make_model().to(dtype)
    optimizer = AGRAdamW(model.parameters(), lr=workload.lr, **options)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, workload.steps)
    start = time.perf_counter()
    model.train()
    for batch in workload.batches(torch.Generator().manual_seed(seed)):
        model(**in_dtype(batch, dtype)).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    numel = sum(param.numel() for param in model.parameters())
    held = sum(2 * param.numel() * param.element_size() for param in model.parameters())
    held += sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if value.ndim
    )
    return {"loss": evaluate(model.float(), workload), "bytes": held / numel, "seconds": seconds}


@torch.no_grad()
def evaluate(model, workload) -> float:
    model.eval()
    losses, sizes = [], []
    for batch in workload.validation():
        losses.append(model(**batch).loss.item())
        sizes.append(len(batch["labels"]))
    return sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes)


def in_dtype(batch, dtype):
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


def summarize(runs: dict, margin: float) -> list[dict]:
    """A row of each variant, compared with float32 over the seeds that both have."""
    rows, compared = [], []
    for variant, by_seed in runs.items():
        if not by_seed:
            continue
        losses = {int(seed): run["loss"] for seed, run in by_seed.items()}
        rows.append(
            {
                "variant": variant,
                "n": len(losses),
                "loss": statistics.fmean(losses.values()),
                "bytes": next(iter(by_seed.values()))["bytes"],
            }
        )
        both = sorted(losses.keys() & {int(seed) for seed in runs.get(BASELINE, {})})
        if variant != BASELINE and both:
            base = [runs[BASELINE][str(seed)]["loss"] for seed in both]
            compared.append(
                (rows[-1], compare_paired([losses[seed] for seed in both], base, margin, lower_is_better=True))
            )
    for (row, _), found in zip(compared, give_verdicts([paired for _, paired in compared]), strict=True):
        # Of the loss: positive is worse than float32.
        row |= {"more_loss": -found.difference, "low": -found.high, "high": -found.low, "verdict": found.verdict}
    return rows


def print_table(name: str, rows: list[dict], margin: float) -> None:
    print(f"\n{name}: validation loss, and what it is above float32 (margin {margin})")
    for row in rows:
        interval = (
            f"{row['more_loss']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}] {row['verdict']}" if "low" in row else ""
        )
        print(f"{row['variant']:44s} n={row['n']:<3d}{row['bytes']:5.1f} bytes  {row['loss']:.4f}  {interval}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument(
        "--margin", type=float, default=0.02, help="a difference of the loss that does not matter (0.02)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"workloads": {}}
    for name in arguments.workloads:
        workload = WORKLOADS[name]()
        runs = results["workloads"].setdefault(name, {"runs": {}})["runs"]
        for seed in range(arguments.seeds):
            for variant in arguments.variants:
                if str(seed) in runs.setdefault(variant, {}):
                    continue
                runs[variant][str(seed)] = train(workload, variant, seed)
                print(f"{name} seed {seed} {variant}: {runs[variant][str(seed)]}", flush=True)
                results |= {"environment": environment(), "margin": arguments.margin}
                write_text(arguments.out, json.dumps(results, indent=1) + "\n")
        results["workloads"][name]["table"] = summarize(runs, arguments.margin)
        print_table(name, results["workloads"][name]["table"], arguments.margin)
    write_text(arguments.out, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
