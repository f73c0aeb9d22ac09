"""What every run leaves behind: `results.json`, with all that is needed to judge and to repeat it."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agr_hf.experiments.environment import environment
from agr_hf.files import write_text


def write_results(
    output_dir: str | os.PathLike[str],
    *,
    task: str,
    optimizer: str,
    seed: int,
    config: Mapping[str, Any],
    epochs: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Write `results.json`, whole or not at all, and return what it holds.

    Args:
        output_dir: the run's folder.
        task: "image-classification", "albert" or "ddpm".
        optimizer: its name in `list_optimizers()`.
        seed: of the run.
        config: every argument of the run that is not a path.
        epochs: one mapping for each epoch or evaluation, with its "epoch" (or "step") and metrics.
        metrics: at the end.
        seconds: of training.
    """
    results = {
        "task": task,
        "optimizer": optimizer,
        "seed": seed,
        "command": command(),
        "commit": commit(),
        "seconds": seconds,
        "metrics": metrics,
        "epochs": list(epochs),
        "config": config,
        **environment(),
    }
    results = plain(results)
    write_text(Path(output_dir) / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
    return results


def plain(value: Any) -> Any:
    """JSON of a value: numbers that are not finite become None, absolute paths their last part, the rest text."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int)):
        return value
    text = str(getattr(value, "value", value))
    return Path(text).name if os.path.isabs(text) else text


def command(argv: Sequence[str] | None = None) -> str:
    """The command line, without the machine's paths: absolute ones keep their last part."""
    argv = sys.argv if argv is None else argv
    words = []
    for word in argv:
        key, equals, value = word.partition("=")
        if os.path.isabs(value):
            word = f"{key}{equals}{Path(value).name}"
        words.append(Path(word).name if os.path.isabs(word) else word)
    return shlex.join(["python", *words])


def commit() -> str | None:
    """The git commit of the checkout that the package runs from, with "-dirty" where files differ; None outside of one."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        run = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(run, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def epochs_of(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Trainer's log as one mapping for each epoch: the mean training loss since the last, and what evaluation found.

    A second evaluation at the same step is left out.
    """
    epochs: list[dict[str, Any]] = []
    losses: list[float] = []
    for entry in log_history:
        if "loss" in entry:
            losses.append(entry["loss"])
        if any(key.startswith("eval_") for key in entry) and not (epochs and epochs[-1]["step"] == entry["step"]):
            found = {key.removeprefix("eval_"): value for key, value in entry.items() if key.startswith("eval_")}
            loss = sum(losses) / len(losses) if losses else None
            epochs.append({"epoch": entry["epoch"], "step": entry["step"], "train_loss": loss, **found})
            losses = []
    return epochs
