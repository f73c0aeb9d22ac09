"""Charts as SVG text for a report, in the page's colours; lines differ by dashes and labels, not by colour alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

DASHES = ("none", "7 4", "2 3", "10 3 2 3", "4 2", "1 4")
WIDTH, LEFT, RIGHT = 480, 52, 14


@dataclass(frozen=True)
class Series:
    """A line with a band around it: points (x, middle, low, high), and what it is called."""

    label: str
    points: Sequence[tuple[float, float, float, float]]


@dataclass(frozen=True)
class Interval:
    """A difference with its interval, the differences of the single seeds, and what it is called."""

    label: str
    middle: float
    low: float
    high: float
    single: Sequence[float]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, some `about` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def draw_curves(series: Sequence[Series], title: str, x_title: str) -> str:
    """Lines over epochs, each with a band."""
    points = [point for one in series for point in one.points]
    x_of, x_ticks = _scale([x for x, *_ in points], LEFT, WIDTH - RIGHT)
    y_of, y_ticks = _scale([y for _, _, low, high in points for y in (low, high)], 230, 14)
    parts = _axes(x_of, x_ticks, y_of, y_ticks, 230, 14)
    for index, one in enumerate(series):
        forth = [f"{x_of(x):.1f},{y_of(high):.1f}" for x, _, _, high in one.points]
        back = [f"{x_of(x):.1f},{y_of(low):.1f}" for x, _, low, _ in reversed(one.points)]
        parts.append(f'<polygon class="band s{index % 6}" points="{" ".join([*forth, *back])}"/>')
    for index, one in enumerate(series):
        line = " ".join(f"{x_of(x):.1f},{y_of(middle):.1f}" for x, middle, _, _ in one.points)
        parts.append(
            f'<polyline class="line s{index % 6}" stroke-dasharray="{DASHES[index % 6]}" points="{line}">'
            f"<title>{escape(one.label)}</title></polyline>"
        )
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="266" text-anchor="middle">{escape(x_title)}</text>')
    last = ", ".join(f"{one.label} ends at {one.points[-1][1]:.4g}" for one in series)
    return _svg(parts, 276, f"{title} by {x_title}: {last}")


def draw_intervals(rows: Sequence[Interval], margin: float, title: str) -> str:
    """Differences on one scale: zero, the margin as a band, an interval and its middle for each row, seeds as ticks."""
    top, height = 22, 44
    bottom = top + height * len(rows)
    reach = [value for row in rows for value in (row.low, row.high, *row.single) if math.isfinite(value)]
    x_of, x_ticks = _scale([*reach, -margin, margin, 0.0], 16, WIDTH - 16)
    parts = [
        f'<rect class="margin" x="{x_of(-margin):.1f}" y="{top}" width="{x_of(margin) - x_of(-margin):.1f}" '
        f'height="{bottom - top}"/>',
        f'<line class="axis" x1="{x_of(0):.1f}" x2="{x_of(0):.1f}" y1="{top}" y2="{bottom}"/>',
        '<text x="16" y="14">worse</text>',
        f'<text x="{WIDTH - 16}" y="14" text-anchor="end">better</text>',
    ]
    for index, row in enumerate(rows):
        y = top + height * index + 30
        parts.append(f'<text x="16" y="{y - 12}">{escape(row.label)}</text>')
        parts += [
            f'<line class="seed" x1="{x_of(v):.1f}" x2="{x_of(v):.1f}" y1="{y - 6}" y2="{y + 6}"/>' for v in row.single
        ]
        if math.isfinite(row.low):
            parts.append(
                f'<line class="line s0" x1="{x_of(row.low):.1f}" x2="{x_of(row.high):.1f}" y1="{y}" y2="{y}"/>'
            )
            for end in (row.low, row.high):
                parts.append(
                    f'<line class="line s0" x1="{x_of(end):.1f}" x2="{x_of(end):.1f}" y1="{y - 6}" y2="{y + 6}"/>'
                )
        parts.append(f'<circle class="dot" cx="{x_of(row.middle):.1f}" cy="{y}" r="4.5"/>')
    for tick in x_ticks:
        parts.append(f'<text x="{x_of(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{_signed(tick)}</text>')
    said = "; ".join(f"{row.label}: {row.middle:+.3g}, 95% interval {row.low:+.3g} to {row.high:+.3g}" for row in rows)
    return _svg(parts, bottom + 24, f"{title}: {said}")


def _signed(value: float) -> str:
    return f"{value:+g}" if value else "0"


def sample(index: int) -> str:
    """A piece of the line that stands for a series, for a legend."""
    return (
        f'<svg class="sample" viewBox="0 0 44 10" aria-hidden="true"><line class="line s{index % 6}" x1="1" x2="43" y1="5" '
        f'y2="5" stroke-dasharray="{DASHES[index % 6]}"/></svg>'
    )


def _scale(values: Sequence[float], start: float, end: float) -> tuple[Callable[[float], float], list[float]]:
    """Place of a value between two ends of the picture, and the ticks."""
    low, high = min(values), max(values)
    if high == low:
        low, high = low - 0.5, high + 0.5
    room = 0.03 * (high - low)
    low, high = low - room, high + room
    return lambda value: start + (value - low) / (high - low) * (end - start), ticks(low, high)


def _axes(
    x_of: Callable[[float], float], x_ticks: Sequence[float], y_of: Callable[[float], float], y_ticks: Sequence[float],
    bottom: float, top: float,
) -> list[str]:  # fmt: skip
    parts = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>',
             f'<line class="axis" x1="{LEFT}" x2="{LEFT}" y1="{top}" y2="{bottom}"/>']  # fmt: skip
    for x in x_ticks:
        parts.append(f'<text x="{x_of(x):.1f}" y="{bottom + 18}" text-anchor="middle">{x:g}</text>')
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y_of(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    return parts


def _svg(parts: Sequence[str], height: float, description: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(description)}">'
        f"<title>{escape(description)}</title>{''.join(parts)}</svg>"
    )
