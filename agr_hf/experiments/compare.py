"""`agr-hf compare`: does an optimizer help? The same script with each optimizer over paired seeds, and verdicts.

A run is a folder, `DIR/runs/NAME/seed-K`, and a trial in a database (trials.py). Workers, of one command or of several, take
trials that nobody has in hand. So a comparison that was stopped goes on where it was, and no run is taken twice. A search
(`--search`) comes first: as many trials for each optimizer, with a seed that no run is evaluated with.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import optuna

from agr_hf.environment import environment
from agr_hf.errors import UserError
from agr_hf.experiments.comparison import TASKS, Cell, Comparison, make_words
from agr_hf.experiments.paired import Paired, bootstrap_interval, give_verdicts, pair_metric
from agr_hf.experiments.pool import Pool
from agr_hf.experiments.report import write_reports
from agr_hf.experiments.trials import Trials, Worker, open_storage
from agr_hf.files import write_text
from agr_hf.tasks.runs import plain


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
    worker, pool = Worker(output), Pool(comparison, workers, say)
    if comparison.seeds == 1:
        say("one seed has no interval, and no verdict: two or more have")
    try:
        searches = _search(comparison, output, database, worker, pool)
        tuned = {name: search.best() for name, search in searches.items()}
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
    tried = {name: search.tried() for name, search in searches.items()}
    found = summarize(comparison, queue.metrics(), {"tuned": tuned, "tried": tried} if tuned else None)
    write_text(output / "comparison.json", json.dumps(plain(found), indent=2, allow_nan=False) + "\n")
    write_reports([output])
    if pool.failed:
        raise RuntimeError(f"{pool.failures} of {total} runs failed: {pool.describe_failures()}")
    return found


def _search(comparison: Comparison, output: Path, database: Any, worker: Worker, pool: Pool) -> dict[str, Trials]:
    """A search of the best arguments for each cell, with as many trials for each; none where nothing is searched."""
    searches = {}
    for cell in comparison.cells if comparison.ranges else ():
        searches[cell.name] = comparison.open_trials(database, worker, cell)
        searches[cell.name].add_grid()
        pool.work(searches[cell.name], output / "tuning" / cell.name, cell)
    if pool.failed:
        raise RuntimeError(f"{pool.failures} runs of the search failed: {pool.describe_failures()}")
    return searches


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


def summarize(
    comparison: Comparison, found: Mapping[str, dict[str, Any]], searched: Mapping[str, Any] | None
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
        "search": {**comparison.identity, **searched} if searched else None,
        "diverged": diverged,
        "comparisons": [{**head, **asdict(paired)} for (head, _), paired in zip(rows, verdicts, strict=True)],
        **environment(),
    }
