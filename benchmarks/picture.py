"""The picture of a run: ratios by model, and the cost for each parameter against the size."""

from __future__ import annotations

from pathlib import Path

from contestants import CLIPPED, REFERENCE, SIZES
from matplotlib.figure import Figure

from agr_hf.files import replaced_file

COLORS = {  # Okabe and Ito's, which colour-blind readers can tell apart
    REFERENCE: "#000000",
    CLIPPED: "#999999",
    "AGRAdamW": "#0072B2",
    "AGRAdamW agr=False": "#56B4E9",
    "AGRAdamW max_grad_norm": "#D55E00",
    "AdaL": "#009E73",
}


def draw(results: dict, path: Path) -> None:
    rows = [row for row in results["rows"] if row["status"] == "measured" and row["contestant"] in COLORS]
    bars = [row for row in rows if row["model"] not in SIZES and row["contestant"] != REFERENCE]
    curve = [row for row in rows if row["model"] in SIZES]
    # White behind it, so that it reads the same on light and dark pages.
    models = list(dict.fromkeys(row["model"] for row in bars))
    height = max(4.0, 1.5 + 0.75 * len(models))
    figure = Figure(figsize=(12, height), facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_ratios(left, bars, models)
    draw_curve(right, curve)
    threads = f", {results['torch_threads']} CPU threads"
    figure.suptitle(f"One optimizer step, float32: {results['device']}{threads}, torch {results['versions']['torch']}")
    with replaced_file(path) as temporary:
        figure.savefig(temporary, dpi=130, facecolor="white")


def draw_ratios(axes, bars: list[dict], models: list[str]) -> None:
    names = [name for name in COLORS if any(row["contestant"] == name for row in bars)]
    width = 0.8 / max(len(names), 1)
    for offset, name in enumerate(names):
        mine = [row for row in bars if row["contestant"] == name]
        places = [models.index(row["model"]) + width * (offset - (len(names) - 1) / 2) for row in mine]
        axes.barh(places, [row["ratio"] for row in mine], width, color=COLORS[name], label=name)
    axes.axvline(1.0, color=COLORS[REFERENCE], linewidth=1, linestyle="--", label=f"{REFERENCE} = 1")
    axes.set_yticks(range(len(models)), models)
    axes.invert_yaxis()
    axes.set_xlabel(f"time as a ratio to {REFERENCE} (lower is faster)")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="small", loc="best")


def draw_curve(axes, curve: list[dict]) -> None:
    for name, color in COLORS.items():
        mine = sorted((row for row in curve if row["contestant"] == name), key=lambda row: row["parameters"])
        if mine:
            sizes = [row["parameters"] for row in mine]
            nanoseconds = [1e6 * row["milliseconds"] / row["parameters"] for row in mine]
            axes.plot(sizes, nanoseconds, color=color, marker="o", markersize=4, label=name)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("parameters, in tensors of at most a million elements")
    axes.set_ylabel("nanoseconds for each parameter")
    axes.grid(alpha=0.3)
    if curve:
        axes.legend(fontsize="small")
