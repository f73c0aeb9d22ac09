"""`agr-hf compare`: does an optimizer help? The same script with each optimizer over paired seeds, and verdicts.

A run is a folder, `DIR/runs/NAME/seed-K`, and a trial in a database (trials.py). Workers, of one command or of several, take
trials that nobody has in hand. So a comparison that was stopped goes on where it was, and no run is taken twice. A search
(`--search`) comes first: as many trials for each optimizer, with a seed that no run is evaluated with.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import optuna

from agr_hf.environment import environment
from agr_hf.errors import UserError
from agr_hf.experiments.paired import Paired, bootstrap_interval, give_verdicts, pair_metric
from agr_hf.experiments.processes import ScriptRun, interrupts_wait
from agr_hf.experiments.report import write_reports
from agr_hf.experiments.rerun import script_path
from agr_hf.experiments.results import is_number, read_metrics
from agr_hf.experiments.trials import BEAT, Range, Taken, Trials, Worker, open_storage
from agr_hf.files import write_text
from agr_hf.tasks.runs import lower_is_better, plain

# Script of a task, and the metric that a search goes by.
TASKS = {
    "images": ("train_image_classifier.py", "accuracy"),
    "albert": ("train_albert.py", "loss"),
    "ddpm": ("train_ddpm.py", "loss"),
    "functions": ("minimize_functions.py", "distance"),
}
RESUMABLE = ("images", "albert", "ddpm")
OWN_ARGUMENTS = ("--optim", "--optim_args", "--seed", "--output_dir", "--resume_from_checkpoint")
TUNING_SEED = 1_000_000


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
        UserError: fewer than two optimizers, a baseline that is not among them, an argument that is compare's own, a
            search without trials, or no such script.
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
    script = script_path(TASKS[task][0]) if task in TASKS else Path(task)
    if not script.is_file():
        raise UserError(f"there is no task and no script {task!r}; tasks are {', '.join(TASKS)}")
    return Comparison(
        script.resolve(), task, cells, baseline, seeds, margin, tuple(arguments), ranges, trials or 0, metric
    )


def compare(
    comparison: Comparison,
    output: Path,
    *,
    workers: int = 1,
    storage: str | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Take the runs that are not done, then write `comparison.json`, `report.html` and `report.md`; returns the first.

    A run that was stopped goes on from its checkpoint, where the script has one. Runs that another command has in hand are
    waited for.

    Args:
        comparison: what to compare.
        output: folder of the comparison. One that was made with other arguments is refused.
        workers: runs at a time; torch gets its share of the cores in each.
        storage: database that workers on several machines share, as SQLAlchemy's URL. Default: `output/trials.db`.
        say: takes the lines for the user.

    Raises:
        UserError: the folder is of another comparison, or the database cannot be opened.
        RuntimeError: runs failed; the others are done, and the message names the logs.
    """
    if storage is None and {"?", "%"} & set(str(output.resolve())):
        raise UserError(
            f"{output} has ? or % in its path, which the URL of its database cannot hold; pass another --output"
        )
    _claim(comparison, output)
    database = open_storage(storage or f"sqlite:///{(output / 'trials.db').resolve()}")
    total = len(comparison.cells) * (comparison.seeds + comparison.trials)
    worker, pool = Worker(output), _Pool(comparison, workers, say)
    try:
        tuned = _search(comparison, output, database, worker, pool)
        queue = comparison.open_trials(database, worker)
        # A seed after the other: a comparison that is looked at early has pairs.
        queue.add({
            f"{cell.name}/seed-{seed}": {"optim": cell.optim, "arguments": make_words(cell, tuned.get(cell.name, {}), seed)}
            for seed, cell in product(range(comparison.seeds), comparison.cells)
        })  # fmt: skip
        pool.work(queue, output / "runs")
    except optuna.exceptions.StorageInternalError as error:
        raise RuntimeError(
            f"the database of runs failed: {error.__cause__ or error}; start the command again"
        ) from None
    finally:
        worker.end()
    found = summarize(comparison, queue.metrics(), tuned)
    write_text(output / "comparison.json", json.dumps(plain(found), indent=2, allow_nan=False) + "\n")
    write_reports([output])
    if pool.failed:
        raise RuntimeError(f"{len(pool.failed)} of {total} runs failed: {'; '.join(pool.failed)}")
    return found


