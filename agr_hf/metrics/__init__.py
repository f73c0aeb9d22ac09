"""Local `evaluate` modules: `evaluate.load(metric_path("sop_accuracy"))` needs no network."""

from __future__ import annotations

from pathlib import Path


def metric_path(name: str) -> str:
    """The folder of a module of this package, for `evaluate.load`.

    Raises:
        ValueError: there is no such module; the message names those there are.
    """
    here = Path(__file__).parent
    known = sorted(path.stem for path in here.glob("*/*.py") if path.stem == path.parent.name)
    if name not in known:
        raise ValueError(f"there is no metric {name!r}; there are {', '.join(known)}")
    return str(here / name)
