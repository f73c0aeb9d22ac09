"""The demo: AdamW, AdamW(AGR) and AdaL train the same small ViT on scikit-learn's 8x8 digits, three seeds each."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from agr_hf.files import replaced_file, replaced_folder, write_text
from agr_hf.optim.registry import optimizer_info
from agr_hf.tasks.classifiers import classifier
from agr_hf.tasks.digits import load_digits
from agr_hf.tasks.images import classification_metrics
from agr_hf.tasks.record import RunRecord, argument_words
from agr_hf.tasks.runs import describe_dataset
from agr_hf.tasks.trainer_run import TrainerRun, trainer_parser

OPTIMIZERS = ("adamw", "agr_adamw", "adal")
ARGUMENTS: dict[str, Any] = {
    "learning_rate": 2e-3, "weight_decay": 0.01, "lr_scheduler_type": "cosine", "warmup_steps": 0.05,
    "per_device_train_batch_size": 64, "per_device_eval_batch_size": 360, "save_strategy": "no", "disable_tqdm": True,
    "dataloader_pin_memory": torch.cuda.is_available(), "gradient_statistics_every": 0,
}  # fmt: skip
MEASURE_EVERY = 10  # steps between measurements of AGR's effect
OWN: dict[str, dict[str, Any]] = {
    "agr_adamw": {"gradient_statistics_every": MEASURE_EVERY},
    # AdaL's own decay is L2; decoupled like the others', only what each does to the gradient differs.
    "adal": {"optim_args": "decoupled=true"},
}


class Progress(TrainerCallback):
    """Moves a progress bar of steps."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.bar.update()


def train_once(name: str, seed: int, epochs: int, bar: Any) -> tuple[RunRecord, PreTrainedModel]:
    """Train one model as the scripts do; the seed decides its initialisation and the order of the data alike."""
    bar.set_postfix_str(f"{optimizer_info(name).title}, seed {seed}")
    own = {"optim": name, "seed": seed, "num_train_epochs": epochs, **OWN.get(name, {})}
    with tempfile.TemporaryDirectory() as folder:
        words = argument_words({**ARGUMENTS, **own, "output_dir": folder})
        run = TrainerRun(__file__, trainer_parser(__doc__, recipes={}), words)
        data = load_digits()
        model = classifier("vit-micro", 8, 1, [str(digit) for digit in range(10)], (), ())
        found = run.train(
            model, data["train"], data["validation"], classification_metrics, callbacks=[Progress(bar)],
            without=[PrinterCallback],
        )  # fmt: skip
        test = run.trainer.evaluate(data["test"], metric_key_prefix="test")
    metrics = {f"validation_{key}": found[key] for key in ("accuracy", "loss")}
    metrics |= {key: test[key] for key in ("test_accuracy", "test_loss")}
    dataset = describe_dataset("digits", len(data["train"]), split="test", evaluated=len(data["test"]))
    return run.record("demo", metrics, dataset), model


