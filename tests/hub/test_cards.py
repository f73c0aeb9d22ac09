"""Cards: everything from results.json, valid YAML and inert text whatever the names contain."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from example_runs import made_up
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import EvalResult

from agr_hf.hub.cards import draw_curves, evaluation_file, model_card
from agr_hf.tasks.record import RunRecord, read_record

HOSTILE = [
    "a: b\n---\nevil: true",
    "<script>alert(1)</script>",
    "| cell | [link](http://x) ![i](http://y)",
    "`code` ``` fence",
    "{{ 7 * 7 }} {% raw %}",
    "# heading\r\n- list\x00\x1b[31m",
    "null",
    "*bold* _under_ ~strike~ $x$",
    "é 日本 \u2028 🤗",
    "!!python/object/apply:os.system ['x']",
    "' \" \\ % @ &a *a",
]

EXAMPLES = Path(__file__).parents[2] / "model_cards"


@pytest.fixture
def run(tmp_path):
    return read_record(made_up(tmp_path / "run", 9.0))


def header(card):
    return yaml.safe_load(card.removeprefix("---\n").split("\n---\n", 1)[0])


def test_the_header_is_what_the_hub_reads(run):
    data = ModelCard(model_card(run, "tester/run")).data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "image-classification"
    assert data.datasets == ["uoft-cs/cifar10"]
    assert set(data.tags) >= {"agr-hf", "agr_adamw"}
    assert data.metrics == ["accuracy"]
    found = {e.metric_type: e for e in data.eval_results}
    assert isinstance(found["accuracy"], EvalResult)
    assert found["accuracy"].metric_value == run.metrics["accuracy"]
    assert found["accuracy"].dataset_revision == "0b27149"
    assert found["accuracy"].dataset_split == "test"
    assert found["loss"].metric_value == run.metrics["loss"]


def test_the_newer_evaluation_file(run):
    (entry,) = yaml.safe_load(evaluation_file(run))
    assert entry["dataset"] == {
        "id": "uoft-cs/cifar10", "task_id": "image-classification_accuracy", "revision": "0b27149",
    }  # fmt: skip
    assert entry["value"] == run.metrics["accuracy"]
    assert evaluation_file(replace(run, dataset={**run.dataset, "hub_id": None})) is None
    assert evaluation_file(replace(run, dataset={**run.dataset, "complete": False})) is None
    for metrics in ({"loss": 0.1}, {"loss": 0.1, "frechet_distance_pixels": 3.0}):
        assert evaluation_file(replace(run, metrics=metrics)) is None


def test_a_distance_of_few_samples_is_none_to_compare_with(run):
    run.task, run.metrics = "ddpm", {"loss": 0.03, "fid": 33.0, "samples": 500}
    assert evaluation_file(run) is None
    assert "Measured on 500 samples, against 50 examples of the split 'test'." in model_card(run, "tester/run")
    run.metrics["samples"] = 50_000
    (entry,) = yaml.safe_load(evaluation_file(run))
    assert (entry["dataset"]["task_id"], entry["value"]) == ("unconditional-image-generation_fid", 33.0)


def test_the_card_says_what_the_metrics_are_of(run):
    run.dataset |= {"split": "valid", "config": "plain_text"}
    card = model_card(run, "tester/run")
    assert "Measured on 50 examples of the split 'valid'." in card
    (first, *_) = ModelCard(card).data.eval_results
    assert (first.dataset_split, first.dataset_config) == ("valid", "plain_text")
    run.dataset["complete"] = False
    assert "Measured on 50 examples of the split 'valid', a part of it." in model_card(run, "tester/run")


def test_a_training_loss_evaluates_nothing(run):
    run.task, run.metrics = "ddpm", {"loss": 0.03}
    run.dataset["split"] = "train"
    card = model_card(run, "tester/run")
    assert ModelCard(card).data.eval_results is None
    assert "| Training loss | 0.03 |" in card


def test_a_grey_model_is_no_image_classification_pipeline(run):
    """The Hub and pipeline() turn every picture into RGB."""
    assert ModelCard(model_card(run, "tester/run")).data.pipeline_tag == "image-classification"
    run.config["channels"] = 1
    assert ModelCard(model_card(run, "tester/run")).data.pipeline_tag is None


def test_the_body_says_what_the_run_was(run):
    card = model_card(run, "tester/run", curves=True, samples="samples/epoch-0009.png", resumable=True)
    for text in (
        run.command,
        "| Top-1 accuracy | 0.9 |",
        "| fc.weight | 0.01 | 0.1 | -3 ± 1 |",
        "AGR took 1% of",
        "`betas` `[0.9, 0.999]`",
        "![Loss and metrics by epoch](curves.png)",
        "samples/epoch-0009.png",
        "agr-hf resume tester/run",
        "2407.16944",
        "2107.01525",
        "torch " + run.versions["torch"],
        "| seed | 0 |",
    ):
        assert text in card, text
    plain = model_card(run, "tester/run")
    assert "curves.png" not in plain
    assert "agr-hf resume" not in plain
    assert "differences.png" not in plain
    assert "![Differences over paired seeds" in model_card(run, "tester/run", compared=True)
    run.optimizer = "adamw"
    assert "AGR would have taken 1% of" in model_card(run, "tester/run")
    run.gradients = {}
    assert "Not measured in this run" in model_card(run, "tester/run")


@pytest.mark.parametrize("own_script", [False, True])
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_stay_text(text, own_script, run):
    run.own_script, run.task = own_script, text if own_script else run.task
    run.optimizer = run.device = run.commit = text
    run.dataset = {"name": text, "hub_id": text, "revision": text, "files": [text], "examples": 3}
    run.config = {"model_name": text, "model_name_or_path": text, "learning_rate": 1e-3}
    if own_script:
        run.config |= {"model_class": text, "base_model": text, "library": text, "metric_for_best_model": text}
    run.versions = {text: text}
    run.metrics = {"accuracy": 0.5, text: text, "loss": None}
    run.gradients["layers"] = {text: {"effect": 0.1, "largest_share": 0.2}}
    run.optimizer_groups = [{text: text, "tensors": 1, "parameters": 2}]
    run.script, run.arguments = "x.py", {"a": text, text: [text, 1]}
    card = model_card(run, "tester/run")
    data = header(card)
    assert set(data) <= {"library_name", "pipeline_tag", "tags", "metrics", "model-index", "base_model", "datasets"}
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.5
    body = card.split("\n---\n", 1)[1]
    assert "\n---" not in body
    assert "\x00" not in card
    assert "\x1b" not in card
    # As the Hub renders it: no element that the same card has not with a plain word in all those places.
    ordinary = with_word(run, text)
    assert elements(body) == elements(model_card(ordinary, "tester/run").split("\n---\n", 1)[1])


def with_word(value, text):
    """The same record with an ordinary word in the places of a text."""
    if isinstance(value, RunRecord):
        return RunRecord(**with_word(vars(value), text))
    if isinstance(value, dict):
        return {with_word(key, text): with_word(entry, text) for key, entry in value.items()}
    if isinstance(value, list):
        return [with_word(entry, text) for entry in value]
    return value.replace(text, "word") if isinstance(value, str) else value


def elements(body):
    """The HTML elements of rendered Markdown, in order."""
    markdown = pytest.importorskip("markdown_it", reason="markdown-it-py is missing: pip install 'agr-hf[test]'")
    return re.findall(r"</?[a-zA-Z]\w*", markdown.MarkdownIt("gfm-like", {"linkify": False}).render(body))


def test_a_task_without_a_card_is_said(run):
    run.task = "functions"
    with pytest.raises(ValueError, match="there is no card for the task 'functions'"):
        model_card(run, "tester/run")


def test_curves_need_two_epochs(run, tmp_path):
    assert draw_curves(run, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    run.epochs = run.epochs[:1]
    assert not draw_curves(run, tmp_path / "y.png")


def test_a_curve_leaves_out_what_no_axis_can_show(run, tmp_path):
    run.epochs = [{"epoch": epoch, "loss": loss} for epoch, loss in enumerate((1e308, 1.0, 1.7e308, 0.5))]
    assert draw_curves(run, tmp_path / "x.png")
    run.epochs = run.epochs[::2]
    assert not draw_curves(run, tmp_path / "y.png")


@pytest.mark.parametrize("task", ["image-classification", "albert", "ddpm"])
def test_cards_of_real_runs_hold_their_numbers(task, trained):
    run = read_record(trained[task])
    card = model_card(run, "tester/run")
    assert run.command in card
    main = {"image-classification": "accuracy", "albert": "sop_accuracy", "ddpm": "frechet_distance_pixels"}[task]
    if main in run.metrics:
        assert ModelCard(card).data.eval_results[0].metric_value == pytest.approx(run.metrics[main])
    else:  # a diffusion model of which no samples were measured
        assert ModelCard(card).data.eval_results is None
        assert task == "ddpm"
    assert run.gradients["measurements"] >= 1
    assert run.gradients["layers"]
    assert ("AGR took" if run.optimizer.startswith("agr") else "AGR would have taken") in card


@pytest.mark.parametrize("folder", sorted(EXAMPLES.glob("*/results.json")), ids=lambda path: path.parent.name)
def test_the_cards_in_the_repository_are_made_of_their_results(folder):
    card = (folder.parent / "README.md").read_text(encoding="utf-8")
    assert card == model_card(
        read_record(folder),
        re.search(r"agr-hf reproduce (\S+) --output-dir", card)[1],
        curves="(curves.png)" in card,
        samples=next(iter(re.findall(r"\]\((samples/[^)]+)\)", card)), None),
        resumable="agr-hf resume" in card,
    )