def _search(
    comparison: Comparison, output: Path, database: Any, worker: Worker, pool: _Pool
) -> dict[str, dict[str, float]]:
    """The best arguments for each cell, by as many trials for each; nothing where there is no search."""
    searches = {}
    for cell in comparison.cells if comparison.ranges else ():
        searches[cell.name] = comparison.open_trials(database, worker, cell)
        searches[cell.name].add_grid()
        pool.work(searches[cell.name], output / "tuning" / cell.name, cell)
    if pool.failed:
        raise RuntimeError(f"{len(pool.failed)} runs of the search failed: {'; '.join(pool.failed)}")
    return {name: search.best() for name, search in searches.items()}


def make_words(cell: Cell, searched: Mapping[str, float], seed: int) -> list[str]:
    """Arguments of the script that are compare's own."""
    tuned = [
        word
        for key, value in searched.items()
        # A whole number is written as one: arguments may be of that type.
        for word in (f"--{key}", f"{value:.0f}" if value.is_integer() and abs(value) < 2**53 else repr(value))
    ]
    return [*cell.arguments, *tuned, "--seed", str(seed)]


def _claim(comparison: Comparison, output: Path) -> None:
    """Refuse a folder of another comparison; more seeds or optimizers than before are no other one."""
    mark, own = output / "compare.json", {**comparison.identity, "path": str(comparison.script)}
    if comparison.task in TASKS:
        del own["path"]  # another installation has its scripts elsewhere
    if mark.exists():
        try:
            before = json.loads(mark.read_text())
            before["script"], before["arguments"]
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{mark} is damaged; give another --output, or remove it if the folder is of this comparison"
            ) from None
        if before.get("path", own.get("path")) != own.get("path"):
            raise UserError(
                f"{output} holds a comparison of {before['path']}; pass another --output for {comparison.script}"
            )
        if {**before, "path": None} != {**json.loads(json.dumps(own)), "path": None}:
            searched = [of["argument"] for of in before.get("search", [])]
            raise UserError(
                f"{output} holds a comparison of {before['script']} with the arguments "
                f"{shlex.join(before['arguments']) or '(none)'}"
                + (f" and {before['trials']} trials of {', '.join(searched)}" if searched else "")
                + "; give the same ones, or another --output"
            )
        return
    output.mkdir(parents=True, exist_ok=True)
    write_text(mark, json.dumps(own, indent=2) + "\n")