def demo(output: Path, seeds: int = 3, epochs: int = 20) -> None:
    """Train, print the tables, and write `table.md`, `results.json`, `curves.png` and `models/` under `output`.

    Args:
        output: folder for the results; files of an earlier demo there are replaced.
        seeds: how many seeds, counted from 0, each optimizer runs with. At least 1.
        epochs: passes over the 1,077 training images. At least 1.
    """
    output.mkdir(parents=True, exist_ok=True)  # or fail before the training, not after it
    import matplotlib  # noqa: F401
    import sklearn  # noqa: F401

    transformers_logging.disable_progress_bar()  # ours is the one to look at
    runs: list[RunRecord] = []
    steps = epochs * -(-1077 // ARGUMENTS["per_device_train_batch_size"])
    with tqdm(total=len(OPTIMIZERS) * seeds * steps, unit="step", desc="demo") as bar:
        for name in OPTIMIZERS:
            made = [train_once(name, seed, epochs, bar) for seed in range(seeds)]
            runs += [run for run, _ in made]
            # By the validation images: the test images say how good it is, not which it is.
            _, best = max(made, key=lambda one: metric(one[0], "validation_accuracy"))
            with replaced_folder(output / "models" / name) as folder:
                best.save_pretrained(folder)
    rate, decay = ARGUMENTS["learning_rate"], ARGUMENTS["weight_decay"]
    text = (
        f"{results_table(runs)}\n\nscikit-learn's 8x8 images of handwritten digits: 1,077 to train on, 360 for the curves "
        "(validation), and 360 others for this table (test), so one image is 0.28%. The same initial weights and the same "
        f"batches for each seed; {seeds} seeds, {epochs} epochs, lr {rate:g}, decoupled weight decay {decay:g}, cosine "
        "schedule. Mean ± standard deviation over seeds. In curves.png lines are means of the seeds, and bands reach from "
        "the lowest seed to the highest.\n\n"
        f"What AGR took from the gradients, ‖Ψ(g) − g‖ / ‖g‖ in percent, every {MEASURE_EVERY} steps:\n\n"
        f"{effects_table(runs)}\n"
    )
    write_text(output / "table.md", text)
    write_text(output / "results.json", json.dumps({"runs": [asdict(run) for run in runs]}, indent=2) + "\n")
    plot_curves(runs, output / "curves.png")
    print(f"\n{text}\nWritten to:")
    for name in ("table.md", "results.json", "curves.png"):
        print(f"  {output / name}")
    for name in OPTIMIZERS:
        print(f"  {output / 'models' / name}  (AutoModelForImageClassification.from_pretrained loads it)")
    # Of an environment that is not activated a shell does not find the command.
    command = "agr-hf" if shutil.which("agr-hf") else os.path.relpath(Path(sys.executable).with_name("agr-hf"))
    print("\nNext:")
    print(
        f"  {command} inspect {output / 'models' / 'agr_adamw'}   what AGR does to each layer; or of a model of yours"
    )
    print(f"  {command} run your_script.py --optim agr_adamw ...   train it with AdamW(AGR), the script unchanged")
    print(
        f"  {command} compare your_script.py --optim adamw_torch agr_adamw --seeds 8 --output comparison   does it help?"
    )


def metric(run: RunRecord, name: str) -> float:
    """A metric of a run; NaN where it was not finite."""
    value = run.metrics[name]
    return float("nan") if value is None else float(value)


def mean_and_deviation(values: Sequence[Any], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def results_table(runs: Sequence[RunRecord]) -> str:
    rows = ["| optimizer | test accuracy (%) | test loss | seconds a run |", "| --- | --- | --- | --- |"]
    for name in dict.fromkeys(run.optimizer for run in runs):
        mine = [run for run in runs if run.optimizer == name]
        accuracies = mean_and_deviation([100 * metric(run, "test_accuracy") for run in mine], 2)
        losses = mean_and_deviation([metric(run, "test_loss") for run in mine], 4)
        seconds = mean_and_deviation([run.seconds for run in mine], 1)
        rows.append(f"| {optimizer_info(name).title} | {accuracies} | {losses} | {seconds} |")
    return "\n".join(rows)


def effects_table(runs: Sequence[RunRecord]) -> str:
    """AGR's effect by layer: the mean of all measurements of all seeds, and the largest share of one element."""
    layers: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        if run.gradients:
            for layer, found in {**run.gradients["layers"], "overall": run.gradients["overall"]}.items():
                layers.setdefault(layer, []).append(found)
    rows = ["| layer | effect (%) | largest share of one element (%) |", "| --- | --- | --- |"]
    for layer, of in layers.items():
        effect = statistics.mean(found["effect"] for found in of)
        rows.append(f"| {layer} | {100 * effect:.2g} | {100 * max(found['largest_share'] for found in of):.2g} |")
    return "\n".join(rows)


def plot_curves(runs: Sequence[RunRecord], path: Path) -> None:
    """Training loss, validation loss and validation accuracy by epoch: the mean of the seeds, and their range."""
    from matplotlib.figure import Figure

    panels = {"train_loss": "training loss", "loss": "validation loss", "accuracy": "validation accuracy (%)"}
    figure = Figure(figsize=(12, 4), layout="constrained")
    figure.suptitle("Lines: mean of the seeds. Bands: from the lowest seed to the highest.", fontsize=10)
    for axes, (key, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for name in dict.fromkeys(run.optimizer for run in runs):
            points = [[point[key] for point in run.epochs] for run in runs if run.optimizer == name]
            curves = numpy.array(points, float) * (100 if key == "accuracy" else 1)  # None, of no finite number, is NaN
            epochs = range(1, curves.shape[1] + 1)
            axes.plot(epochs, curves.mean(0), label=optimizer_info(name).title)
            axes.fill_between(epochs, curves.min(0), curves.max(0), alpha=0.2)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        if key == "accuracy":
            axes.set_ylim(0, 100)
        else:
            axes.set_yscale("log")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(OPTIMIZERS))
    with replaced_file(path) as temporary:
        figure.savefig(temporary, dpi=120, metadata={"Software": "agr_hf"})
