"""The script, end to end on real images that need no network."""

import argparse
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load

from agr_hf import list_optimizers
from agr_hf.tasks.images import load_images
from agr_hf.tasks.recipes import IMAGE_RECIPES, apply_recipe, refuse_data_parallel
from agr_hf.tasks.record import read_record
from agr_hf.tasks.trainer_run import parse_run

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "training_scripts/train_image_classifier.py"
QUICK = ["--use_cpu", "true", "--disable_tqdm", "true", "--per_device_train_batch_size", "32"]


def run(folder, *options):
    return runpy.run_path(str(SCRIPT))["main"](["--output_dir", str(folder), *QUICK, *map(str, options)])


@pytest.mark.parametrize("optim", list_optimizers())
def test_every_optimizer_trains_and_beats_chance(optim, tmp_path):
    rate = {"sgd": 0.05, "acprop": 3e-4}.get(optim, 3e-3)
    run(tmp_path, "--model_name", "mlp", "--optim", optim, "--learning_rate", rate, "--num_train_epochs", 3,
        "--max_eval_samples", 120)  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["optimizer"] == optim
    assert results["metrics"]["accuracy"] > 0.6  # chance is 0.1; three epochs of an MLP
    assert results["metrics"]["top5_accuracy"] >= results["metrics"]["accuracy"]
    assert [epoch["epoch"] for epoch in results["epochs"]] == [1.0, 2.0, 3.0]
    assert results["epochs"][-1]["train_loss"] < results["epochs"][0]["train_loss"]


def test_results_have_what_is_needed_to_repeat_the_run(tmp_path, monkeypatch):
    argv = [str(SCRIPT), "--output_dir", str(tmp_path), *QUICK, "--model_name", "mlp", "--num_train_epochs", "1"]
    monkeypatch.setattr(sys, "argv", [*argv, "--seed", "7", "--optim", "agr_adamw", "--optim_args", "agr_steps=20"])
    runpy.run_path(str(SCRIPT))["main"]()
    text = (tmp_path / "results.json").read_text()
    results = json.loads(text)
    assert results["task"] == "image-classification"
    assert results["seed"] == 7
    assert results["script"] == "train_image_classifier.py"
    assert results["arguments"] == {
        "use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 32, "model_name": "mlp",
        "num_train_epochs": 1.0, "seed": 7, "optim": "agr_adamw", "optim_args": "agr_steps=20",
    }  # fmt: skip
    assert " --optim_args agr_steps=20 " in read_record(tmp_path).command
    assert results["peak_memory_bytes"] > 50_000_000  # of a process that has loaded torch
    assert results["config"]["model_name"] == "mlp"
    assert results["config"]["parameters"] > 0
    assert {"versions", "device", "seconds", "commit", "torch_threads"} <= set(results)
    assert str(tmp_path.parent) not in text
    assert str(Path.home()) not in text


def test_the_saved_model_gives_the_reported_accuracy(tmp_path):
    from transformers import AutoModelForImageClassification

    metrics = run(tmp_path, "--model_name", "vit-tiny", "--num_train_epochs", 1, "--max_train_samples", 64,
                  "--max_eval_samples", 100, "--optim", "agr_adamw", "--learning_rate", 1e-3)  # fmt: skip
    model = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    rows = load_images("digits", max_test=100).test
    with torch.no_grad():
        logits = model(pixel_values=torch.stack([rows[i]["pixel_values"] for i in range(100)])).logits
    assert (logits.argmax(-1) == rows.labels).double().mean().item() == pytest.approx(metrics["accuracy"])
    assert torch.nn.functional.cross_entropy(logits, rows.labels).item() == pytest.approx(metrics["loss"], rel=1e-4)


@pytest.mark.parametrize("optim", ["agr_adamw", "adal", "sgd"])
def test_a_resumed_run_has_the_bits_of_one_never_stopped(optim, tmp_path):
    """With milestones, augmentation and suspension."""
    options = ["--model_name", "mlp", "--optim", optim, "--num_train_epochs", 3, "--lr_milestones", 1, 2,
               "--augmentation", "flip-crop", "--save_strategy", "epoch", "--learning_rate", 1e-3,
               "--max_train_samples", 320, "--max_eval_samples", 40]  # fmt: skip
    if optim == "agr_adamw":
        options += ["--suspend_agr_at_epoch", 1.5]
    run(tmp_path, *options)
    whole = load((tmp_path / "model.safetensors").read_bytes())
    (tmp_path / "checkpoint-30/optimizer.pt").write_bytes(b"cut short")  # "latest" passes it over
    run(tmp_path, *options, "--resume_from_checkpoint", "latest")
    resumed = load((tmp_path / "model.safetensors").read_bytes())
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def parser_of_script():
    make_parser = runpy.run_path(str(SCRIPT))["make_parser"]
    return lambda words: parse_run(make_parser(), words)[0]


def rates_of(checkpoint):
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]


def test_milestones_multiply_the_rate(tmp_path):
    run(tmp_path, "--model_name", "mlp", "--num_train_epochs", 3, "--lr_milestones", 1, 2, "--lr_gamma", 0.2,
        "--optim", "adal", "--learning_rate", 1e-3, "--save_strategy", "epoch", "--logging_strategy", "steps",
        "--logging_steps", 5, "--max_train_samples", 320, "--max_eval_samples", 40)  # fmt: skip
    assert rates_of(tmp_path / "checkpoint-30") == pytest.approx([1e-3, 1e-3, 2e-4, 2e-4, 4e-5, 4e-5])


