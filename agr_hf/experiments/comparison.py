"""What a comparison is: optimizers, settings, seeds and a search, as a command line asks for them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from agr_hf.errors import UserError
from agr_hf.experiments.rerun import script_path
from agr_hf.experiments.trials import Range, Trials, Worker
from agr_hf.optim.registry import OPTIMIZERS, optimizer_info
from agr_hf.tasks.runs import lower_is_better

# Script of a task, and the metric that a search goes by.
TASKS = {
    "images": ("train_image_classifier.py", "accuracy"),
    "albert": ("train_albert.py", "loss"),
    "ddpm": ("train_ddpm.py", "loss"),
    "functions": ("minimize_functions.py", "distance"),
}
OWN_ARGUMENTS = ("--optim", "--optim_args", "--seed", "--output_dir", "--resume_from_checkpoint")


@dataclass(frozen=True)
class Cell:
    """Runs that differ in their seeds: an optimizer, and the values of the arguments that the comparison varies.

    Attributes:
        optimizer: NAME or MODULE:CLASS, and its options: `agr_adamw,second_moment=regularized`.
        settings: arguments of the script and their values.
    """

    optimizer: str
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        return ",".join([self.optimizer.replace(":", "."), *[f"{key}={value}" for key, value in self.settings]])

    @property
    def optim(self) -> str:
        return self.optimizer.partition(",")[0]

    @property
    def arguments(self) -> list[str]:
        options = self.optimizer.partition(",")[2]
        words = ["--optim", self.optim, *(["--optim_args", options] if options else [])]
        return [*words, *[word for key, value in self.settings for word in (f"--{key}", value)]]


@dataclass(frozen=True)
class Comparison:
    """What is compared; see `agr-hf compare --help`. `metric` is the user's choice in place of the task's."""

    script: Path
    task: str
    cells: tuple[Cell, ...]
    baseline: str
    seeds: int
    margin: float
    arguments: tuple[str, ...]
    ranges: tuple[Range, ...] = ()
    trials: int = 0
    metric: str | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What runs of it have in common: another comparison cannot go on with them."""
        found: dict[str, Any] = {"script": self.script.name, "arguments": list(self.arguments)}
        if self.ranges:
            found |= {"search": [asdict(of) for of in self.ranges], "trials": self.trials}
        if self.ranges and self.metric:
            found |= {"tuned_by": self.metric}
        return found

    def open_trials(self, storage: Any, worker: Worker, cell: Cell | None = None) -> Trials:
        """The queue of runs; of a cell, its search."""
        digest = hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()[:12]
        study = "runs" if cell is None else f"search, {cell.name}"
        ranges, budget = ((), 0) if cell is None else (self.ranges, self.trials)
        return Trials(
            storage, worker, f"{self.script.stem} {digest}: {study}", maximize=not lower_is_better(self.objective),
            ranges=ranges, budget=budget,
        )  # fmt: skip

    @property
    def objective(self) -> str:
        """The metric that a search goes by, and the first of the table."""
        return self.metric or (TASKS[self.task][1] if self.task in TASKS else "loss")


def plan_comparison(
    task: str, optimizers: Sequence[str], seeds: int, settings: Sequence[str], margin: float, baseline: str | None,
    arguments: Sequence[str], search: Sequence[str] = (), trials: int | None = None, metric: str | None = None,
) -> Comparison:  # fmt: skip
    """What a command line asks for; `metric` is what a search goes by, by default that of the task.

    Raises:
        UserError: fewer than two optimizers, one or an option that does not exist, a baseline that is not among them, an
            argument that is compare's own, a search without trials, or no such script.
    """
    names = list(dict.fromkeys(optimizers))
    baseline = baseline or names[0]
    if len(names) < 2 or baseline not in names:
        raise UserError(
            f"compare takes two optimizers or more and a baseline among them, but {', '.join(names)} and the baseline "
            f"{baseline} were given"
        )
    if not 0 < margin < math.inf:
        raise UserError(f"margin={margin!r} is not allowed; it must be a number > 0")
    if bool(search) != (trials is not None):
        raise UserError("--search and --trials go together: where to look, and how often for each optimizer")
    ranges = tuple(Range.parse(text) for text in search)
    grid = []
    for setting in settings:
        key, equals, text = setting.partition("=")
        values = text.split(",")
        if not (key and equals and all(values)) or len(set(values)) < len(values):
            raise UserError(
                f"--set {setting} is not allowed; it must be ARGUMENT=VALUE,VALUE,... of the script, each value once"
            )
        grid.append([(key, value) for value in values])
    varied = [values[0][0] for values in grid] + [of.argument for of in ranges]
    if len(set(varied)) < len(varied):
        raise UserError(f"--set and --search take each argument once, but {', '.join(varied)} were given")
    words = [f"--{name}" for name in varied] + list(arguments)
    own = [word for word in words if word.partition("=")[0].replace("-", "_").replace("__", "--", 1) in OWN_ARGUMENTS]
    if own:
        raise UserError(
            f"{', '.join(own)} cannot be given to the script: compare itself gives it {', '.join(OWN_ARGUMENTS)}"
        )
    cells = tuple(Cell(name, chosen) for chosen in product(*grid) for name in names)
    if any("/" in cell.name or cell.name.startswith(".") for cell in cells):
        raise UserError("optimizers and values of --set name folders, and cannot hold a /")
    for cell in cells:
        _check_optimizer(task, cell)
    script = script_path(TASKS[task][0]) if task in TASKS else Path(task)
    if not script.is_file():
        raise UserError(f"there is no task and no script {task!r}; tasks are {', '.join(TASKS)}")
    return Comparison(
        script.resolve(), task, cells, baseline, seeds, margin, tuple(arguments), ranges, trials or 0, metric
    )


def _check_optimizer(task: str, cell: Cell) -> None:
    """Refuse an optimizer that every run would fail of. A script of the user's may know names and options of its own."""
    from transformers.training_args import OptimizerNames

    from agr_hf.integrations.trainer import parse_optim_args

    info = OPTIMIZERS.get(cell.optim)
    if info is not None and (info.ours or task in TASKS):
        parse_optim_args(info, cell.optimizer.partition(",")[2])
    elif task in TASKS and ":" not in cell.optim and cell.optim not in list(OptimizerNames):
        optimizer_info(cell.optim)  # says which there are


def make_words(cell: Cell, searched: Mapping[str, float], seed: int) -> list[str]:
    """Arguments of the script that are compare's own."""
    tuned = [
        word
        for key, value in searched.items()
        # A whole number is written as one: arguments may be of that type.
        for word in (f"--{key}", f"{value:.0f}" if value.is_integer() and abs(value) < 2**53 else repr(value))
    ]
    return [*cell.arguments, *tuned, "--seed", str(seed)]
