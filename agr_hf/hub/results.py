"""A run's `results.json`, read as the text of a stranger that it may be."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NUMBER = (int, float)
SCALAR = (int, float, bool, str)


@dataclass(frozen=True)
class Table:
    """Fields by name, and those that must be there. Others may be there, of any kind."""

    fields: Mapping[str, Any]
    needed: tuple[str, ...] = ()


# A type or several, [entry], {str: value} or a Table; null is allowed for what is not needed and for numbers.
SHAPE = Table(
    {
        "task": str,
        "optimizer": str,
        "command": str,
        "metrics": {str: SCALAR},
        "config": Table(
            {"learning_rate": NUMBER, "hidden_size": int, "model_name": str, "base_model": str, "unet": str}
        ),
        "epochs": [Table({"epoch": NUMBER}, ("epoch",))],
        "dataset": Table(
            {
                "name": str,
                "hub_id": str,
                "revision": str,
                "config": str,
                "files": [str],
                "examples": int,
                "split": str,
                "evaluated": int,
                "complete": bool,
            }
        ),
        "gradients": Table({"measurements": int, "overall": {str: NUMBER}, "layers": {str: {str: NUMBER}}}),
        "optimizer_groups": [Table({"tensors": int, "parameters": int}, ("tensors", "parameters"))],
        "versions": {str: str},
        "processes": int,
        "seconds": NUMBER,
        "seed": int,
        "finished": str,
        "device": str,
        "system": str,
        "commit": str,
        "torch_threads": int,
    },
    ("task", "optimizer", "command", "metrics", "config", "epochs"),
)


def read_results(source: str | os.PathLike[str] | bytes) -> dict[str, Any]:
    """A run's `results.json`, from a folder, a file or its bytes: what is in it has the types that a run writes.

    Raises:
        ValueError: it is not there, not whole, or not of a run; the message says which.
    """
    if isinstance(source, bytes):
        name, content = "results.json", source
    else:
        path = Path(source)
        path = path / "results.json" if path.is_dir() else path
        name = str(path)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error.strerror}") from None
    try:
        results = json.loads(
            content.decode("utf-8"), parse_constant=_not_finite, parse_float=_finite, parse_int=_of_64_bits
        )
        json.dumps(results, ensure_ascii=False).encode("utf-8")  # half a character is no text
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply to be of a run") from None
    except ValueError as error:
        raise ValueError(f"{name} is no JSON of a run: {error}") from None
    check(results, SHAPE, name)
    return results


def check(value: Any, shape: Any, where: str) -> None:
    """Raise ValueError, with the place, where a value of JSON is not of a shape such as `SHAPE`."""
    if isinstance(shape, Table):
        _expect(isinstance(value, dict), value, "a table", where)
        for name in shape.needed:
            _expect(value.get(name) is not None, value.get(name), "needed", f"{where}: {name}")
        for name, of in shape.fields.items():
            if value.get(name) is not None:
                check(value[name], of, f"{where}: {name}")
    elif isinstance(shape, dict):
        _expect(isinstance(value, dict), value, "a table", where)
        for name, entry in value.items():
            if entry is not None or isinstance(shape[str], dict):
                check(entry, shape[str], f"{where}: {name!r}")
    elif isinstance(shape, list):
        _expect(isinstance(value, list), value, "a list", where)
        for index, entry in enumerate(value):
            check(entry, shape[0], f"{where}[{index}]")
    else:
        kinds = shape if isinstance(shape, tuple) else (shape,)
        allowed = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        _expect(allowed, value, " or ".join(kind.__name__ for kind in kinds), where)


def _expect(allowed: bool, value: Any, wanted: str, where: str) -> None:
    if not allowed:
        raise ValueError(
            f"{where} is {json.dumps(value)[:60]}, and must be {wanted}; it is not of a run of agr_hf's training scripts"
            if value is not None
            else f"{where} is missing; it is not of a run of agr_hf's training scripts"
        )


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _not_finite(text)


def _not_finite(text: str) -> float:
    raise ValueError(f"{text[:60]} is no finite number")


def _of_64_bits(text: str) -> int:
    if len(text) > 19:
        raise ValueError(f"{text[:60]} is larger than any number of a run")
    return int(text)
