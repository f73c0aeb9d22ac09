"""The report of a comparison: what it says first, what it draws, and that it needs nothing and nobody's markup."""

import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from agr_hf.cli import main
from agr_hf.experiments.charts import Interval, Series, draw_curves, draw_intervals, ticks
from agr_hf.experiments.report import html_report, read_comparison, write_reports

EVIL = '<script>alert("x")</script>'


def comparison(folder, seeds=3, **changes):
    """A finished comparison of two optimizers, and the runs that it is of."""
    values, baseline = [91.0 + seed for seed in range(seeds)], [90.0 + 1.1 * seed for seed in range(seeds)]
    row = {
        "optimizer": "agr_adamw,agr_steps=10", "baseline": "adamw", "settings": {"scale": "2"}, "metric": "accuracy",
        "unit": "%", "lower_is_better": False, "seeds": list(range(seeds)), "values": values, "baseline_values": baseline,
        "bootstrap": None, "n": seeds, "difference": 0.9, "low": 0.65, "high": 1.15, "deviation": 0.1,
        "unpaired_deviation": 1.5, "p": 0.01, "p_equivalence": 0.9, "margin": 0.2, "verdict": "better",
    }  # fmt: skip
    names = {"adamw": "adamw,scale=2", "agr_adamw,agr_steps=10": "agr_adamw,agr_steps=10,scale=2"}
    found = {
        "task": "images", "script": "train.py", "arguments": ["--epochs", "2"], "margin": 0.2, "seeds": seeds,
        "cells": [{"optimizer": o, "settings": {"scale": "2"}, "folder": f} for o, f in names.items()],
        "search": None, "diverged": ["adamw, seed 7"], "comparisons": [row], "versions": {"torch": "2.14"},
        "device": "a CPU", "cpu_cores": 2, "torch_threads": 2, "system": "Linux",
    } | changes  # fmt: skip
    for name in names.values():
        for seed in range(seeds):
            run = folder / "runs" / name / f"seed-{seed}"
            run.mkdir(parents=True)
            epochs = [
                {"epoch": e, "step": 5 * e, "train_loss": 2 / e, "accuracy": 0.4 * e + 0.1 * seed} for e in (1, 2)
            ]
            results = {"epochs": epochs, "seconds": 4.0, "metrics": {}, "peak_memory_bytes": 3 * 2**20,
                       "gradients": {"layers": {"head.weight": {"effect": 2.5e-3}}}}  # fmt: skip
            (run / "results.json").write_text(json.dumps(results))
    (folder / "comparison.json").write_text(json.dumps(found))
    return folder


