"""One table over runs, local or on the Hub."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agr_hf.hub.cards import shown_metrics, task_of
from agr_hf.hub.contents import read_results
from agr_hf.hub.download import published_results
from agr_hf.optim.registry import OPTIMIZERS

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

# What two seeds of one experiment may differ in.
PER_RUN = (
    "seed",
    "data_seed",
    "resume_from_checkpoint",
    "push_to_hub",
    "push_training_state",
    "report_to",
    "parameters",
)
LOWER_IS_BETTER = ("loss", "perplexity", "fid")


def collect(sources: Iterable[str], *, api: HfApi | None = None) -> list[dict[str, Any]]:
    """Results of runs: of folders with a `results.json`, of all runs below a folder, of repositories on the Hub.

    Raises:
        ValueError: a source holds no run; the message names it.
        ConnectionError: the Hub failed.
    """
    found = []
    for source in sources:
        path = Path(source)
        if path.is_dir() and not (path / "results.json").exists():
            runs = sorted(path.rglob("results.json"))
            if not runs:
                raise ValueError(f"there is no results.json in {source} or below it")
            found += [results for run in runs if (results := _results_of(run))]
        else:
            found.append(published_results(source, api=api))
    return found


def _results_of(path: Path) -> dict[str, Any] | None:
    """Of a `results.json` among others; None, and a warning, where it is of something else."""
    try:
        results = read_results(path)
        task_of(results)
    except ValueError as error:
        logger.warning("left out: %s", error)
        return None
    return results


def leaderboard(runs: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table of runs by task and data, the best first: mean and standard deviation over seeds.

    Runs that differ in nothing but their seed are one row. With one seed there is no deviation, and rows that lie within
    each other's deviations are not told apart by this table.
    """
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        config = {key: value for key, value in run["config"].items() if key not in PER_RUN}
        rows.setdefault(json.dumps([run["task"], run["optimizer"], config], sort_keys=True), []).append(run)
    lines = ["| task | data | model | optimizer | rate | runs | metric | value | seconds |",
             "| --- | --- | --- | --- | ---: | ---: | --- | ---: | ---: |"]  # fmt: skip
    for group in sorted(rows.values(), key=_order):
        run = group[0]
        info = OPTIMIZERS.get(run["optimizer"])
        key, label, _ = _main(run)
        values = [_main(r)[2] for r in group if _main(r)[0] == key]
        value = f"{statistics.mean(values):.4g}" if values else "–"
        if len(values) > 1:
            value += f" ± {statistics.stdev(values):.2g}"
        seconds = statistics.mean(r.get("seconds") or 0 for r in group)
        config = run["config"]
        cells = [
            run["task"], (run.get("dataset") or {}).get("name", "–"),
            config.get("model_name") or config.get("unet") or f"hidden {config.get('hidden_size', '–')}",
            info.title if info else run["optimizer"], f"{config.get('learning_rate', 0):g}",
            len(group), label, value, f"{seconds:.0f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines)


def _main(run: Mapping[str, Any]) -> tuple[str, str, float]:
    shown = shown_metrics(task_of(run), run["metrics"])
    return shown[0] if shown else ("", "–", float("nan"))


def _order(group: list[Mapping[str, Any]]) -> tuple[Any, ...]:
    key = _main(group[0])[0]
    mean = statistics.mean(_main(run)[2] for run in group)
    lower = key in LOWER_IS_BETTER or key.startswith("frechet_distance")
    data = str((group[0].get("dataset") or {}).get("name"))
    return group[0]["task"], data, key, mean if lower else -mean
