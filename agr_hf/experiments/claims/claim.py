"""What a claim is: where a paper makes it, what would confirm or contradict it, how it is measured and judged."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy import special

VERDICTS = ("confirmed", "in part", "cannot tell", "contradicted")
SIZES = ("small", "gpu", "published")


@dataclass(frozen=True)
class Finding:
    """What a measurement says of a claim.

    Attributes:
        verdict: one of `VERDICTS`.
        effect: how much, with its interval, in a sentence.
        n: seeds, or cases that were looked at.
    """

    verdict: str
    effect: str
    n: int


@dataclass(frozen=True)
class Setting:
    """How a claim is measured at a size.

    Attributes:
        seeds: of each optimizer.
        options: of the measurement.
        output: folder for runs, which goes on where it was.
        arguments: of the user for the training script, such as the place of files.
        workers: runs at a time.
    """

    seeds: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    output: Path = Path("claims")
    arguments: tuple[str, ...] = ()
    workers: int = 1


@dataclass(frozen=True)
class Claim:
    """A claim of a paper.

    Attributes:
        name: for the command line.
        paper: "AGR", "AdaL" or "agr_hf".
        where: theorem, table, figure or section.
        says: the claim.
        confirmed_by, contradicted_by: what would do so.
        measure: takes a setting and returns what is kept as JSON.
        judge: takes that JSON, and no other thing: a verdict can be given again by anybody.
        sizes: settings by size; what is missing is not offered.
        draw: takes that JSON and the path of a PNG, where a picture says more.
    """

    name: str
    paper: str
    where: str
    says: str
    confirmed_by: str
    contradicted_by: str
    measure: Callable[[Setting], dict[str, Any]]
    judge: Callable[[Mapping[str, Any]], Finding]
    sizes: Mapping[str, Setting]
    draw: Callable[[Mapping[str, Any], Path], None] | None = None


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95% interval by Student's t; all of them the value itself where there is one."""
    mean, n = statistics.fmean(values), len(values)
    half = float(special.stdtrit(n - 1, 0.975)) * statistics.stdev(values) / n**0.5 if n > 1 else 0.0
    return mean, mean - half, mean + half
