"""What a run writes down, into which folder, and how it ends where it cannot run."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launching import run_script

from agr_hf import AGRAdamW
from agr_hf.errors import UserError
from agr_hf.optim.statistics import agr_gradients
from agr_hf.tasks.images import hub_source
from agr_hf.tasks.runs import describe_dataset, lower_is_better, optimizer_groups, refuse_used, run_main


def test_own_files_are_not_called_as_the_default_set():
    of = {"split": "test", "evaluated": 3, "complete": True}
    assert describe_dataset("digits", 5, ("/data/train.parquet", None), **of)["name"] == "train"
    assert describe_dataset("pydoc-topics", 5, ("wiki.train.tokens", "x.tokens"), **of) == {
        "name": "wiki.train", "files": ["wiki.train.tokens", "x.tokens"], "sha256": [None, None], "examples": 5, **of,
    }  # fmt: skip
    assert describe_dataset("cifar10", 5, ("train.parquet",), **of)["name"] == "cifar10"
    nowhere = {"name": "digits", "hub_id": None, "revision": None, "config": None}
    assert describe_dataset("digits", 5, **of) == {**nowhere, "examples": 5, **of}
    pinned = describe_dataset("cifar10", 5, (), hub_source("cifar10"), **of)
    assert (pinned["hub_id"], len(pinned["revision"])) == ("uoft-cs/cifar10", 40)
    assert describe_dataset("cifar10", 5, (), hub_source("cifar10", "abc"), **of)["revision"] == "abc"
    other = describe_dataset("some/set", 5, (), hub_source("some/set", "abc"), **of)
    assert (other["hub_id"], other["revision"]) == ("some/set", "abc")


def test_files_are_known_by_their_digest(tmp_path):
    (tmp_path / "train.txt").write_text("abc")
    found = describe_dataset("x", 5, (str(tmp_path / "train.txt"), str(tmp_path)), split="test")
    assert found["sha256"] == ["ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", None]


@pytest.mark.parametrize("left", ["results.json", "checkpoint-8"])
def test_a_new_run_does_not_begin_in_the_folder_of_another(left, tmp_path):
    refuse_used(tmp_path / "new", None)
    (tmp_path / left).mkdir()
    with pytest.raises(ValueError, match="holds a run already; go on with it"):
        refuse_used(tmp_path, None)
    if left == "checkpoint-8":
        refuse_used(tmp_path, "latest")  # nothing is lost: there is no finished run
    (tmp_path / "results.json").mkdir(exist_ok=True)
    (tmp_path / "checkpoint-8").mkdir(exist_ok=True)  # not complete
    with pytest.raises(ValueError, match="holds a finished run, and no checkpoint to go on from"):
        refuse_used(tmp_path, "latest")
    refuse_used(tmp_path, "latest", lambda folder: folder / "checkpoint-8")
    refuse_used(tmp_path, str(tmp_path / "checkpoint-8"))


@pytest.mark.parametrize(
    ("script", "options", "sentence"),
    [
        (
            "train_image_classifier.py",
            "--train_file no.parquet --test_file no.parquet --use_cpu true",
            "there is no file",
        ),
        ("train_albert.py", "--train_file no.txt --use_cpu true", "train_file and validation_file go together"),
        ("train_ddpm.py", "--features vgg --cpu", "there is no feature network 'vgg'"),
    ],
)
def test_a_script_ends_with_a_sentence_and_no_traceback(script, options, sentence, tmp_path):
    path = Path(__file__).parents[2] / "training_scripts" / script
    assert run_script(path, ["--output_dir", tmp_path / "run", *options.split()], tmp_path / "log") == 1
    printed = (tmp_path / "log").read_text()
    assert "Traceback" not in printed
    assert printed.splitlines()[-1].startswith(f"{script}: {sentence}")


def test_an_error_for_the_user_is_a_sentence_and_any_other_keeps_its_traceback():
    def refuse():
        raise UserError("epochs=-1 is not allowed")

    with pytest.raises(SystemExit, match="^test_runs.py: epochs=-1 is not allowed$"):
        run_main(refuse)
    with pytest.raises(ValueError, match="base"):
        run_main(lambda: int("x", base=1))


@pytest.mark.parametrize(
    "metric", ["loss", "eval/loss", "mlm_loss", "MSE", "val-rmse", "wer", "fid", "mean_error", "nll"]
)
def test_of_these_metrics_less_is_better(metric):
    assert lower_is_better(metric)


@pytest.mark.parametrize("metric", ["accuracy", "f1", "lossless_ratio", "inception_score", "bleu", "merit"])
def test_of_these_metrics_more_is_better(metric):
    assert not lower_is_better(metric)


def test_a_process_of_gloo_leaves_its_group_and_ends_where_its_work_ends(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import atexit
from torch import distributed
from agr_hf.tasks.runs import run_main

def main():
    distributed.init_process_group("gloo", init_method="file://{tmp_path / "store"}", rank=0, world_size=1)

atexit.register(lambda: print("still in its group:", distributed.is_initialized()))
run_main(main)
print("what follows is not reached")
"""
    )
    found = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    # Gloo itself greets there in older versions of torch.
    assert (found.returncode, found.stdout.splitlines()[-1:]) == (0, ["still in its group: False"]), found.stderr


@pytest.mark.parametrize("left", [1, 0])  # by ZeRO's stages 1 and 2, and by stage 3 between the steps
def test_groups_that_deepspeed_has_flattened_are_described_by_their_layers(left, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", sys)
    model = torch.nn.Linear(3, 2)
    optimizer = AGRAdamW([{"params": list(model.parameters()), "agr": [True, False]}])
    expected = optimizer_groups(optimizer)
    assert (expected[0]["agr"], expected[0]["tensors"], expected[0]["parameters"]) == ("1 of 2 tensors", 2, 8)
    optimizer.param_groups[0]["params"] = [torch.nn.Parameter(torch.ones(8))] * left
    assert optimizer_groups(SimpleNamespace(optimizer=optimizer)) == expected  # as DeepSpeed wraps it
    assert agr_gradients(model, SimpleNamespace(optimizer=optimizer)) == []


@pytest.mark.parametrize(
    ("script", "module", "package"),
    [("accelerate_loop.py", "sklearn", "scikit-learn"), ("minimize_functions.py", "optuna", "optuna"),
     ("train_ddpm.py", "diffusers", "diffusers")],
)  # fmt: skip
def test_a_script_without_its_extra_says_so_in_a_sentence(script, module, package, tmp_path):
    block = (
        f"import runpy, sys; sys.modules[{module!r}] = None; del sys.argv[0]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    path = Path(__file__).parents[2] / "training_scripts" / script
    command = [sys.executable, "-c", block, str(path), "--output_dir", str(tmp_path / "x")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    assert f"{script}: {package} is not installed; install it with pip install {package}" in found.stderr
