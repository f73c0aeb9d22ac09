"""One table over runs, local or on the Hub."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agr_hf.errors import UserError
from agr_hf.hub.cards import find_task, shown_metrics
from agr_hf.hub.download import published_record
from agr_hf.optim.registry import OPTIMIZERS
from agr_hf.tasks.record import RunRecord, read_record, read_records
from agr_hf.tasks.runs import lower_is_better
from agr_hf.texts import one_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

# What two seeds of one experiment may differ in.
PER_RUN = ("seed", "data_seed", "parameters", "channels")
COLUMNS = ("model_name", "unet", "optim", "learning_rate")


@dataclass(frozen=True)
class _Row:
    """Runs that differ in their seeds, one metric of them, and its values in the runs that have it."""

    runs: list[RunRecord]
    metric: str
    label: str
    values: list[float]


def collect(sources: Iterable[str], *, api: HfApi | None = None) -> list[RunRecord]:
    """Records of runs: of folders with a `results.json`, of all below a folder, of a demo, of repositories on the Hub.

    Raises:
        UserError: a source holds no run; the message names it.
        ConnectionError: the Hub failed.
    """
    found = []
    for source in sources:
        path = Path(source)
        if path.is_dir() and not (path / "results.json").exists():
            runs = sorted(path.rglob("results.json"))
            if not runs:
                raise UserError(f"there is no results.json in {source} or below it")
            found += [record for run in runs if (record := _read_record(run))]
        elif path.is_dir():
            found += read_records(path)
        else:
            found.append(published_record(source, api=api))
    return found


def _read_record(path: Path) -> RunRecord | None:
    """Of a `results.json` among others; None, and a warning, where it is of something else."""
    try:
        record = read_record(path)
        find_task(record)
    except ValueError as error:
        logger.warning("left out: %s", error)
        return None
    return record


def leaderboard(runs: Iterable[RunRecord]) -> str:
    """A Markdown table of runs by task and data, the best first: mean and standard deviation over seeds.

    Runs of as many processes that differ in nothing but their seed are one row; of a seed that is there twice (a run and its
    repetition) the one finished last counts. "settings" holds what else differs between the rows of one task
    and data set. With one seed there is no deviation, and rows that lie within each other's deviations are not distinct
    by this table.
    """
    groups: dict[str, dict[str, RunRecord]] = {}
    # A run may be given twice: its folder, and where it was published.
    for run in {json.dumps(asdict(run), sort_keys=True): run for run in runs}.values():
        key = json.dumps([run.task, run.optimizer, _settings(run)], sort_keys=True)
        by_seed = groups.setdefault(key, {})
        # Runs that do not say their seed are taken for different ones.
        known = f"run {len(by_seed)}" if run.seed is None else run.seed
        seed = json.dumps([known, run.config.get("data_seed")])
        if seed in by_seed:
            logger.warning(
                "there are two runs of seed %s that differ in nothing; the one finished last counts", run.seed
            )
        by_seed[seed] = max(run, by_seed.get(seed, run), key=lambda one: one.finished or "")
    lines = ["| task | data | model | optimizer | rate | settings | runs | metric | value | seconds |",
             "| --- | --- | --- | --- | ---: | --- | ---: | --- | ---: | ---: |"]  # fmt: skip
    values_of: dict[str, dict[str, set[str]]] = {}
    rows = [list(by_seed.values()) for by_seed in groups.values()]
    for group in rows:
        for key, value in _settings(group[0]).items():
            values_of.setdefault(_place(group[0]), {}).setdefault(key, set()).add(json.dumps(value, sort_keys=True))
    for row in sorted(map(_row, rows), key=_order):
        group, values, run = row.runs, row.values, row.runs[0]
        info = OPTIMIZERS.get(run.optimizer)
        value = f"{statistics.mean(values):.4g}" if values else "–"
        if len(values) > 1:
            value += f" ± {statistics.stdev(values):.2g}"
        if len(values) < len(group):
            value += f" ({len(values)} of {len(group)} runs)"
        seconds = [one.seconds for one in group if one.seconds is not None]
        config, rate = run.config, run.config.get("learning_rate")
        cells = [
            run.task, run.dataset.get("name", "–"),
            config.get("model_name") or config.get("unet") or f"hidden {config.get('hidden_size', '–')}",
            info.title if info else run.optimizer, "–" if rate is None else f"{rate:g}",
            _differences(run, values_of[_place(run)]), len(group), row.label, value,
            f"{statistics.mean(seconds):.0f}" if seconds else "–",
        ]  # fmt: skip
        lines.append("| " + " | ".join(one_line(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _settings(run: RunRecord) -> dict[str, Any]:
    settings = {key: value for key, value in run.config.items() if key not in PER_RUN}
    return {**settings, "processes": run.processes or 1}


def _place(run: RunRecord) -> str:
    """Rows of one place are compared with each other."""
    return json.dumps([run.task, run.dataset.get("name")])


def _differences(run: RunRecord, values: Mapping[str, set[str]]) -> str:
    """Settings of a run that other rows have otherwise, without those that have a column."""
    settings = _settings(run)
    differing = [key for key in settings if len(values[key]) > 1 and key not in COLUMNS]
    return ", ".join(f"{key}={settings[key]}" for key in differing) or "–"


def _row(group: list[RunRecord]) -> _Row:
    labels = {key: label for run in group for key, label, _ in shown_metrics(find_task(run), run.metrics)}
    key = min(labels, key=lambda name: name == "loss", default="loss")  # the loss where there is nothing else
    values = [value for run in group for name, _, value in shown_metrics(find_task(run), run.metrics) if name == key]
    return _Row(group, key, labels.get(key, "–"), values)


def _order(row: _Row) -> tuple[Any, ...]:
    run = row.runs[0]
    mean = statistics.mean(row.values) if row.values else math.inf  # what failed comes last
    lower = lower_is_better(row.metric)
    data = str(run.dataset.get("name"))
    return run.task, data, row.metric, mean if lower or not row.values else -mean
