"""Claims about training, each a comparison over paired seeds (`agr-hf compare`), and what the runs' curves add to it."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from agr_hf.errors import UserError
from agr_hf.experiments.claims.claim import Claim, Finding, Setting
from agr_hf.experiments.compare import compare
from agr_hf.experiments.comparison import Cell, plan_comparison
from agr_hf.experiments.paired import Paired, compare_metric, give_verdicts, is_percent, pair_metric
from agr_hf.experiments.report import label
from agr_hf.experiments.results import read_metrics
from agr_hf.tasks.runs import lower_is_better
from agr_hf.texts import public


@dataclass(frozen=True)
class Expected:
    """What a claim says of two optimizers: the first is better in a metric of the run, or of its epochs (`CURVES`)."""

    optimizer: str
    baseline: str
    metric: str
    settings: Mapping[str, str] = field(default_factory=dict)


def train_mean(epochs: Sequence[Mapping[str, Any]]) -> float:
    """Mean of the training loss over all epochs: smaller where training is faster."""
    return statistics.fmean(epoch["train_loss"] for epoch in epochs)


def roughness(epochs: Sequence[Mapping[str, Any]]) -> float:
    """Deviation of the change of the test accuracy from one epoch to the next, in the later half."""
    later = [epoch["accuracy"] for epoch in epochs[len(epochs) // 2 :]]
    return statistics.stdev(b - a for a, b in pairwise(later))


CURVES = {"train_loss_mean": train_mean, "roughness_error": roughness}


def measure(setting: Setting) -> dict[str, Any]:
    """Run the comparison, or go on with it, and keep the values of the pairs that the claim is about."""
    options, expected = setting.options, setting.options["expected"]
    names = list(dict.fromkeys(name for of in expected for name in (of.baseline, of.optimizer)))
    comparison = plan_comparison(
        options["task"], names, setting.seeds, options.get("set", ()), options.get("margin", 0.2), names[0],
        [*options["arguments"], *setting.arguments], options.get("search", ()), options.get("trials"),
        options.get("tuned_by"),
    )  # fmt: skip
    output = setting.output / options["folder"]
    found = compare(comparison, output, workers=setting.workers)
    for cell in comparison.cells:
        _check_suspension(output / "runs" / cell.name / "seed-0", cell)
    rows = []
    for of in expected:
        cells = [Cell(name, tuple(of.settings.items())) for name in (of.optimizer, of.baseline)]
        runs, baseline = (
            {seed: {of.metric: _value(output, cell, seed, of.metric)} for seed in range(setting.seeds)}
            for cell in cells
        )
        pair = pair_metric(of.metric, runs, baseline, comparison.margin)
        kept = pair[0] if pair else {"seeds": [], "values": [], "baseline_values": []}
        rows.append({
            "optimizer": of.optimizer, "baseline": of.baseline, "metric": of.metric, "settings": dict(of.settings),
            **{key: kept[key] for key in ("seeds", "values", "baseline_values")},
            "diverged": setting.seeds - len(kept["seeds"]),
        })  # fmt: skip
    words = [*options["arguments"], *map(public, setting.arguments)]  # the last of two counts
    return {"task": options["task"], "arguments": words, "margin": comparison.margin,
            "search": found["search"], "rows": rows}  # fmt: skip


def _check_suspension(folder: Path, cell: Cell) -> None:
    """Refuse a comparison of a suspension that never came."""
    given = re.search(r"\bagr_steps=(\d+)", cell.optimizer)
    epochs = json.loads((folder / "results.json").read_text())["epochs"] if given else []
    if given and epochs and int(given[1]) >= (last := epochs[-1].get("step", math.inf)):
        raise UserError(
            f"{cell.optimizer} suspends AGR after {given[1]} steps, and its runs end after {last}: nothing was measured; "
            "leave arguments that shorten the training out"
        )


def _value(output: Path, cell: Cell, seed: int, metric: str) -> float | None:
    folder = output / "runs" / cell.name / f"seed-{seed}"
    if metric in CURVES:
        return CURVES[metric](json.loads((folder / "results.json").read_text())["epochs"])
    return (read_metrics(folder) or {}).get(metric)


def paired(found: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], Paired]]:
    """The rows of a measurement with their verdicts, from the values alone."""
    rows = [
        compare_metric(row["metric"], row["values"], row["baseline_values"], found["margin"]) for row in found["rows"]
    ]
    return list(zip(found["rows"], give_verdicts(rows), strict=True))


def judge(found: Mapping[str, Any], *, equal: bool = False) -> Finding:
    """The claim is that every row is better; with `equal`, that every row is the same within the margin."""
    rows = paired(found)
    verdicts = [row.verdict for _, row in rows]
    good = [("equivalent" in v or "within the margin" in v) if equal else v == "better" for v in verdicts]
    bad = [
        v in ("better", "worse") if equal else v.startswith(("worse", "equivalent", "better, but")) for v in verdicts
    ]
    if all(good):
        verdict = "confirmed"
    elif all(bad):
        verdict = "contradicted"
    elif any(good) or any(v == "worse" for v in verdicts):
        verdict = "in part" if any(good) else "contradicted"
    else:
        verdict = "cannot tell"
    words = [sentence(row, of) for row, of in rows]
    if found.get("search"):
        tuned = found["search"]["tuned"].items()
        rates = [f"{label({'optimizer': name, 'settings': {}})} {of['learning_rate']:g}" for name, of in tuned]
        words.append(f"searched rates: {', '.join(rates)}")
    return Finding(verdict, "; ".join(words), n=min(of.n for _, of in rows))


WORDS = {
    "accuracy": "test accuracy, points", "loss": "test loss", "train_loss_mean": "mean training loss",
    "roughness_error": "deviation of the accuracy's changes", "frechet_distance_pixels": "Fréchet distance of pixels",
    "sop_accuracy": "sentence-order accuracy, points", "perplexity": "perplexity",
}  # fmt: skip


def sentence(row: Mapping[str, Any], of: Paired) -> str:
    """The difference as the metric has it: of a loss, positive is worse."""
    form, sign = ("+.2f" if is_percent(row["metric"]) else "+.2g"), (-1 if lower_is_better(row["metric"]) else 1)
    low, high = sorted((sign * of.low, sign * of.high))
    return (
        f"{label(row)} minus {label({**row, 'optimizer': row['baseline']})}, "
        f"{WORDS.get(row['metric'], row['metric'])}: {sign * of.difference + 0.0:{form}} "  # no -0
        f"({'no interval' if math.isnan(low) else f'{low:{form}} to {high:{form}}'}), {of.verdict}"
    )


AGR, RULE = "agr_adamw", "agr_adamw,second_moment=regularized,min_ndim=0"
# 20 epochs of 17 steps; suspended after 5/6 of them, as 250 of 300 epochs are in the paper.
SUSPENDED = "agr_adamw,agr_steps=283"
QUIET = "--disable_tqdm True --dataloader_pin_memory False --save_strategy no --gradient_statistics_every 0".split()
VIT = "--model_name vit-micro --num_train_epochs 20 --per_device_eval_batch_size 360".split()
DIGITS = [
    *VIT,
    *"--learning_rate 2e-3 --weight_decay 0.01 --lr_scheduler_type cosine --warmup_steps 17".split(),
    *QUIET,
]
ADAL = [*VIT, *"--weight_decay 5e-4 --lr_milestones 7 14 --max_grad_norm 0".split(), *QUIET]
CNN = ["--model_name", "resnet-micro", *ADAL[2:]]
CIFAR = [
    *"--dataset_name cifar10 --image_size 16 --max_train_samples 4000".split(),
    *"--model_name resnet-micro --num_train_epochs 8".split(),
    *"--learning_rate 2e-3 --weight_decay 5e-4 --lr_scheduler_type cosine --augmentation flip-crop".split(), *QUIET,
]  # fmt: skip
# Sentence order leaves chance within two epochs of 2 MB of text so.
ALBERT = [
    *"--num_train_epochs 2 --max_seq_length 64 --vocab_size 4000 --per_device_train_batch_size 32".split(),
    *"--learning_rate 2e-3 --warmup_steps 0.06".split(), *QUIET,
]  # fmt: skip
DDPM = [
    *"--recipe digits --num_epochs 10 --ddpm_num_inference_steps 50 --num_eval_samples 250".split(),
    *"--gradient_statistics_every 0 --save_images_epochs 1000 --checkpointing_steps 100000".split(),
]  # fmt: skip
DECAYS = ("0", "2e-4", "5e-4", "1e-3", "1e-2")
PAPER = "--eval_strategy epoch --save_strategy epoch".split()


def setting(
    seeds: int, task: str, folder: str, arguments: Sequence[str], expected: Sequence[Expected], **options: Any
) -> Setting:
    return Setting(
        seeds, {"task": task, "folder": folder, "arguments": list(arguments), "expected": expected, **options}
    )


def versus(optimizer: str, baselines: Sequence[str], metric: str, **settings: str) -> list[Expected]:
    return [Expected(optimizer, baseline, metric, settings) for baseline in baselines]


ADAL_RIVALS = ("sgd", "adam", "amsgrad", "nosadam")
DDPM_RIVALS = ("adan", "adamw", "adam", "rmsprop", "acprop")
MODELS = ("swin-t", "swin-s", "convnext-t", "tinyvit-11m")
RATES = {"search": ["learning_rate=0.01,0.001,0.0001"], "trials": 3}
FIVE_DECAYS = {"set": [f"weight_decay={','.join(DECAYS)}"]}
DECAY_ROWS = [Expected(AGR, "adamw", m, {"weight_decay": d}) for m in ("sop_accuracy", "perplexity") for d in DECAYS]
BETTER = versus(AGR, ["adamw"], "accuracy")


def _claim(
    name: str, paper: str, where: str, says: str, sizes: Mapping[str, Setting], *, equal: bool = False, better: str = ""
) -> Claim:
    confirmed = better or "better than each, by more than lies within the margin, in the whole table (Holm, 5%)"
    contradicted = "worse, or within the margin"
    if equal:
        confirmed, contradicted = "equivalent within the margin", "a difference beyond the margin"
    return Claim(name, paper, where, says, confirmed, contradicted, measure, partial(judge, equal=equal), sizes)


def _adal(metric: str, folder: str) -> dict[str, Setting]:
    """The rate is searched by the metric of the claim."""
    rows, options = versus("adal", ADAL_RIVALS, metric), {**RATES, "tuned_by": metric}
    return {
        "small": setting(32, "images", folder, CNN, rows, **options),
        "published": setting(4, "images", f"{folder}-published", ["--recipe", "adal-cifar10", *PAPER], rows, **options),
    }


CLAIMS = [
    _claim(
        "agr-digits", "AGR", "section 5.3", "AdamW(AGR) trains classifiers better than AdamW (here a ViT on digits)",
        {"small": setting(150, "images", "digits", DIGITS, BETTER)},
    ),
    _claim(
        "agr-cifar", "AGR", "section 5.3.1, figures 2 and 3", "AdamW(AGR) trains CNNs on CIFAR better than AdamW",
        {
            "small": setting(16, "images", "cifar", CIFAR, BETTER),
            "published": setting(4, "images", "cifar-published", ["--recipe", "agr-cifar100", *PAPER], BETTER),
        },
    ),
    _claim(
        "agr-tiny-imagenet", "AGR", "tables 3 and 4", "AdamW(AGR) trains Swin, ConvNeXt and TinyViT better than AdamW",
        {
            "published": setting(
                4, "images", "tiny-imagenet-published", ["--recipe", "agr-tiny-imagenet", *PAPER],
                [Expected(AGR, "adamw", "accuracy", {"model_name": model}) for model in MODELS],
                set=[f"model_name={','.join(MODELS)}"],
            ),
        },
    ),
    _claim(
        "agr-faster-smoother", "AGR", "sections 4 and 5", "training is faster and smoother with AGR",
        {"small": setting(150, "images", "digits", DIGITS, [
            *versus(AGR, ["adamw"], "train_loss_mean"), *versus(AGR, ["adamw"], "roughness_error")])},
        better="a smaller mean training loss and a steadier test accuracy",
    ),
    _claim(
        "agr-suspended", "AGR", "table 7", "suspending AGR late is better than not",
        {
            # The loss: accuracies are the same in every seed, so small is the difference.
            "small": setting(64, "images", "digits", DIGITS, versus(SUSPENDED, [AGR], "loss")),
            "published": setting(
                4, "images", "suspended-published",
                ["--recipe", "agr-tiny-imagenet", "--model_name", "tinyvit-11m", *PAPER],
                versus("agr_adamw,agr_steps=97750", [AGR], "accuracy"),
            ),
        },
    ),
    _claim(
        "agr-ddpm", "AGR", "tables 1 and 2", "Adan(AGR) trains a DDPM better than five other optimizers",
        {
            "small": setting(8, "ddpm", "ddpm", DDPM, versus("agr_adan", DDPM_RIVALS, "frechet_distance_pixels")),
            "published": setting(
                4, "ddpm", "ddpm-published", ["--recipe", "agr-ddpm", "--fid"], versus("agr_adan", DDPM_RIVALS, "fid")
            ),
        },
    ),
    _claim(
        "agr-albert", "AGR", "table 6", "AdamW(AGR) trains ALBERT better than AdamW at each of five weight decays",
        {
            "small": setting(8, "albert", "albert", ALBERT, DECAY_ROWS, **FIVE_DECAYS),
            "published": setting(
                4, "albert", "albert-published", ["--recipe", "agr-albert", "--dataset_name", "Salesforce/wikitext"],
                DECAY_ROWS, **FIVE_DECAYS,
            ),
        },
    ),
    _claim(
        "adal-accuracy", "AdaL", "section 3.2, figures 5 to 8",
        "AdaL reaches a better test accuracy than SGD, Adam, AMSGrad and NosAdam", _adal("accuracy", "adal-accuracy"),
    ),
    _claim(
        "adal-loss", "AdaL", "section 3.2, figures 5 to 8",
        "AdaL reaches a lower test loss than SGD, Adam, AMSGrad and NosAdam", _adal("loss", "adal-loss"),
    ),
    _claim(
        "adal-vit", "agr_hf", "AdaL's section 3.2, on another network",
        "AdaL reaches a better test accuracy than SGD, Adam, AMSGrad and NosAdam with a ViT too",
        {"small": setting(32, "images", "adal", ADAL, versus("adal", ADAL_RIVALS, "accuracy"), **RATES)},
    ),
    _claim(
        "rule", "agr_hf", "algorithm 2 against the authors' code",
        "the paper's rule and the authors' code (Ψ in both moments, on every tensor) train alike",
        {"small": setting(64, "images", "digits", DIGITS, versus(RULE, [AGR], "accuracy"))}, equal=True,
    ),
    _claim(
        "scope", "agr_hf", "agr_hf/experiments/scope.py",
        "Ψ over an output channel, or over blocks of 64 or 512 elements, trains better than over the whole tensor",
        {"small": setting(64, "images", "digits", DIGITS, [
            Expected(f"agr_hf.experiments.scope:ScopedAGRAdamW,scope={scope}", AGR, "accuracy")
            for scope in ("channel", "64", "512")])},
    ),
]  # fmt: skip
