"""The main job, end to end, small: real images through Trainer, tables, pictures and models that load back."""

import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn is missing: pip install 'agr-hf[train]'")
pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install 'agr-hf[train]'")

from transformers import AutoModelForImageClassification

from agr_hf.cli import main
from agr_hf.tasks.digits import load_digits
from agr_hf.tasks.record import read_record


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    assert main(["demo", "--output", str(folder), "--seeds", "2", "--epochs", "4"]) == 0
    return folder


def records(folder):
    return [read_record(json.dumps(run).encode()) for run in json.loads((folder / "results.json").read_text())["runs"]]


def test_every_file_is_there_and_no_other(output):
    files = sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())
    assert files == [
        "curves.png",
        *(f"models/{n}/{f}" for n in ("adal", "adamw", "agr_adamw") for f in ("config.json", "model.safetensors")),
        "results.json",
        "table.md",
    ]
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_all_three_optimizers_learn(output):
    runs = records(output)
    assert [(run.optimizer, run.seed) for run in runs] == [
        (name, seed) for name in ("adamw", "agr_adamw", "adal") for seed in (0, 1)
    ]
    for run in runs:
        assert run.metrics["test_accuracy"] > 0.3  # chance is 0.1; four epochs are few
        assert len(run.epochs) == 4
        assert run.epochs[-1]["train_loss"] < run.epochs[0]["train_loss"]
        assert run.versions["torch"] == importlib.metadata.version("torch")


def test_effects_are_measured_for_agr_and_only_where_it_applies(output):
    for run in records(output):
        layers = run.gradients.get("layers", {})
        assert bool(layers) == (run.optimizer == "agr_adamw")
        assert all(0 < layer["effect"] < 1 for layer in layers.values())
        assert not any("bias" in name or "layernorm" in name for name in layers)


def test_the_table_shows_each_optimizer_and_layer(output):
    table = (output / "table.md").read_text()
    for text in (
        "| AdamW |",
        "| AdamW(AGR) |",
        "| AdaL |",
        "±",
        "classifier.weight",
        "| overall |",
        "scikit-learn's 8x8",
    ):
        assert text in table


def test_saved_models_load_back_and_are_the_best_of_their_seeds(output):
    runs = records(output)
    data = load_digits()["validation"]
    for name in ("adamw", "agr_adamw", "adal"):
        model = AutoModelForImageClassification.from_pretrained(output / "models" / name).eval()
        with torch.no_grad():
            predicted = model(data.pixel_values).logits.argmax(-1)
        accuracy = (predicted == data.labels).double().mean().item()
        assert accuracy == pytest.approx(
            max(run.metrics["validation_accuracy"] for run in runs if run.optimizer == name), abs=3e-3
        )


def test_splits_are_disjoint_stratified_and_always_the_same():
    splits, again = load_digits(), load_digits()
    assert {name: len(split) for name, split in splits.items()} == {"train": 1077, "validation": 360, "test": 360}
    assert all(torch.equal(splits[name].labels, again[name].labels) for name in splits)
    assert splits["train"].pixel_values.aminmax() == (-1, 1)
    assert splits["test"].labels.bincount().min() >= 34


@pytest.mark.parametrize("below", [False, True])
def test_its_runs_are_rows_of_the_leaderboard(below, output, tmp_path, capsys):
    (tmp_path / "demo").mkdir()
    shutil.copy(output / "results.json", tmp_path / "demo")
    assert main(["leaderboard", str(tmp_path if below else output)]) == 0
    _, _, *rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 3
    assert all("| Test accuracy |" in row and "| demo | digits |" in row for row in rows)


def test_results_name_no_path_or_user(output):
    text = (output / "results.json").read_text()
    assert str(Path.home()) not in text
    assert str(output) not in text


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--epochs", "-1"], ["--seeds", "two"]])
def test_bad_arguments_get_a_sentence(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(["demo", *arguments])
    assert error.value.code == 2
    assert "is not allowed; it must be a whole number >= 1" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_gets_a_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--output", str(tmp_path / "file" / "out"), "--seeds", "1", "--epochs", "1"]) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("agr-hf: ")
