"""Charts as SVG text for a report, in the page's colours; lines differ by dashes and labels, not by colour alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, pairwise

DASHES = ("none", "7 4", "2 3", "10 3 2 3", "4 2", "1 4")
MARKERS = (
    "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0z",
    "M-4.5,-4.5h9v9h-9z",
    "M0,-6L5.5,4.5H-5.5z",
    "M0,-6.5L5,0L0,6.5L-5,0z",
)
WIDTH, LEFT, RIGHT = 480, 52, 14
KEYFRAMES = 200  # of an animated line

# The colours of a page with charts, and the rules that use them.
LIGHT = """--ink: #1b1f24; --soft: #57606a; --page: #ffffff; --line: #d0d7de; --margin: #e7ecf1;
  --s0: #0b5cad; --s1: #a3430b; --s2: #2f6f31; --s3: #7a2f8f; --s4: #7d6608; --s5: #a01f4c;"""
DARK = """--ink: #e6edf3; --soft: #9aa5b1; --page: #0f1419; --line: #30363d; --margin: #1f2933;
  --s0: #6cb2ff; --s1: #ffa36b; --s2: #7ccf80; --s3: #d79bf0; --s4: #e3c65b; --s5: #ff8fb3;"""
RULES = """svg text { font: 13px system-ui, sans-serif; fill: var(--ink); }
svg.sample { width: 2.75rem; height: .625rem; display: inline-block; vertical-align: middle; }
.axis { stroke: var(--soft); } .grid { stroke: var(--line); stroke-width: .5; } .margin { fill: var(--margin); }
.line { fill: none; stroke-width: 2; } .band { opacity: .14; stroke: none; } .seed { stroke: var(--soft); opacity: .45; }
.dot { fill: var(--s0); } .minimum { stroke: var(--ink); stroke-width: 1.5; }
""" + "\n".join(
    f".line.s{i} {{ stroke: var(--s{i}); }} .band.s{i}, .marker.s{i} {{ fill: var(--s{i}); }}" for i in range(6)
)


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


@dataclass(frozen=True)
class Trajectory:
    """The finite points (x, y) that an optimizer visits, and what it is called."""

    label: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Shares:
    """Two shares of a gradient's length, what AGR takes and what batches differ by, and the layer's name."""

    label: str
    effect: float
    noise: float


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
        _line("axis", x_of(0), x_of(0), top, bottom),
        '<text x="16" y="14">worse</text>',
        f'<text x="{WIDTH - 16}" y="14" text-anchor="end">better</text>',
    ]
    for index, row in enumerate(rows):
        y = top + height * index + 30
        parts.append(f'<text x="16" y="{y - 12}">{escape(row.label)}</text>')
        parts += [_line("seed", x_of(value), x_of(value), y - 6, y + 6) for value in row.single]
        if math.isfinite(row.low):
            parts.append(_line("line s0", x_of(row.low), x_of(row.high), y, y))
            parts += [_line("line s0", x_of(end), x_of(end), y - 6, y + 6) for end in (row.low, row.high)]
        parts.append(f'<circle class="dot" cx="{x_of(row.middle):.1f}" cy="{y}" r="4.5"/>')
    for tick in x_ticks:
        parts.append(f'<text x="{x_of(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{_signed(tick)}</text>')
    said = "; ".join(
        f"{row.label}: {row.middle:+.3g}, "
        + (f"95% interval {row.low:+.3g} to {row.high:+.3g}" if math.isfinite(row.low) else "no interval")
        for row in rows
    )
    return _svg(parts, bottom + 24, f"{title}: {said}")


