"""What runs and comparisons leave in files, checked where it is read: others, even strangers, may have written it."""

# No `from __future__ import annotations`: see agr_hf/schema.py.
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from huggingface_hub.errors import StrictDataclassError

from agr_hf.errors import UserError
from agr_hf.schema import Number, check_entries, find_reason
from agr_hf.texts import one_line


class Cell(TypedDict):
    """Runs that differ in their seeds, and their folder."""

    optimizer: str
    settings: dict[str, Any]
    folder: str


class Row(TypedDict):
    """An optimizer against the baseline in one metric."""

    optimizer: str
    baseline: str
    settings: dict[str, Any]
    metric: str
    unit: str
    lower_is_better: bool
    values: list[Number]
    baseline_values: list[Number]
    n: int
    difference: Number
    low: Number | None
    high: Number | None
    margin: Number
    verdict: str


class ComparisonFile(TypedDict):
    """`comparison.json`, as far as reports need it."""

    task: str
    script: str
    arguments: list[str]
    margin: Number
    seeds: int
    diverged: list[str]
    device: str
    cpu_cores: int | None
    system: str
    versions: dict[str, str]


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number that a float holds."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1.7e308


def read_metrics(folder: Path) -> dict[str, Any] | None:
    """The metrics of a run that is done: numbers, and None for what is not finite. None where there are none."""
    metrics = _read_json(folder / "results.json").get("metrics")
    if not isinstance(metrics, dict):
        return None
    numbers = {
        key: value if is_number(value) else None
        for key, value in metrics.items()
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
    }
    return numbers or None


def read_run(path: Path) -> dict[str, Any]:
    """What reports show of a `results.json` beside its metrics; what has another form than a record's is left out."""
    found = _read_json(path)
    epochs, gradients = _as(list, found.get("epochs")), _as(dict, found.get("gradients"))
    epochs = [one for one in map(partial(_as, dict), epochs) if is_number(one.get("epoch")) and one["epoch"] > 0]
    return {
        "epochs": epochs,
        "trained": _describe_training(found, epochs),
        "seconds": found["seconds"] if is_number(found.get("seconds")) else None,
        "peak_memory_bytes": found["peak_memory_bytes"] if is_number(found.get("peak_memory_bytes")) else None,
        "effects": {
            name: of["effect"]
            for name, of in _as(dict, gradients.get("layers")).items()
            if is_number(_as(dict, of).get("effect"))
        },
    }


def _describe_training(found: Mapping[str, Any], epochs: list[dict[str, Any]]) -> str:
    """Data, model and length of a run in a few words, as far as its record says them."""
    data, config = _as(dict, found.get("dataset")), _as(dict, found.get("config"))
    numbers = {
        "training examples": data.get("examples"),
        "evaluated": data.get("evaluated"),
        "parameters": config.get("parameters"),
        "epochs": epochs[-1]["epoch"] if epochs else None,
    }
    names = (data.get("name"), config.get("model_name") or config.get("model_class"))
    words = [one_line(name)[:100] for name in names if isinstance(name, str) and name]
    shown = {what: f"{n:,}" if isinstance(n, int) else f"{n:g}" for what, n in numbers.items() if is_number(n)}
    return ", ".join([*words, *[f"{number} {what}" for what, number in shown.items()]])


def read_comparison(folder: Path) -> dict[str, Any]:
    """`comparison.json` of a folder, with its runs (see `read_run`) under "runs", in lists by the folder of a cell.

    Raises:
        UserError: there is none, or it is not whole.
    """
    if (folder / "results.json").exists() and not (folder / "comparison.json").exists():
        raise UserError(
            f"{folder} holds one run, and a report is of a comparison: agr-hf card {folder} shows the run; agr-hf compare "
            "SCRIPT --optim NAME NAME runs its script with several optimizers and writes a report"
        )
    try:
        found = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
        found = found if isinstance(found, dict) else {}
        check_entries(found, ComparisonFile)
        for key, schema in (("cells", Cell), ("comparisons", Row)):
            if not isinstance(found.get(key), list):
                raise ValueError(f"{key} is no list")
            check_entries(found[key], schema)
        _check_numbers(found["comparisons"])
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(f"{folder} holds no finished comparison of agr-hf compare ({find_reason(error)})") from None
    for cell in found["cells"]:
        if "/" in cell["folder"] or cell["folder"].startswith("."):  # a comparison may come from a stranger
            raise UserError(
                f"{folder} has runs in {cell['folder']!r}; it must be a folder's name, without / and leading dot"
            )
    runs = {
        cell["folder"]: [
            read_run(path) for path in sorted((folder / "runs" / cell["folder"]).glob("seed-*/results.json"))
        ]
        for cell in found["cells"]
    }
    return {**found, "name": folder.resolve().name, "runs": runs}


def _check_numbers(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        ends = [row["difference"], row["margin"], *[row[end] for end in ("low", "high") if row[end] is not None]]
        values = [*row["values"], *row["baseline_values"]]
        if not values or len(row["values"]) != len(row["baseline_values"]):
            raise ValueError("a comparison needs a value of both optimizers for each seed")
        known = [end for end in ends if end == end]  # NaN is an interval that there is not
        if row["margin"] <= 0 or not all(map(is_number, [*values, *known])):
            raise ValueError("a comparison has numbers that are none")


def _read_json(path: Path) -> dict[str, Any]:
    """A table; an empty one where there is none."""
    try:
        return _as(dict, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _as(kind: type, value: Any) -> Any:
    """A value of a kind; an empty one in the place of another."""
    return value if isinstance(value, kind) else kind()