def test_a_recipe_gives_defaults_and_the_command_line_wins():
    parse = parser_of_script()
    model, data, extra, args = parse(["--recipe", "agr-cifar100", "--output_dir", "x", "--learning_rate", "0.5"])
    assert (model.model_name, data.dataset_name, args.optim) == ("resnet18", "cifar100", "agr_adamw")
    assert (args.num_train_epochs, args.weight_decay, extra.lr_milestones) == (200, 5e-4, [60, 120, 160])
    assert args.learning_rate == 0.5
    *_, args = parse(["--recipe", "adal-cifar10", "--output_dir", "x", "--optim", "nosadam"])
    assert args.optim == "nosadam"


def test_bad_names_get_a_sentence(tmp_path, capsys):
    for options, message in (
        (["--recipe", "agr-imagenet"], "there is no recipe 'agr-imagenet'; the names are agr-cifar10, "),
        (["--optim", "lionw"], "argument --optim: invalid choice: 'lionw' (choose from "),
    ):
        with pytest.raises(SystemExit):
            run(tmp_path, *options)
        assert message in capsys.readouterr().err


def test_a_run_resumes_to_the_bit_from_any_step(tmp_path):
    """The loader augments ahead of the checkpoint, and an epoch is evaluated behind one at its last step."""
    options = ["--model_name", "mlp", "--num_train_epochs", 2, "--max_train_samples", 95, "--max_eval_samples", 40,
               "--eval_strategy", "epoch", "--augmentation", "rand-augment", "--save_strategy", "steps", "--save_steps", 6,
               "--save_total_limit", 9, "--per_device_train_batch_size", 8]  # fmt: skip
    run(tmp_path, *options)
    whole = load((tmp_path / "model.safetensors").read_bytes())
    assert len(list(tmp_path.glob("checkpoint-*"))) == 4  # 12 steps an epoch
    for stopped in ("checkpoint-12", "checkpoint-6"):
        (tmp_path / "model.safetensors").unlink()
        run(tmp_path, *options, "--resume_from_checkpoint", tmp_path / stopped)
        resumed = load((tmp_path / "model.safetensors").read_bytes())
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), stopped


def batch_of_recipe(*words):
    """What `--recipe adal-cifar10` makes of the batch of one process; TrainingArguments would wait for the others."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe")
    parser.add_argument("--per_device_train_batch_size", "--per-device-train-batch-size", type=int, default=8)
    words = ["--recipe", "adal-cifar10", *words]
    apply_recipe(parser, IMAGE_RECIPES, words)
    return parser.parse_args(words).per_device_train_batch_size


@pytest.mark.parametrize(("processes", "batch"), [("1", 128), ("2", 64), ("4", 32)])
def test_the_batch_of_a_recipe_is_that_of_all_processes(processes, batch, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", processes)
    assert batch_of_recipe() == batch


def test_a_batch_that_processes_cannot_share_is_refused_unless_told(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit):
        batch_of_recipe()
    assert "batches of 128, which 3 processes cannot share" in capsys.readouterr().err
    assert batch_of_recipe("--per_device_train_batch_size", "40") == 40
    assert batch_of_recipe("--per-device-train-batch-size=40") == 40


def test_an_abbreviated_recipe_is_not_noted_down_and_left_out(capsys):
    parse = parser_of_script()
    with pytest.raises(SystemExit):
        parse(["--recip", "agr-cifar100", "--output_dir", "x"])
    assert "unrecognized arguments: --recip agr-cifar100" in capsys.readouterr().err


def test_a_schedule_of_the_command_line_wins_over_the_milestones_of_a_recipe():
    parse = parser_of_script()
    words = ["--recipe", "agr-cifar10", "--output_dir", "x"]
    assert parse(words)[2].lr_milestones == [60, 120, 160]
    assert parse([*words, "--lr_milestones", "5"])[3].lr_scheduler_type == "constant"  # and not, as noted down, linear
    tiny = parse(["--recipe", "agr-tiny-imagenet", "--output_dir", "x", "--lr_milestones", "100"])
    assert (tiny[2].lr_milestones, tiny[3].lr_scheduler_type, tiny[3].warmup_steps) == ([100], "constant", 0)
    for schedule in (["--lr_scheduler_type=linear"], ["--lr-scheduler-type", "cosine"], ["--warmup_steps", "500"]):
        assert parse([*words, *schedule])[2].lr_milestones is None
        with pytest.raises(ValueError, match="lr_milestones are a schedule of their own"):
            parse([*words, *schedule, "--lr_milestones", "5"])


def test_milestones_are_epochs_of_the_batches_that_are_kept(tmp_path):
    """367 images are 11 batches of 32 and a part, which is dropped."""
    run(tmp_path, "--model_name", "mlp", "--num_train_epochs", 2, "--lr_milestones", 1, "--max_train_samples", 367,
        "--max_eval_samples", 40, "--dataloader_drop_last", "true", "--logging_strategy", "steps", "--logging_steps", 1,
        "--optim", "adal")  # fmt: skip
    assert rates_of(tmp_path / "checkpoint-22") == pytest.approx([1e-3] * 11 + [1e-4] * 11)


def test_several_gpus_in_one_process_are_refused():
    """Their batch would be so many times that of the recipe, and of the arguments in results.json."""
    refuse_data_parallel(SimpleNamespace(n_gpu=1))
    with pytest.raises(ValueError, match="start the script with torchrun --nproc_per_node 2"):
        refuse_data_parallel(SimpleNamespace(n_gpu=2))