def draw_trajectories(
    contours: Sequence[Sequence[tuple[float, float]]], trajectories: Sequence[Trajectory], minimum: tuple[float, float],
    extent: tuple[float, float, float, float], title: str, seconds: float = 0.0,
) -> str:  # fmt: skip
    """Trajectories over contour lines, each with a marker at its last point; a cross at the minimum.

    Args:
        extent: left, right, bottom and top of the picture.
        seconds: how long the lines take to appear, each step in the same time; 0 draws them at once.
    """
    left, right, bottom, top = extent
    high, low = 8, 420
    scale_x, scale_y = (WIDTH - RIGHT - LEFT) / (right - left), (low - high) / (top - bottom)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        # Far away is as good as out of sight; SVG's numbers end at those of float32.
        x, y = LEFT + (point[0] - left) * scale_x, low - (point[1] - bottom) * scale_y
        return min(max(x, -1e4), 1e4), min(max(y, -1e4), 1e4)

    def join(points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, points))

    clip = f"plot-{abs(hash((title, seconds, tuple(one.label for one in trajectories)))):x}"
    lines = "".join(f"M{join(line)}" for line in contours)
    parts = [
        f'<clipPath id="{clip}"><rect x="{LEFT}" y="{high}" width="{WIDTH - RIGHT - LEFT}" height="{low - high}"/>'
        "</clipPath>",
        f'<g clip-path="url(#{clip})"><path class="grid contour" fill="none" d="{lines}"/>',
    ]
    markers = []
    for index, one in enumerate(trajectories):
        name = f"<title>{escape(one.label)}</title>"
        shown = one.points[:: max(1, len(one.points) // KEYFRAMES)]
        shown = [*shown, one.points[-1]]
        last = ",".join(f"{value:.1f}" for value in place(one.points[-1]))
        grows = moves = dashes = ""
        if seconds:
            timing = f'dur="{seconds:g}s" fill="freeze"'
            places = [place(point) for point in shown]
            lengths = list(accumulate((math.dist(*pair) for pair in pairwise(places)), initial=0.0))
            rest = ";".join(f"{1 - length / (lengths[-1] or 1.0):.4f}" for length in lengths)
            dashes = ' pathLength="1" stroke-dasharray="1 1"'
            grows = f'<animate attributeName="stroke-dashoffset" values="{rest}" {timing}/>'
            stops = ";".join(f"{x:.1f},{y:.1f}" for x, y in places)
            moves = f'<animateTransform attributeName="transform" type="translate" values="{stops}" {timing}/>'
        parts.append(
            f'<polyline class="line s{index % 6}"{dashes} points="{join(shown if seconds else one.points)}">'
            f"{name}{grows}</polyline>"
        )
        markers.append(
            f'<path class="marker s{index % 6}" d="{MARKERS[index % 4]}" transform="translate({last})">{name}{moves}</path>'
        )
    x, y = place(minimum)
    parts += [*markers, f'<path class="minimum" d="M{x - 11:.1f},{y:.1f}h22M{x:.1f},{y - 11:.1f}v22"/>', "</g>"]
    for tick in ticks(left, right):
        parts.append(f'<text x="{place((tick, 0))[0]:.1f}" y="{low + 18}" text-anchor="middle">{tick:g}</text>')
    for tick in ticks(bottom, top):
        parts.append(f'<text x="{LEFT - 6}" y="{place((0, tick))[1] + 4:.1f}" text-anchor="end">{tick:g}</text>')
    ends = "; ".join(f"{one.label} ends at ({one.points[-1][0]:.3g}, {one.points[-1][1]:.3g})" for one in trajectories)
    return _svg(parts, low + 26, f"{title}: {ends}")


def draw_shares(rows: Sequence[Shares], title: str) -> str:
    """A row for each layer: a dot at AGR's effect and a bar at the batches' noise, on a logarithmic scale to 100%."""
    top, height = 6, 38
    bottom = top + height * len(rows)
    smallest = min((value for row in rows for value in (row.effect, row.noise) if value > 0), default=0.1)
    decades = range(min(-1, math.floor(math.log10(smallest))), 1)

    def place(share: float) -> float:
        reach = 1 - max(math.log10(share), decades[0]) / decades[0] if share > 0 else 0.0
        return 24 + min(reach, 1.0) * (WIDTH - 48)

    parts = []
    for decade in decades:
        x = place(10.0**decade)
        parts.append(_line("grid", x, x, top, bottom))
        if decade % max(1, len(decades) // 5) == 0:
            parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{100 * 10.0**decade:g}%</text>')
    for index, row in enumerate(rows):
        y = top + height * index + 28
        effect, noise = place(row.effect), place(row.noise)
        parts += [
            f'<text x="24" y="{y - 10}">{escape(row.label)}</text>',
            _line("grid", 24, WIDTH - 24, y, y),
            f'<line class="axis" stroke-width="3" x1="{noise:.1f}" x2="{noise:.1f}" y1="{y - 7}" y2="{y + 7}"/>',
            f'<circle class="dot" cx="{effect:.1f}" cy="{y}" r="4.5"/>',
        ]
    said = "; ".join(f"{row.label}: effect {100 * row.effect:.2g}%, noise {100 * row.noise:.2g}%" for row in rows)
    return _svg(parts, bottom + 24, f"{title}: {said}")


def draw_marker(index: int) -> str:
    """The marker of a trajectory, for a legend."""
    return (
        '<svg class="sample" viewBox="-22 -7 44 14" aria-hidden="true">'
        f'<line class="line s{index % 6}" x1="-20" x2="0" y1="0" y2="0"/>'
        f'<path class="marker s{index % 6}" d="{MARKERS[index % 4]}"/></svg>'
    )


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
    parts = [_line("axis", LEFT, WIDTH - RIGHT, bottom, bottom), _line("axis", LEFT, LEFT, top, bottom)]
    for x in x_ticks:
        parts.append(f'<text x="{x_of(x):.1f}" y="{bottom + 18}" text-anchor="middle">{x:g}</text>')
    for y in y_ticks:
        parts.append(_line("grid", LEFT, WIDTH - RIGHT, y_of(y), y_of(y)))
        parts.append(f'<text x="{LEFT - 6}" y="{y_of(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    return parts


def _line(kind: str, x1: float, x2: float, y1: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _svg(parts: Sequence[str], height: float, description: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(description)}">'
        f"<title>{escape(description)}</title>{''.join(parts)}</svg>"
    )
