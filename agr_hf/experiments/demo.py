"""The demo: AdamW, AdamW(AGR) and AdaL train the same small ViT on real digits, three seeds each."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from agr_hf.environment import environment
from agr_hf.files import replaced_file, replaced_folder, write_text
from agr_hf.optim.registry import create_optimizer, optimizer_info
from agr_hf.optim.statistics import gradient_statistics
from agr_hf.tasks.digits import digits_model, load_digits

OPTIMIZERS = ("adamw", "agr_adamw", "adal")
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.01
BATCH_SIZE = 64
MEASURE_EVERY = 10  # steps between measurements of AGR's effect


@dataclass
class Run:
    """One optimizer with one seed. `curve` has a dict for each epoch; losses in nats, accuracies from 0 to 1."""

    optimizer: str
    seed: int
    seconds: float = 0.0
    validation_accuracy: float = 0.0
    test_accuracy: float = 0.0
    test_loss: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    effects: dict[str, list[float]] = field(default_factory=dict)


class Watch(TrainerCallback):
    """Moves the progress bar, and measures what AGR takes from each layer's gradient."""

    def __init__(self, run: Run, bar: Any, regularized: set[str]) -> None:
        self.run, self.bar, self.regularized = run, bar, regularized

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.regularized and state.global_step % MEASURE_EVERY == 0:
            model: torch.nn.Module = kwargs["model"]
            grads = ((n, p.grad) for n, p in model.named_parameters() if n in self.regularized and p.grad is not None)
            for name, found in gradient_statistics(grads).items():
                self.run.effects.setdefault(name, []).append(found.effect)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update()