class Page(HTMLParser):
    """Text, tags and attributes of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_verdicts_come_first_as_sentences(tmp_path):
    paths = write_reports([comparison(tmp_path)])
    page, text = Page(paths[0].read_text()), paths[1].read_text()
    sentence = (
        "AdamW(AGR), agr_steps=10, scale=2 against AdamW, scale=2, accuracy: better. Mean difference +0.9 points, "
        "95% interval +0.65 to +1.15, 3 seeds."
    )
    assert page.text.index(sentence) < page.text.index("Learning curves")
    assert text.splitlines()[2] == f"- {sentence}"
    assert "92 ± 1%" in page.text  # mean and deviation
    assert "adamw, seed 7" in page.text
    assert "--set scale" in page.text
    assert "a CPU" in page.text


def test_a_report_says_what_was_trained(tmp_path):
    folder = comparison(tmp_path)
    for path in folder.glob("runs/*/seed-0/results.json"):
        found = json.loads(path.read_text())
        found["dataset"] = {"name": f"digits{EVIL}", "examples": 1077, "evaluated": 360}
        found["config"] = {"model_name": "vit-micro", "parameters": 105_226, "learning_rate": 1e-3}
        path.write_text(json.dumps(found))
    pages = [path.read_text() for path in write_reports([folder])[:2]]
    for text in (Page(pages[0]).text, pages[1]):
        assert "vit-micro, 1,077 training examples, 360 evaluated, 105,226 parameters, 2 epochs" in text
    assert not any(EVIL in page for page in pages)


def test_what_has_no_interval_is_drawn_without_one(tmp_path):
    folder = comparison(tmp_path, seeds=1)
    found = json.loads((folder / "comparison.json").read_text())
    found["comparisons"][0].update(low=None, high=None, verdict="cannot tell")
    (folder / "comparison.json").write_text(json.dumps(found))
    page = html_report([read_comparison(folder)])
    assert "nan" not in page
    assert "+0.9, no interval" in page


def test_curves_costs_and_layers_come_from_the_runs(tmp_path):
    page = Page(html_report([read_comparison(comparison(tmp_path))]))
    pictures = [
        attributes["aria-label"] for tag, attributes in page.tags if tag == "svg" and "aria-label" in attributes
    ]
    assert any(label.startswith("train loss (training) by epoch: AdamW, scale=2 ends at 1") for label in pictures)
    assert any(label.startswith("accuracy (test)") for label in pictures)
    assert any("0.9, 95% interval +0.65 to +1.15" in label for label in pictures)
    assert "400" in page.text  # ms a step: 4 s over 10 steps
    assert "3 MiB" in page.text
    assert "1 of 3" in page.text  # 0.8, 0.9 and 1.0 against the baseline's mean of 91.1%
    assert "head.weight" in page.text
    assert "2.5e-03" in page.text


def test_the_page_needs_no_network_and_no_script(tmp_path):
    text = html_report([read_comparison(comparison(tmp_path))])
    assert not re.search(r"https?:|<script|<link|@import|url\(|src=", text)
    page = Page(text)
    assert "lang" in dict(page.tags)["html"]
    assert {"table", "caption", "th", "main", "h1"} <= {tag for tag, _ in page.tags}
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")


def test_texts_of_others_stay_texts(tmp_path):
    found = comparison(tmp_path, task=EVIL, device=EVIL, arguments=[EVIL], diverged=[EVIL])
    assert "<script" not in html_report([read_comparison(found)])


@pytest.mark.parametrize(
    "results",
    [
        "{",
        "[]",
        '{"metrics": {}, "epochs": 5}',
        '{"epochs": [{"loss": 1}, 3], "seconds": "x", "gradients": {"layers": [1]}}',
    ],
)
def test_a_record_of_another_form_is_left_out_of_the_curves(results, tmp_path):
    folder = comparison(tmp_path)
    for path in folder.glob("runs/*/*/results.json"):
        path.write_text(results)
    assert "accuracy: better" in write_reports([folder])[1].read_text()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"comparisons": [], "cells": 3}, "cells is no list"),
        ({"cells": [{"optimizer": "a", "settings": {}, "folder": 3}]}, "'folder' expected str"),
        ({"versions": None}, "'versions' expected a dict"),
        ({"margin": "x"}, "'margin'"),
    ],
)
def test_a_damaged_comparison_is_refused_in_a_sentence(changes, sentence, tmp_path):
    with pytest.raises(ValueError, match=f"holds no finished comparison of agr-hf compare .*{sentence}"):
        read_comparison(comparison(tmp_path, **changes))
    (tmp_path / "comparison.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no finished comparison"):
        read_comparison(tmp_path)


@pytest.mark.parametrize(
    "change", [{"values": []}, {"margin": 0}, {"difference": math.inf}, {"values": [math.nan] * 3}]
)
def test_numbers_that_are_none_are_refused(change, tmp_path):
    folder = comparison(tmp_path)
    found = json.loads((folder / "comparison.json").read_text())
    found["comparisons"][0] |= change
    (folder / "comparison.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="holds no finished comparison of agr-hf compare .a comparison"):
        read_comparison(folder)


def test_names_of_others_are_no_markup_in_markdown_and_no_mathematics_in_the_picture(tmp_path):
    folder = comparison(tmp_path, diverged=["a|b\n# c <b>"])
    found = json.loads((folder / "comparison.json").read_text())
    found["comparisons"][0]["metric"] = "loss$\\frac{$|\n# x <img src=y>"
    (folder / "comparison.json").write_text(json.dumps(found))
    text = write_reports([folder])[1].read_text()
    assert [line for line in text.splitlines() if line.startswith("#")] == ["# train.py: paired over seeds"]
    assert "<img" not in text
    assert "a\\|b \\# c &lt;b&gt;" in text


def test_one_seed_and_no_curves_make_a_report_too(tmp_path):
    folder = comparison(tmp_path, seeds=1)
    found = json.loads((folder / "comparison.json").read_text())
    found["comparisons"][0] |= {"low": None, "high": None}
    (folder / "comparison.json").write_text(json.dumps(found))
    for path in folder.glob("runs/*/*/results.json"):
        path.write_text(json.dumps({"metrics": {"accuracy": 0.5}}))
    page = Page(html_report([read_comparison(folder)]))
    assert "95% interval none, 1 seeds." in page.text
    assert "Learning curves" not in page.text


def test_the_picture_for_cards_is_drawn(tmp_path):
    picture = write_reports([comparison(tmp_path)])[2].read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5_000


def test_several_comparisons_make_one_page(tmp_path, capsys):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        comparison(tmp_path / name)
    assert main(["report", str(tmp_path / "first"), str(tmp_path / "second"), "--output", str(tmp_path / "both")]) == 0
    page = Page((tmp_path / "both" / "report.html").read_text())
    assert [a["aria-label"] for tag, a in page.tags if tag == "section"] == ["first", "second"]
    names = ("report.html", "report.md", "differences.png")
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "both" / name) for name in names]


def test_a_folder_without_a_comparison_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "holds no finished comparison of agr-hf compare" in capsys.readouterr().err


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3e-7, 2e-6), (12.0, 4700.0), (-5.0, -4.0)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    assert all(low - 1e-12 <= tick <= high + 1e-12 for tick in found)
    assert all(len(f"{tick:.6g}".strip("-0.").split("e")[0].replace(".", "")) <= 3 for tick in found)


def test_charts_are_whole_and_what_is_drawn_lies_inside():
    curves = draw_curves([Series("a", [(1, 0.0, 0.0, 0.0), (2, 0.0, 0.0, 0.0)])], "flat", "epoch")
    intervals = draw_intervals([Interval("a & b", 0.1, float("nan"), float("nan"), [0.1])], 0.2, "one seed")
    for text in (curves, intervals):
        root = ElementTree.fromstring(text)
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for element in root.iter():
            for key, value in element.attrib.items():
                if key in ("x", "x1", "x2", "cx"):
                    assert 0 <= float(value) <= width
                if key in ("y", "y1", "y2", "cy"):
                    assert 0 <= float(value) <= height
