"""`agr-hf compare`: does an optimizer help? The same script with each optimizer over paired seeds, and verdicts.

A run is a folder, `DIR/runs/NAME/seed-K`, and is done when its `results.json` is there. Workers, of one command or of
several, take runs that are not done, each under a lock that ends with its process. So a comparison that was stopped goes on
where it was, and no run is taken twice.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from filelock import FileLock, Timeout

from agr_hf.environment import environment
from agr_hf.experiments.paired import Paired, bootstrap_interval, compare_paired, give_verdicts
from agr_hf.experiments.rerun import script_path
from agr_hf.files import write_text
from agr_hf.tasks.runs import lower_is_better, plain

SCRIPTS = {"images": "train_image_classifier.py", "albert": "train_albert.py", "ddpm": "train_ddpm.py"}
OWN_ARGUMENTS = ("--optim", "--seed", "--output_dir", "--resume_from_checkpoint")


@dataclass(frozen=True)
class Cell:
    """Runs that differ in their seeds: an optimizer, and the values of the arguments that the comparison varies."""

    optimizer: str
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        return ",".join([self.optimizer, *[f"{key}={value}" for key, value in self.settings]])

    @property
    def arguments(self) -> list[str]:
        return ["--optim", self.optimizer, *[word for key, value in self.settings for word in (f"--{key}", value)]]


@dataclass(frozen=True)
class Comparison:
    """What is compared; see `agr-hf compare --help`."""

    script: Path
    task: str
    cells: tuple[Cell, ...]
    baseline: str
    seeds: int
    margin: float
    arguments: tuple[str, ...]

    def folder(self, output: Path, cell: Cell, seed: int) -> Path:
        return output / "runs" / cell.name / f"seed-{seed}"


def plan_comparison(
    task: str, optimizers: Sequence[str], seeds: int, settings: Sequence[str], margin: float, baseline: str | None,
    arguments: Sequence[str],
) -> Comparison:  # fmt: skip
    """What a command line asks for.

    Raises:
        ValueError: fewer than two optimizers, a baseline that is not among them, an argument that is compare's own, or no
            such script.
    """
    names = list(dict.fromkeys(optimizers))
    baseline = baseline or names[0]
    if len(names) < 2 or baseline not in names:
        raise ValueError(
            f"compare takes two optimizers or more and a baseline among them, but {', '.join(names)} and the baseline "
            f"{baseline} were given"
        )
    if not margin > 0:
        raise ValueError(f"margin={margin!r} is not allowed; it must be a number > 0")
    own = [
        word for word in arguments if word.partition("=")[0].replace("-", "_").replace("__", "--", 1) in OWN_ARGUMENTS
    ]
    if own:
        raise ValueError(
            f"{', '.join(own)} cannot stand behind --: compare itself gives the script {', '.join(OWN_ARGUMENTS)}"
        )
    grid = []
    for setting in settings:
        key, equals, values = setting.partition("=")
        if not (key and equals and all(values.split(","))):
            raise ValueError(f"--set {setting} is not allowed; it must be ARGUMENT=VALUE,VALUE,... of the script")
        grid.append([(key, value) for value in values.split(",")])
    cells = tuple(Cell(name, chosen) for chosen in product(*grid) for name in names)
    if any("/" in cell.name or cell.name.startswith(".") for cell in cells):
        raise ValueError("optimizers and values of --set name folders, and cannot hold a /")
    script = script_path(SCRIPTS[task]) if task in SCRIPTS else Path(task)
    if not script.is_file():
        raise ValueError(f"there is no task and no script {task!r}; tasks are {', '.join(SCRIPTS)}")
    return Comparison(script.resolve(), task, cells, baseline, seeds, margin, tuple(arguments))


def compare(
    comparison: Comparison, output: Path, *, workers: int = 1, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Take the runs that are not done, then write `comparison.json` and `report.md` under `output`; returns the first.

    A run that was stopped goes on from its checkpoint, where the script has one. Runs that another command has in hand are
    waited for.

    Args:
        comparison: what to compare.
        output: folder of the comparison. One that was made with other arguments is refused.
        workers: runs at a time; torch gets its share of the cores in each.
        say: takes the lines for the user.

    Raises:
        ValueError: the folder is of another comparison.
        RuntimeError: runs failed; the others are done, and the message names the logs.
    """
    _claim(comparison, output)
    # A seed after the other: a comparison that is looked at early has pairs.
    todo: Queue[tuple[Cell, int]] = Queue()
    for seed, cell in product(range(comparison.seeds), comparison.cells):
        todo.put((cell, seed))
    total, failed, progress = todo.qsize(), [], _Progress(todo.qsize(), workers, say)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                cell, seed = todo.get_nowait()
            except Empty:
                return
            error = _run(comparison, output, cell, seed, max(1, (os.cpu_count() or 1) // workers), stop, progress)
            if error:
                failed.append(error)
                say(error)

    threads = [threading.Thread(target=work, name=f"worker-{i}") for i in range(min(workers, total))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
    finally:
        stop.set()  # at Ctrl-C the scripts end with their workers
        for thread in threads:
            thread.join()
    found = summarize(comparison, output)
    write_text(output / "comparison.json", json.dumps(plain(found), indent=2, allow_nan=False) + "\n")
    write_text(output / "report.md", report(found))
    if failed:
        raise RuntimeError(f"{len(failed)} of {total} runs failed: {'; '.join(failed)}")
    return found


def _claim(comparison: Comparison, output: Path) -> None:
    """Refuse a folder of another comparison; more seeds or optimizers than before are no other one."""
    mark = output / "compare.json"
    own = {"script": comparison.script.name, "arguments": list(comparison.arguments)}
    if mark.exists():
        before = json.loads(mark.read_text())
        if before != own:
            raise ValueError(
                f"{output} holds a comparison of {before['script']} with the arguments "
                f"{shlex.join(before['arguments']) or '(none)'}; give the same ones, or another --output"
            )
        return
    output.mkdir(parents=True, exist_ok=True)
    write_text(mark, json.dumps(own, indent=2) + "\n")


class _Progress:
    """Says which run is done, and how long the others take."""

    def __init__(self, total: int, workers: int, say: Callable[[str], None]) -> None:
        self._total, self._workers, self._say = total, workers, say
        self._done, self._seconds = 0, []  # type: tuple[int, list[float]]
        self._lock = threading.Lock()

    def done(self, cell: Cell, seed: int, seconds: float | None, metrics: Mapping[str, Any]) -> None:
        with self._lock:
            self._done += 1
            if seconds is None:
                return  # it was done before
            self._seconds.append(seconds)
            left = statistics.median(self._seconds) * (self._total - self._done) / self._workers
            numbers = ", ".join(f"{key} {value:.4g}" for key, value in metrics.items() if _is_number(value))
            self._say(
                f"[{self._done}/{self._total}] {cell.name}, seed {seed}: {numbers or 'diverged'} ({seconds:.0f} s); "
                f"about {left / 60:.0f} min left"
            )


def _run(
    comparison: Comparison,
    output: Path,
    cell: Cell,
    seed: int,
    threads: int,
    stop: threading.Event,
    progress: _Progress,
) -> str | None:
    """Take one run, unless it is done; a sentence where it fails."""
    folder = comparison.folder(output, cell, seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    while not stop.is_set():
        try:
            lock.acquire(timeout=0.5)
            break
        except Timeout:
            continue  # another command has it in hand, or has just died with it
    else:
        return None
    try:
        if (folder / "results.json").exists():
            progress.done(cell, seed, None, {})
            return None
        words = [sys.executable, str(comparison.script), *cell.arguments, *comparison.arguments]
        words += ["--seed", str(seed), "--output_dir", str(folder)]
        if comparison.task in SCRIPTS:
            words += ["--resume_from_checkpoint", "latest"]
        log, start = folder.with_name(f"{folder.name}.log"), time.monotonic()
        with log.open("ab") as file:
            script = subprocess.Popen(
                words, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": str(threads)}
            )
            while script.poll() is None:
                if stop.wait(0.1):
                    script.terminate()
                    script.wait()
                    return None
        metrics = read_metrics(folder)
        if script.returncode or metrics is None:
            lines = log.read_text(errors="replace").strip().splitlines() or [""]
            why = f"exit code {script.returncode}" if script.returncode else "no results.json with metrics"
            return f"{cell.name}, seed {seed}: {why}: {lines[-1][:200]} ({log})"
        progress.done(cell, seed, time.monotonic() - start, metrics)
        return None
    finally:
        lock.release()


def read_metrics(folder: Path) -> dict[str, Any] | None:
    """The metrics of a run that is done: numbers, and None for what is not finite. None where there are none."""
    try:
        found = json.loads((folder / "results.json").read_text())
    except (OSError, ValueError):
        return None
    metrics = found.get("metrics") if isinstance(found, dict) else None
    if not isinstance(metrics, dict):
        return None
    return {key: value for key, value in metrics.items() if value is None or _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def summarize(comparison: Comparison, output: Path) -> dict[str, Any]:
    """Every optimizer against the baseline, in each setting and metric, over the seeds that both finished."""
    metrics = {
        cell: {seed: read_metrics(comparison.folder(output, cell, seed)) for seed in range(comparison.seeds)}
        for cell in comparison.cells
    }
    keys = dict.fromkeys(key for runs in metrics.values() for found in runs.values() if found for key in found)
    rows: list[tuple[dict[str, Any], Paired]] = []
    diverged: list[str] = []
    for cell in comparison.cells:
        diverged += [f"{cell.name}, seed {s}" for s, found in metrics[cell].items() if found and None in found.values()]
        against = Cell(comparison.baseline, cell.settings)
        if cell == against:
            continue
        for key in keys:
            pairs = {
                seed: ((metrics[cell][seed] or {}).get(key), (metrics[against][seed] or {}).get(key))
                for seed in range(comparison.seeds)
            }
            seeds = [seed for seed, (own, other) in pairs.items() if own is not None and other is not None]
            if not seeds:
                continue
            scale = 100.0 if "accuracy" in key else 1.0
            values, baseline = ([scale * float(pairs[seed][i] or 0.0) for seed in seeds] for i in (0, 1))
            # Points of a percentage; of other metrics, percent of what the baseline has.
            margin = comparison.margin if scale == 100.0 else comparison.margin / 100 * abs(statistics.mean(baseline))
            lower = lower_is_better(key)
            paired = compare_paired(values, baseline, margin or 1e-12, lower_is_better=lower)
            interval = bootstrap_interval(values, baseline)
            if interval and lower:
                interval = (-interval[1], -interval[0])
            head = {
                "optimizer": cell.optimizer, "baseline": against.optimizer, "settings": dict(cell.settings), "metric": key,
                "unit": "%" if scale == 100.0 else "", "lower_is_better": lower, "seeds": seeds, "values": values,
                "baseline_values": baseline, "bootstrap": interval,
            }  # fmt: skip
            rows.append((head, paired))
    verdicts = give_verdicts([paired for _, paired in rows])
    return {
        "task": comparison.task,
        "script": comparison.script.name,
        "arguments": list(comparison.arguments),
        "margin": comparison.margin,
        "diverged": diverged,
        "comparisons": [{**head, **asdict(paired)} for (head, _), paired in zip(rows, verdicts, strict=True)],
        **environment(),
    }


def report(found: Mapping[str, Any]) -> str:
    """The comparison as Markdown."""
    lines = [
        f"# {found['script']}: paired over seeds",
        "",
        f"`{shlex.join([found['script'], *found['arguments']])}`",
        "",
        "Differences are within each seed (the same initial weights, data and order), and positive where the optimizer is "
        "better than the baseline; 95% intervals by Student's t. Verdicts hold at 5% for the whole table (Holm). The margin "
        f"is {found['margin']:g} points for metrics in percent, and {found['margin']:g}% of the baseline's mean for others.",
        "",
        "| optimizer | baseline | metric | n | optimizer's mean | baseline's mean | difference | 95% interval | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["comparisons"]:
        settings = "".join(f", {key}={value}" for key, value in row["settings"].items())
        means = [f"{statistics.mean(row[key]):.4g}{row['unit']}" for key in ("values", "baseline_values")]
        interval = "–" if row["n"] < 2 or math.isnan(row["low"]) else f"{row['low']:+.3g} to {row['high']:+.3g}"
        cells = [
            row["optimizer"] + settings, row["baseline"], row["metric"], str(row["n"]), *means,
            f"{row['difference']:+.3g}", interval, row["verdict"],
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    if found["diverged"]:
        lines += ["", f"Not finite at the end, and in no pair: {'; '.join(found['diverged'])}."]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return "\n".join([*lines, "", f"{found['device']}; {versions}", ""])
