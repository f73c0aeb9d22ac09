"""`agr-hf report`: comparisons as one HTML page that needs nothing else, and as Markdown."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from agr_hf.experiments import charts
from agr_hf.experiments.charts import Interval, Series, draw_curves, draw_intervals, sample
from agr_hf.experiments.paired import is_percent
from agr_hf.experiments.results import is_number, read_comparison
from agr_hf.files import replaced_file, write_text
from agr_hf.optim.registry import OPTIMIZERS
from agr_hf.tasks.runs import lower_is_better
from agr_hf.texts import code_span, markdown

LAYERS = 20  # shown, of those with the largest effect


def write_reports(folders: Sequence[Path], output: Path | None = None) -> list[Path]:
    """Write `report.html`, `report.md` and `differences.png` over comparisons; returns their paths.

    In the folder of a run, `agr-hf push` publishes the page, and the picture goes into the card.

    Args:
        folders: of `agr-hf compare`.
        output: folder for the files; that of the first comparison by default.

    Raises:
        UserError: a folder holds no finished comparison.
    """
    parts = [read_comparison(folder) for folder in folders]
    output = output or folders[0]
    output.mkdir(parents=True, exist_ok=True)
    paths = [output / name for name in ("report.html", "report.md", "differences.png")]
    write_text(paths[0], html_report(parts))
    write_text(paths[1], "\n".join(map(markdown_report, parts)))
    with replaced_file(paths[2]) as temporary:
        draw_differences([row for found in parts for row in found["comparisons"]], temporary)
    return paths


def draw_differences(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The intervals of all differences as PNG, each in units of its margin, so that they stand on one scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.4 * max(1, len(rows))), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(-1, 1, color="0.92", label="margin")
    axes.axvline(0, color="0.4", linewidth=1)
    for place, row in enumerate(reversed(rows)):
        ends = [row["difference"] if row[end] is None else row[end] for end in ("low", "high")]
        axes.plot([end / row["margin"] for end in ends], [place, place], color="tab:blue", marker="|")
        axes.plot(row["difference"] / row["margin"], place, "o", color="tab:blue")
    names = [
        f"{label(row)} minus {label(find_baseline(row))}, {words(row['metric'])}".replace("$", r"\$")  # no mathematics
        for row in reversed(rows)
    ]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("worse  ←  difference, in margins  →  better")
    axes.set_xscale("symlog", linthresh=1)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def label(row: Mapping[str, Any]) -> str:
    """An optimizer as readers see it: its title, its options and settings."""
    name, _, options = row["optimizer"].partition(",")
    title = OPTIMIZERS[name].title if name in OPTIMIZERS else name.rpartition(":")[2]
    more = [*options.split(",")] * bool(options) + [f"{key}={value}" for key, value in row["settings"].items()]
    return ", ".join([title, *more])


def markdown_report(found: Mapping[str, Any]) -> str:
    """One comparison as Markdown: the verdicts first."""
    lines = [
        f"# {markdown(found['script'])}: paired over seeds", "", *[f"- {markdown(text)}" for text in sentences(found)], "",
        markdown(method(found)), "",
        "| optimizer | baseline | metric | n | optimizer's mean | baseline's mean | difference | 95% interval | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in found["comparisons"]:
        own, other = (f"{statistics.mean(row[key]):.4g}{row['unit']}" for key in ("values", "baseline_values"))
        cells = [label(row), label(find_baseline(row)), row["metric"], str(row["n"]), own, other,
                 f"{row['difference']:+.3g}", interval_words(row), row["verdict"]]  # fmt: skip
        lines.append(f"| {' | '.join(map(markdown, cells))} |")
    if found["diverged"]:
        lines += ["", f"Not finite at the end, and in no pair: {'; '.join(map(markdown, found['diverged']))}."]
    lines += [
        "",
        *[f"- {key}: {(code_span if key == 'command' else markdown)(value)}" for key, value in conditions(found)],
        "",
    ]
    return "\n".join(lines)


def find_baseline(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"optimizer": row["baseline"], "settings": row["settings"]}


def sentences(found: Mapping[str, Any]) -> list[str]:
    """A verdict in words for each comparison."""
    return [
        f"{label(row)} against {label(find_baseline(row))}, {words(row['metric'])}: {row['verdict']}. Mean difference "
        f"{row['difference']:+.3g}{' points' if row['unit'] else ''}, 95% interval {interval_words(row)}, {row['n']} seeds."
        for row in found["comparisons"]
    ]


def words(metric: str) -> str:
    return metric.replace("_", " ")


def interval_words(row: Mapping[str, Any]) -> str:
    if row["low"] is None or math.isnan(row["low"]):
        return "none"
    return f"{row['low']:+.3g} to {row['high']:+.3g}"


def method(found: Mapping[str, Any]) -> str:
    """How the numbers came about, for readers of the report."""
    better = []
    for name, low in (("smaller", True), ("larger", False)):
        metrics = dict.fromkeys(words(row["metric"]) for row in found["comparisons"] if row["lower_is_better"] == low)
        if metrics:
            better.append(f"{name} is better: {', '.join(metrics)}")
    return (
        "Differences are within each seed (the same initial weights, data and order), and positive where the optimizer is "
        f"better than the baseline ({'; '.join(better)}); 95% intervals by Student's t. Verdicts hold at 5% for the whole "
        f"table (Holm). The margin is {found['margin']:g} points for metrics in percent, and {found['margin']:g}% of the "
        "baseline's mean for others."
    )


def conditions(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    search = found.get("search") or {"trials": 0, "tuned": {}}
    chosen = [f"{name}: {', '.join(f'{k} {v:.3g}' for k, v in of.items())}" for name, of in search["tuned"].items()]
    rows = {
        "command": shlex.join(_command(found)),
        "a run": next((run["trained"] for runs in found["runs"].values() for run in runs if run["trained"]), ""),
        "search": chosen
        and f"{search['trials']} trials for each optimizer, with a seed of their own; {'; '.join(chosen)}",
        "device": f"{found['device']}, {found['cpu_cores']} cores",
        "system": found["system"],
        "versions": ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
    }
    return [(key, str(value)) for key, value in rows.items() if value]


def _command(found: Mapping[str, Any]) -> list[str]:
    """What makes the comparison, with DIR for its folder."""
    optimizers = dict.fromkeys(cell["optimizer"] for cell in found["cells"])
    command = ["agr-hf", "compare", found["task"], "--optim", *optimizers]
    for key in dict.fromkeys(key for cell in found["cells"] for key in cell["settings"]):
        command += ["--set", f"{key}={','.join(dict.fromkeys(str(cell['settings'][key]) for cell in found['cells']))}"]
    for of in (found.get("search") or {}).get("search", []):
        ends = ",".join(f"{choice:g}" for choice in of["choices"]) or f"{of['low']:g}..{of['high']:g}"
        command += ["--search", f"{of['argument']}={ends}"]
    if found.get("search"):
        command += ["--trials", str(found["search"]["trials"])]
    if found.get("baseline", command[4]) != command[4]:
        command += ["--baseline", found["baseline"]]
    if found.get("metric"):
        command += ["--metric", found["metric"]]
    if found["margin"] != 0.2:
        command += ["--margin", f"{found['margin']:g}"]
    command += ["--seeds", str(found["seeds"]), "--output", "DIR"]
    return [*command, "--", *found["arguments"]] if found["arguments"] else command


def html_report(parts: Sequence[Mapping[str, Any]]) -> str:
    """Comparisons as one page: no script, no network, light and dark."""
    from jinja2 import Environment, StrictUndefined

    text = files("agr_hf.experiments").joinpath("report.html.jinja").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(text)
    title = "Does it help? " + ", ".join(dict.fromkeys(found["script"] for found in parts)) + ", paired over seeds"
    return template.render(title=title, style=charts, parts=[_part(found) for found in parts]) + "\n"


def _part(found: Mapping[str, Any]) -> dict[str, Any]:
    found = {**found, "runs": {label(cell): found["runs"][cell["folder"]] for cell in found["cells"]}}
    found["runs"] = {name: runs for name, runs in found["runs"].items() if runs}
    curves = _curves(found)
    layers_of, layers = _layers(found)
    target, costs = _costs(found)
    return {
        "name": found["name"],
        "sentences": sentences(found),
        "method": method(found),
        "intervals": _intervals(found),
        "rows": [_row(row) for row in found["comparisons"]],
        "diverged": found["diverged"],
        "legend": [{"label": name, "sample": sample(i)} for i, name in enumerate(found["runs"])],
        "curves": curves,
        "costs": costs,
        "target": target,
        "layers": layers,
        "layers_of": layers_of,
        "conditions": conditions(found),
    }


def _row(row: Mapping[str, Any]) -> dict[str, str]:
    own, other = (spread(row[key]) + row["unit"] for key in ("values", "baseline_values"))
    return {
        "optimizer": label(row), "metric": words(row["metric"]), "n": str(row["n"]), "mean": own, "baseline": other,
        "difference": f"{row['difference']:+.3g}", "interval": interval_words(row), "verdict": row["verdict"],
    }  # fmt: skip


def spread(values: Sequence[float]) -> str:
    """Their mean, and the standard deviation where there are several."""
    mean = f"{statistics.mean(values):.4g}"
    return f"{mean} ± {statistics.stdev(values):.2g}" if len(values) > 1 else mean


def _intervals(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """A chart for each metric, so that what stands on one scale has one unit."""
    charts = []
    for metric in dict.fromkeys(row["metric"] for row in found["comparisons"]):
        rows = [row for row in found["comparisons"] if row["metric"] == metric]
        drawn = []
        for row in rows:
            sign = -1 if row["lower_is_better"] else 1
            single = [sign * (a - b) for a, b in zip(row["values"], row["baseline_values"], strict=True)]
            low, high = (math.nan if row[end] is None else row[end] for end in ("low", "high"))
            name = f"{label(row)} minus {label(find_baseline(row))}"
            drawn.append(Interval(name, row["difference"], low, high, single))
        title = (
            f"{words(metric)}{', points' if rows[0]['unit'] else ''}: dot and bar are the mean and its 95% interval, "
            "ticks the seeds, the shaded band the margin"
        )
        charts.append({"title": title, "svg": draw_intervals(drawn, max(row["margin"] for row in rows), words(metric))})
    return charts


def _curves(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """Training and test curves: a chart for each number that every epoch of every run has."""
    runs = {name: [run["epochs"] for run in of if run["epochs"]] for name, of in found["runs"].items()}
    runs = {name: of for name, of in runs.items() if of}
    first = next(iter(runs.values()))[0][0] if runs else {}
    keys = [key for key, value in first.items() if key not in ("epoch", "step") and is_number(value)]
    charts = []
    for key in keys:
        series = []
        for name, of in runs.items():
            columns = zip(*[[(e["epoch"], e.get(key)) for e in epochs] for epochs in of], strict=False)
            points = []
            for column in columns:
                values = [value for _, value in column if is_number(value)]
                if values:
                    middle, wide = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
                    points.append((float(column[0][0]), middle, middle - wide, middle + wide))
            if len(points) > 1:
                series.append(Series(name, points))
        if series:
            title = words(key) + (" (training)" if key.startswith("train") else " (test)")
            charts.append({"title": title, "svg": draw_curves(series, title, "epoch")})
    return charts


def _costs(found: Mapping[str, Any]) -> tuple[str, list[dict[str, str]]]:
    """Time and memory; and the time to what the baseline ends with on average, by the first metric of the table."""
    first = found["comparisons"][0] if found["comparisons"] else None
    key, target = (first["metric"], statistics.fmean(first["baseline_values"])) if first else ("", math.nan)
    scale, lower = (100.0 if is_percent(key) else 1.0), lower_is_better(key)
    rows = []
    for name, runs in found["runs"].items():
        seconds = [run["seconds"] for run in runs if run["seconds"] is not None]
        if not seconds:
            continue
        steps = [
            run["epochs"][-1]["step"] for run in runs if run["epochs"] and is_number(run["epochs"][-1].get("step"))
        ]
        memory = [run["peak_memory_bytes"] for run in runs if run["peak_memory_bytes"] is not None]
        reached = []
        for run in runs:
            for epoch in run["epochs"] if run["seconds"] is not None else []:
                value = epoch.get(key)
                if is_number(value) and (scale * value <= target if lower else scale * value >= target):
                    reached.append(run["seconds"] * epoch["epoch"] / run["epochs"][-1]["epoch"])
                    break
        rows.append({
            "optimizer": name, "runs": str(len(runs)), "seconds": f"{statistics.median(seconds):.3g}",
            "step": f"{1000 * statistics.median(seconds) / statistics.median(steps):.3g}" if steps else "–",
            "memory": f"{statistics.median(memory) / 2**20:,.0f} MiB" if memory else "–",
            "reached": f"{len(reached)} of {len(runs)}",
            "target_seconds": f"{statistics.median(reached):.3g}" if reached else "–",
        })  # fmt: skip
    shown = f"the baseline's mean {words(key)} at the end, {target:.4g}{'%' if scale == 100.0 else ''}" if first else ""
    return shown, rows


def _layers(found: Mapping[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """The first optimizer whose runs measured the gradients, and the largest effects by layer."""
    for name, runs in found["runs"].items():
        effects: dict[str, list[float]] = {}
        for run in runs:
            for layer, effect in run["effects"].items():
                effects.setdefault(layer, []).append(effect)
        if effects:
            means = sorted(((statistics.fmean(values), layer) for layer, values in effects.items()), reverse=True)
            return name, [(layer, f"{mean:.1e}") for mean, layer in means[:LAYERS]]
    return "", []
