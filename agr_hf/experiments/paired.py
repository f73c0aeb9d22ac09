"""Paired comparisons of two optimizers over seeds: intervals, equivalence, and what they say in words.

Runs of one seed share their initial weights, data and their order, so what is compared is the difference within each seed.
The statistics are SciPy's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
from scipy import special, stats

from agr_hf.tasks.runs import lower_is_better

LEVEL = 0.05
BOOTSTRAP_FROM = 8  # seeds: with fewer, resampling cannot reach the tails of a 95% interval


@dataclass(frozen=True)
class Paired:
    """The difference of two optimizers over the seeds that both finished; positive is better for the first.

    Attributes:
        n: seeds.
        difference: mean of the differences.
        low, high: 95% paired t interval; NaN with one seed, or where all differences are the same.
        deviation: standard deviation of the paired differences.
        unpaired_deviation: that of differences of two runs of unlike seeds.
        p: of a paired t test of no difference, two-sided.
        p_equivalence: of two one-sided tests that the difference lies within the margin.
        margin: a difference that does not matter, in the metric's unit.
        verdict: in words, after `give_verdicts`.
    """

    n: int
    difference: float
    low: float
    high: float
    deviation: float
    unpaired_deviation: float
    p: float
    p_equivalence: float
    margin: float
    verdict: str = ""


def compare_paired(
    values: Sequence[float], baseline: Sequence[float], margin: float, *, lower_is_better: bool
) -> Paired:
    """Compare two optimizers on the same seeds.

    Args:
        values: a finite number for each seed, at least one.
        baseline: those of the other optimizer, in the same order.
        margin: > 0, in the unit of the values.
        lower_is_better: of the values; the differences are turned so that positive is better.

    Raises:
        ValueError: there is no seed, or the lists differ in length.
    """
    if len(values) != len(baseline) or not values:
        raise ValueError(
            f"compare_paired takes a value of both for each seed, but {len(values)} and {len(baseline)} came"
        )
    sign = -1.0 if lower_is_better else 1.0
    x, y = numpy.asarray(values, float), numpy.asarray(baseline, float)
    differences = sign * (x - y)
    n, mean = len(differences), float(differences.mean())
    if n < 2:
        return Paired(n, mean, math.nan, math.nan, math.nan, math.nan, math.nan, math.nan, margin)
    deviation = float(differences.std(ddof=1))
    unpaired = math.hypot(float(x.std(ddof=1)), float(y.std(ddof=1)))
    error = deviation / math.sqrt(n)
    # Differences that are all alike leave nothing to estimate their spread from: a metric that counts few examples is
    # often the same in two seeds, and that is no evidence.
    if deviation <= 1e-12 * max(float(numpy.abs(x).max()), float(numpy.abs(y).max())):
        return Paired(n, mean, math.nan, math.nan, 0.0, unpaired, math.nan, math.nan, margin)
    half = float(special.stdtrit(n - 1, 1 - LEVEL / 2)) * error
    p = 2 * _tail(n, abs(mean) / error)
    p_equivalence = max(_tail(n, (margin + mean) / error), _tail(n, (margin - mean) / error))
    return Paired(n, mean, mean - half, mean + half, deviation, unpaired, p, p_equivalence, margin)


def compare_metric(metric: str, values: Sequence[float], baseline: Sequence[float], margin: float) -> Paired:
    """`compare_paired` by what the name of a metric says of it; accuracies are in percent.

    Args:
        metric, values, baseline: of two optimizers, as they are shown.
        margin: points of an accuracy, and of other metrics percent of the baseline's mean.
    """
    if not is_percent(metric):
        margin = margin / 100 * abs(float(numpy.mean(baseline))) or 1e-12
    return compare_paired(values, baseline, margin, lower_is_better=lower_is_better(metric))


def is_percent(metric: str) -> bool:
    """Whether a metric is shown in percent; runs keep it from 0 to 1."""
    return "accuracy" in metric


def pair_metric(
    metric: str, runs: Mapping[int, Mapping[str, Any]], baseline: Mapping[int, Mapping[str, Any]], margin: float
) -> tuple[dict[str, Any], Paired] | None:
    """One metric of two optimizers, over the seeds in which both have a number: what a table keeps of it, and what it says.

    Args:
        metric: its name.
        runs, baseline: metrics by seed; a value that was not finite is None.
        margin: see `compare_metric`.

    Returns:
        None where no seed has both.
    """
    seeds = [
        s for s in runs if s in baseline and runs[s].get(metric) is not None and baseline[s].get(metric) is not None
    ]
    if not seeds:
        return None
    scale = 100.0 if is_percent(metric) else 1.0
    values, others = ([scale * float(of[seed][metric]) for seed in seeds] for of in (runs, baseline))
    kept = {
        "metric": metric, "unit": "%" if is_percent(metric) else "", "lower_is_better": lower_is_better(metric),
        "seeds": seeds, "values": values, "baseline_values": others,
    }  # fmt: skip
    return kept, compare_metric(metric, values, others, margin)


def _tail(n: int, t: float) -> float:
    """The chance that Student's t of n values exceeds `t`; SciPy's `ttest_rel` takes a hundred times as long for it."""
    return float(special.stdtr(n - 1, -t))


def bootstrap_interval(values: Sequence[float], baseline: Sequence[float]) -> tuple[float, float] | None:
    """95% interval of the mean difference by the BCa bootstrap; None with fewer than 8 seeds, or where it has no answer."""
    if len(values) < BOOTSTRAP_FROM:
        return None
    differences = numpy.asarray(values, float) - numpy.asarray(baseline, float)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy warns where BCa has no answer, and gives NaN
        found = stats.bootstrap((differences,), numpy.mean, confidence_level=1 - LEVEL, random_state=0)
    low, high = map(float, found.confidence_interval)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def give_verdicts(table: Sequence[Paired]) -> list[Paired]:
    """The comparisons of one table with their verdicts, at a level of 5% for all of them together (Holm).

    A difference and equivalence are two families of tests, each corrected for itself.
    """
    different = _holm([row.p for row in table])
    equivalent = _holm([row.p_equivalence for row in table])
    return [
        replace(row, verdict=_verdict(row, d, e, len(table)))
        for row, d, e in zip(table, different, equivalent, strict=True)
    ]


def _holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values by Holm's step-down method; NaN stays, and counts for none."""
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=p_values.__getitem__)
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _verdict(row: Paired, p: float, p_equivalence: float, tests: int) -> str:
    within = p_equivalence < LEVEL
    if p < LEVEL:
        return ("better" if row.difference > 0 else "worse") + (", but within the margin" if within else "")
    return "equivalent within the margin" if within else f"cannot tell ({seeds_needed(row, tests)})"


def seeds_needed(row: Paired, tests: int = 1) -> str:
    """About how many seeds would tell, at 80% power, that the difference seen is one, or that it is within the margin, in a
    table of so many tests."""
    if row.n < 2:
        return "one seed says nothing about the next"
    if row.deviation == 0.0:
        return f"the difference is the same in all {row.n} seeds, which says nothing about its spread"
    effect = max(abs(row.difference), row.margin - abs(row.difference), 1e-300)
    quantiles = float(stats.norm.ppf(1 - LEVEL / tests / 2) + stats.norm.ppf(0.8))
    needed = (quantiles * row.deviation / effect) ** 2
    if not needed < 10_000:  # or beyond all numbers
        return "more than 10,000 seeds would"
    return f"about {max(row.n + 1, math.ceil(needed) + 1):,} seeds would"
