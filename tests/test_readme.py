"""The numbers of the README are those of its JSON files, and what it names is there."""

import json
import re
from pathlib import Path

import pytest

from agr_hf.cli import parser
from agr_hf.experiments.demo import mean_and_deviation
from agr_hf.optim.registry import optimizer_info

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODELS = ("bert-small", "bert-base", "24x1M", "llama-7b-lora", "300x64x64")
# Rows of the table of speed, and the contestants of the benchmark; a row may show two.
ROWS = {
    "**AGRAdamW**": ["AGRAdamW"],
    "AGRAdamW, agr=False": ["AGRAdamW agr=False"],
    "`clip_grad_norm_`, then torch AdamW fused": ["clip + torch AdamW fused"],
    "**AGRAdamW, max_grad_norm**": ["AGRAdamW max_grad_norm"],
    "AdaL": ["AdaL"],
    "AdaL, weight decay (L2: the parameter is read twice)": ["AdaL with L2 decay"],
    "Adan / AGRAdan": ["Adan", "AGRAdan"],
    "timm's Adan": ["timm Adan"],
    "torch AdamW foreach": ["torch AdamW foreach"],
}


def results(name):
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


def ratios(found, contestant, key="ratio", models=MODELS):
    rows = {row["model"]: row for row in found["rows"] if row["contestant"] == contestant}
    return [rows[model][key] for model in models]


def cells(head):
    rows = [line.strip("|").split("|")[1:] for line in README.splitlines() if line.startswith(f"| {head} |")]
    (row,) = [row for row in rows if len(row) == len(MODELS)]
    return [cell.strip(" *") for cell in row]


@pytest.mark.parametrize("row", ROWS)
def test_the_table_of_speed_is_the_benchmarks(row):
    found = results("step-cpu-2-threads-models")
    columns = zip(*[ratios(found, contestant) for contestant in ROWS[row]], strict=True)
    shown = [[float(value) for value in cell.split("/")] for cell in cells(row)]
    for numbers, column in zip(shown, columns, strict=True):
        assert numbers == pytest.approx(column, abs=0.0051)


def test_the_sentences_on_speed_are_those_of_the_tables():
    found, older = results("step-cpu-2-threads-models"), results("step-cpu-2-threads-avx2")
    against = ratios(found, "AGRAdamW max_grad_norm", "ratio_against")
    alone = ratios(found, "AGRAdamW max_grad_norm")
    assert (
        f"costs {min(against):.1f} to {max(against):.1f} of clipping and torch's fused AdamW, and {min(alone):.1f} to "
        f"{max(alone):.1f} of AdamW's step" in README
    )
    tiny = [ratios(of, "AGRAdamW", models=["1000x8"])[0] for of in (found, older)]
    words = " ".join(README.split())
    times = found["trainer"]["milliseconds"]
    assert f"take {times['agr_adamw']:.0f} ms with" in words
    assert f"and {times['adamw_torch_fused']:.0f} ms with" in words
    assert f"`adamw_torch_fused`: {found['trainer']['ratio']:.2f}." in words
    assert f"1,000 of 8 elements take {tiny[0]:.2f}" in words
    numbers = [f"{value:.2f}" for value in ratios(older, "AGRAdamW")]
    assert f"{', '.join(numbers[:-1])} and {numbers[-1]} in the order of the table, {tiny[1]:.2f} for" in words
    assert f"and {older['trainer']['ratio']:.2f} for Trainer's clipping" in words
    memory = [r["extra_memory_mib"] for r in found["rows"] if r["contestant"].startswith(("AGR", "Ada"))]
    assert f"({max(memory):.1f} MiB at most)" in words


@pytest.mark.parametrize("name", ["adamw", "agr_adamw", "adal"])
def test_the_table_of_the_demo_is_the_demos(name):
    runs = [run["metrics"] for run in results("demo")["runs"] if run["optimizer"] == name]
    accuracy = mean_and_deviation([100 * run["test_accuracy"] for run in runs], 2)
    loss = mean_and_deviation([run["test_loss"] for run in runs], 4)
    assert f"| {optimizer_info(name).title} | {accuracy} | {loss} |" in README


@pytest.mark.parametrize("claim", ["agr-digits", "agr-cifar"])
def test_the_differences_are_those_of_the_claims(claim):
    effect = json.loads((ROOT / f"docs/claims/{claim}.json").read_text())["effect"]
    difference, low, high = re.search(r"points: ([+-][\d.]+) \(([+-][\d.]+) to ([+-][\d.]+)\)", effect).groups()
    assert f"{difference} points ({low} to {high})" in " ".join(README.split())


def test_commands_and_links_exist():
    commands = next(action for action in parser()._actions if action.dest == "command").choices
    for command in re.findall(r"agr-hf ([a-z]+)", README):
        assert command in commands
    for link in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / link).exists(), link