class _Pool:
    """Runs scripts, as many at a time as there are workers; says which run is done, and how long the others take."""

    def __init__(self, comparison: Comparison, workers: int, say: Callable[[str], None]) -> None:
        self._comparison, self._workers, self._say = comparison, workers, say
        self._seconds: list[float] = []
        self.failed: list[str] = []

    def _start(self, taken: Taken, folder: Path, cell: Cell | None) -> tuple[BaseProcess, ScriptRun]:
        known = taken.trial.user_attrs
        optim, words = (known["optim"], known["arguments"]) if cell is None else (
            cell.optim, make_words(cell, taken.searched, TUNING_SEED)
        )  # fmt: skip
        words = [*words, *self._comparison.arguments, "--output_dir", str(folder / taken.run)]
        if self._comparison.task in RESUMABLE:
            words += ["--resume_from_checkpoint", "latest"]
        threads = max(1, (os.cpu_count() or 1) // self._workers)
        if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
            threads = min(threads, max(1, int(os.environ["OMP_NUM_THREADS"])))
        run = ScriptRun(self._comparison.script, tuple(words), optim, folder / taken.run, threads)
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        if run.is_going:
            self._say(f"{run.name}: a command that was stopped has it in hand; waiting for it")
        return run.start(), run

    def work(self, trials: Trials, folder: Path, cell: Cell | None = None) -> None:
        """Take trials until none is left, here or in the hands of others; those of a search are all of one cell."""
        running: dict[BaseProcess, tuple[Taken, ScriptRun, float]] = {}
        in_hand: set[Taken] = set()
        over = threading.Event()

        def beat() -> None:
            # Apart, for the start of a process may take long: it loads what the scripts need.
            while not over.wait(BEAT):
                for taken in tuple(in_hand):
                    taken.beat()

        beats = threading.Thread(target=beat, daemon=True)
        beats.start()
        try:
            while True:
                while len(running) < self._workers and (taken := trials.take()):
                    in_hand.add(taken)
                    with interrupts_wait():
                        process, run = self._start(taken, folder, cell)
                        running[process] = (taken, run, time.monotonic())
                if not running and not trials.in_hand():
                    return
                if not running:
                    time.sleep(1)  # others have the last runs in hand
                wait([process.sentinel for process in running], timeout=BEAT)
                for process, (taken, run, start) in list(running.items()):
                    if not process.is_alive():
                        del running[process]
                        self._end(process, taken, run, time.monotonic() - start, trials)
                        in_hand.remove(taken)
        finally:
            over.set()
            beats.join()
            for process in running:  # Ctrl-C: the scripts end with their workers
                process.terminate()
                process.join(timeout=BEAT)
                process.kill()  # one that does not listen
                process.join()
            for taken in in_hand:
                taken.give_back()

    def _end(self, process: BaseProcess, taken: Taken, run: ScriptRun, seconds: float, trials: Trials) -> None:
        process.join()
        metrics = read_metrics(run.folder)
        key = self._comparison.objective
        why = "" if process.exitcode == 0 else f"exit code {process.exitcode}"
        if not why and metrics is None:
            why = "no results.json with numbers as metrics"
        if not why and trials.is_search and key not in (metrics or {}):
            why = f"the search goes by {key}, and the script's metrics are {', '.join(metrics or {})}: pass one as --metric"
        if why or metrics is None:
            said = run.last_line() if process.exitcode else ""
            self.failed.append(f"{': '.join([run.name, why, *[said] * bool(said)])} ({run.log})")
            taken.fail()
            self._say(self.failed[-1])
            return
        taken.finish(metrics, metrics.get(key))
        self._seconds.append(seconds)
        in_hand = trials.in_hand()
        left = statistics.median(self._seconds) * in_hand / self._workers
        numbers = ", ".join(f"{key} {value:.4g}" for key, value in metrics.items() if is_number(value))
        self._say(f"{run.name}: {numbers or 'diverged'} ({seconds:.0f} s); {in_hand} left, about {left / 60:.0f} min")


def summarize(
    comparison: Comparison, found: Mapping[str, dict[str, Any]], tuned: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """Every optimizer against the baseline, in each setting and metric, over the seeds that both finished."""
    metrics = {
        cell: {seed: found.get(f"{cell.name}/seed-{seed}") or {} for seed in range(comparison.seeds)}
        for cell in comparison.cells
    }
    keys = list(dict.fromkeys(key for runs in metrics.values() for found in runs.values() if found for key in found))
    keys.sort(key=lambda key: key != comparison.objective)
    rows: list[tuple[dict[str, Any], Paired]] = []
    diverged: list[str] = []
    for cell in comparison.cells:
        diverged += [f"{cell.name}, seed {s}" for s, found in metrics[cell].items() if found and None in found.values()]
        against = Cell(comparison.baseline, cell.settings)
        if cell == against:
            continue
        for key in keys:
            pair = pair_metric(key, metrics[cell], metrics[against], comparison.margin)
            if pair is None:
                continue
            kept, paired = pair
            interval = bootstrap_interval(kept["values"], kept["baseline_values"])
            if interval and kept["lower_is_better"]:
                interval = (-interval[1], -interval[0])
            head = {
                "optimizer": cell.optimizer, "baseline": against.optimizer, "settings": dict(cell.settings), **kept,
                "bootstrap": interval,
            }  # fmt: skip
            rows.append((head, paired))
    verdicts = give_verdicts([paired for _, paired in rows])
    return {
        "task": comparison.task,
        "baseline": comparison.baseline,
        "metric": comparison.metric,
        "script": comparison.script.name,
        "arguments": list(comparison.arguments),
        "margin": comparison.margin,
        "seeds": comparison.seeds,
        "cells": [
            {"optimizer": cell.optimizer, "settings": dict(cell.settings), "folder": cell.name}
            for cell in comparison.cells
        ],
        "search": {**comparison.identity, "tuned": tuned} if tuned else None,
        "diverged": diverged,
        "comparisons": [{**head, **asdict(paired)} for (head, _), paired in zip(rows, verdicts, strict=True)],
        **environment(),
    }
