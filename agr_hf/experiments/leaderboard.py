"""One table over runs, local or on the Hub, and what pairs of their seeds say."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agr_hf.errors import UserError
from agr_hf.experiments.paired import give_verdicts, pair_metric
from agr_hf.experiments.report import sentences, spread
from agr_hf.hub.cards import find_task, shown_metrics
from agr_hf.hub.download import published_record
from agr_hf.optim.registry import OPTIMIZERS
from agr_hf.tasks.record import RunRecord, read_records
from agr_hf.tasks.runs import lower_is_better
from agr_hf.texts import markdown

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

# What two seeds of one experiment may differ in.
PER_RUN = ("seed", "data_seed", "parameters", "channels")
COLUMNS = ("model_name", "unet", "optim", "learning_rate")
OPTIMIZER = ("optim", "optim_args")
MARGIN = 0.2  # of `agr-hf compare`


@dataclass(frozen=True)
class _Row:
    """Runs that differ in their seeds, one metric of them, and its values in the runs that have it."""

    runs: list[RunRecord]
    metric: str
    label: str
    values: list[float]

    @property
    def by_seed(self) -> dict[int, dict[str, float]]:
        """The metric of the runs that say their seed."""
        shown = [(run.seed, shown_metrics(find_task(run), run.metrics)) for run in self.runs if run.seed is not None]
        return {seed: {key: value for key, _, value in metrics if key == self.metric} for seed, metrics in shown}

    @property
    def optimizer(self) -> str:
        """Name and options, as `agr-hf compare` takes them."""
        options = self.runs[0].config.get("optim_args")
        return ",".join([self.runs[0].optimizer, str(options)] if options else [self.runs[0].optimizer])


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
            found += [record for run in runs for record in _read_known(run.parent)]
        elif path.is_dir():
            found += read_records(path)
        else:
            found.append(published_record(source, api=api))
    return found


def _read_known(folder: Path) -> list[RunRecord]:
    """The records of a folder among others; none, and a warning, where its `results.json` is of something else."""
    try:
        records = read_records(folder)
        for record in records:
            find_task(record)
    except ValueError as error:
        logger.warning("left out: %s", error)
        return []
    return records


def leaderboard(runs: Iterable[RunRecord]) -> str:
    """A Markdown table of runs by task and data, the best first: mean and standard deviation over seeds. Below it, as in a
    report of `agr-hf compare`, rows that differ in the optimizer alone against the one whose run was given first.

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
                "two runs of %s with seed %s differ in nothing, finished %s and %s; the one finished last counts",
                run.optimizer,
                run.seed,
                by_seed[seed].finished,
                run.finished,
            )
        by_seed[seed] = max(run, by_seed.get(seed, run), key=lambda one: one.finished or "")
    lines = ["| task | data | model | optimizer | rate | settings | runs | metric | value | seconds |",
             "| --- | --- | --- | --- | ---: | --- | ---: | --- | ---: | ---: |"]  # fmt: skip
    values_of: dict[str, dict[str, set[str]]] = {}
    rows = [_row(list(by_seed.values())) for by_seed in groups.values()]
    for row in rows:
        for key, value in _settings(row.runs[0]).items():
            values_of.setdefault(_place(row.runs[0]), {}).setdefault(key, set()).add(json.dumps(value, sort_keys=True))
    for row in sorted(rows, key=_order):
        group, values, run = row.runs, row.values, row.runs[0]
        info = OPTIMIZERS.get(run.optimizer)
        value = spread(values) if values else "–"
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
        lines.append("| " + " | ".join(map(markdown, cells)) + " |")
    verdicts = _compare(rows)
    return "\n".join(lines + ["", *verdicts] * bool(verdicts))


def _compare(rows: Sequence[_Row]) -> list[str]:
    """A sentence for each row that shares a seed with the first of those that differ from it in the optimizer alone."""
    first: dict[str, _Row] = {}
    pairs = []
    for row in rows:
        run = row.runs[0]
        settings = {key: value for key, value in _settings(run).items() if key not in OPTIMIZER}
        against = first.setdefault(json.dumps([_place(run), settings], sort_keys=True), row)
        pair = pair_metric(row.metric, row.by_seed, against.by_seed, MARGIN) if against is not row else None
        if pair:
            names = {"optimizer": row.optimizer, "baseline": against.optimizer, "settings": {}}
            pairs.append(({**names, **pair[0]}, pair[1]))
    verdicts = give_verdicts([paired for _, paired in pairs])
    found = [{**kept, **asdict(paired)} for (kept, _), paired in zip(pairs, verdicts, strict=True)]
    return [f"- {markdown(sentence)}" for sentence in sentences({"comparisons": found})]


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