def train_once(name: str, seed: int, epochs: int, bar: Any) -> tuple[Run, PreTrainedModel]:
    """Train one model through Trainer; the seed decides its initialisation and the order of the data alike."""
    data = load_digits()
    set_seed(seed)
    model = digits_model()
    # AdaL's own decay is L2; decoupled like the others', only what each does to the gradient differs.
    options = {"decoupled": True} if name == "adal" else {}
    optimizer = create_optimizer(name, model, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, **options)
    run = Run(name, seed)
    regularized = {param for group in optimizer.param_groups if group.get("agr") for param in group["params"]}
    watch = Watch(run, bar, {n for n, p in model.named_parameters() if p in regularized})
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=360,
            eval_strategy="epoch",
            logging_strategy="epoch",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=seed,
        )
        steps = epochs * -(-len(data["train"]) // BATCH_SIZE)
        scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=data["train"],
            eval_dataset=data["validation"],
            compute_metrics=accuracy,
            callbacks=[watch],
            optimizers=(optimizer, scheduler),
        )
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        run.seconds = time.perf_counter() - start
        test = trainer.predict(data["test"], metric_key_prefix="test").metrics or {}
        validation = trainer.evaluate()
    run.validation_accuracy = validation["eval_accuracy"]
    run.test_accuracy, run.test_loss = test["test_accuracy"], test["test_loss"]
    run.curve = curve_of(trainer.state.log_history)
    return run, model


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def curve_of(log: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    epochs: dict[float, dict[str, float]] = {}
    names = {"loss": "train_loss", "eval_loss": "validation_loss", "eval_accuracy": "validation_accuracy"}
    for entry in log:
        found = {names[key]: value for key, value in entry.items() if key in names}
        if found:
            epochs.setdefault(entry["epoch"], {"epoch": entry["epoch"]}).update(found)
    return list(epochs.values())


def demo(output: Path, seeds: int = 3, epochs: int = 20, say: Callable[[str], None] = print) -> None:
    """Train, print the tables, and write `table.md`, `results.json`, `curves.png` and `models/` under `output`.

    Args:
        output: folder for the results; files of an earlier demo there are replaced.
        seeds: how many seeds, counted from 0, each optimizer runs with. At least 1.
        epochs: passes over the 1,077 training images. At least 1.
        say: takes the lines for the user.
    """
    output.mkdir(parents=True, exist_ok=True)  # or fail before the training, not after it
    transformers_logging.disable_progress_bar()  # ours is the one to look at
    runs: list[Run] = []
    steps = epochs * -(-1077 // BATCH_SIZE)
    with tqdm(total=len(OPTIMIZERS) * seeds * steps, unit="step", desc="demo") as bar:
        for name in OPTIMIZERS:
            best: tuple[float, PreTrainedModel] | None = None
            for seed in range(seeds):
                bar.set_postfix_str(f"{optimizer_info(name).title}, seed {seed}")
                run, model = train_once(name, seed, epochs, bar)
                runs.append(run)
                # By the validation images: the test images say how good it is, not which it is.
                if best is None or run.validation_accuracy > best[0]:
                    best = run.validation_accuracy, model
            if best is not None:
                with replaced_folder(output / "models" / name) as folder:
                    best[1].save_pretrained(folder)
    table = results_table(runs)
    effects = effects_table(runs)
    text = (
        f"{table}\n\nThe same initial weights and the same batches for each seed; "
        f"{seeds} seeds, {epochs} epochs, lr {LEARNING_RATE:g}, decoupled weight decay {WEIGHT_DECAY:g}, cosine "
        f"schedule. Mean ± standard deviation over seeds; 360 test images, so one image is 0.28%.\n\n"
        f"What AGR took from the gradients, ‖Ψ(g) − g‖ / ‖g‖, every {MEASURE_EVERY} steps:\n\n{effects}\n"
    )
    write_text(output / "table.md", text)
    results = {"task": "digits", "runs": [asdict(run) for run in runs], "epochs": epochs, **settings(), **environment()}
    write_text(output / "results.json", json.dumps(results, indent=2) + "\n")
    plot_curves(runs, output / "curves.png")
    say("\n" + text)
    say("Written to:")
    for name in ("table.md", "results.json", "curves.png"):
        say(f"  {output / name}")
    for name in OPTIMIZERS:
        say(f"  {output / 'models' / name}  (AutoModelForImageClassification.from_pretrained loads it)")


def settings() -> dict[str, Any]:
    return {"learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "batch_size": BATCH_SIZE}


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def results_table(runs: Sequence[Run]) -> str:
    rows = ["| optimizer | test accuracy (%) | test loss | seconds a run |", "| --- | --- | --- | --- |"]
    for name in dict.fromkeys(run.optimizer for run in runs):
        mine = [run for run in runs if run.optimizer == name]
        rows.append(
            f"| {optimizer_info(name).title} | {mean_and_deviation([100 * run.test_accuracy for run in mine], 2)} "
            f"| {mean_and_deviation([run.test_loss for run in mine], 4)} "
            f"| {mean_and_deviation([run.seconds for run in mine], 1)} |"
        )
    return "\n".join(rows)


def effects_table(runs: Sequence[Run]) -> str:
    """AGR's effect by layer, over all measurements of all seeds."""
    effects: dict[str, list[float]] = {}
    for run in runs:
        for layer, found in run.effects.items():
            effects.setdefault(layer, []).extend(found)
    rows = ["| layer | median | largest |", "| --- | --- | --- |"]
    for layer, found in effects.items():
        rows.append(f"| {layer} | {statistics.median(found):.1e} | {max(found):.1e} |")
    return "\n".join(rows)


def plot_curves(runs: Sequence[Run], path: Path) -> None:
    """Training loss, validation loss and validation accuracy by epoch: the mean of the seeds, and their range."""
    from matplotlib.figure import Figure

    panels = {
        "train_loss": "training loss",
        "validation_loss": "validation loss",
        "validation_accuracy": "validation accuracy",
    }
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for name in dict.fromkeys(run.optimizer for run in runs):
            curves = [[point[key] for point in run.curve] for run in runs if run.optimizer == name]
            columns = list(zip(*curves, strict=True))
            epochs = range(1, len(columns) + 1)
            axes.plot(epochs, [statistics.mean(column) for column in columns], label=optimizer_info(name).title)
            axes.fill_between(epochs, [min(c) for c in columns], [max(c) for c in columns], alpha=0.2)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        if key != "validation_accuracy":
            axes.set_yscale("log")
    axes.legend()
    with replaced_file(path) as temporary:
        figure.savefig(temporary, dpi=120, metadata={"Software": "agr_hf"})
