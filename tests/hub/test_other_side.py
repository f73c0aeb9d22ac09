"""Train, push, delete, load on the other side; resume and reproduce there; a table over it all."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from example_runs import SMALL, contents, made_up, run_here, train
from transformers import TrainingArguments

from agr_hf.cli import main
from agr_hf.errors import UserError
from agr_hf.experiments import rerun
from agr_hf.experiments.leaderboard import collect, leaderboard
from agr_hf.hub.download import download_run
from agr_hf.hub.push import push_run
from agr_hf.tasks.record import RunRecord

# Outputs of a published model on inputs that need no data.
LOAD = {
    "image-classification": """
from agr_hf.tasks.classifiers import register_small_image_models
from transformers import AutoImageProcessor, AutoModelForImageClassification
register_small_image_models()
processor = AutoImageProcessor.from_pretrained(SOURCE)
model = AutoModelForImageClassification.from_pretrained(SOURCE).eval()
outputs = model(pixel_values=torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)).logits
""",
    "albert": """
from transformers import AlbertForPreTraining, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(SOURCE)
model = AlbertForPreTraining.from_pretrained(SOURCE).eval()
outputs = model(**tokenizer("The value of the expression.", "It is a list.", return_tensors="pt")).sop_logits
""",
    "ddpm": """
from diffusers import DDIMPipeline
pipeline = DDIMPipeline.from_pretrained(SOURCE)
outputs = torch.from_numpy(pipeline(2, generator=torch.manual_seed(0), num_inference_steps=3, output_type="np").images)
""",
}


def test_runs_published_by_their_scripts_load_on_the_other_side(hub, logged_in, tmp_path, monkeypatch):
    """`--push_to_hub` of the script itself; the local copy is gone; the real clients of another process load it."""
    monkeypatch.setenv("PLANTED_API_KEY", "sesame-sesame")
    outputs, code = {}, ["import torch"]
    for task in SMALL:
        options = ["--push_to_hub"] if task == "ddpm" else ["--push_to_hub", "true", "--hub_token", hub.token]
        run = train(task, tmp_path / "run", *options, "--hub_model_id", f"lab/{task}")
        names = {"torch": torch, "SOURCE": str(run)}
        exec(LOAD[task], names)
        outputs[task] = names["outputs"].detach().numpy().tobytes().hex()
        shutil.rmtree(run)
        code += [f"SOURCE = 'lab/{task}'", LOAD[task]]
        code += [f"print('OUT {task}', outputs.detach().numpy().tobytes().hex())"]
    there = {**os.environ, **hub.environment(tmp_path / "reader")}
    out = subprocess.run(
        [sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, env=there, timeout=200
    )
    assert out.returncode == 0, out.stderr[-2000:]
    assert dict(re.findall(r"OUT (\S+) (\w+)", out.stdout)) == outputs
    for task in SMALL:
        assert len(hub.commits(f"lab/{task}")) == 2
        assert_nothing_private(hub, f"lab/{task}", tmp_path)


def assert_nothing_private(hub, repo, folder):
    """No token, secret, absolute path, host or user name in any file or commit of a repository."""
    import getpass
    import socket

    said = {f"commit {c.oid}": f"{c.title}\n{c.description}".encode() for c in hub.commits(repo)} | hub.files(repo)
    private = [hub.token, "sesame-sesame", str(folder), os.path.expanduser("~") + "/"]
    # Short ones, such as "root", are in many a word.
    private += [text for text in (socket.gethostname(), getpass.getuser()) if len(text) > 5]
    for name, content in said.items():
        for text in private:
            assert text.encode() not in content, (name, text)
            assert text not in name


@pytest.mark.parametrize("task", list(SMALL))
def test_a_published_run_resumes_with_the_bits_of_a_local_one(task, trained, hub, tmp_path, monkeypatch):
    """Two epochs are published; two more are trained from the Hub's state, and from the local checkpoint."""
    monkeypatch.setattr(rerun, "run_script", run_here)
    push_run(trained[task], f"lab/{task}", with_training_state=True, api=hub.api())
    assert not [name for name in hub.files(f"lab/{task}") if name.endswith((".pt", ".pth", ".bin", ".pkl"))]
    more = ["--num_epochs" if task == "ddpm" else "--num_train_epochs", "4"]
    local = shutil.copytree(trained[task], tmp_path / "local")
    checkpoint = max(local.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    (local / "results.json").unlink()
    train(task, local, *more, "--resume_from_checkpoint", str(checkpoint))
    rerun.resume(f"lab/{task}", tmp_path / "remote", more, api=hub.api())
    weights = {
        folder: contents(folder / ("unet" if task == "ddpm" else "."))
        for folder in (local, tmp_path / "remote", trained[task])
    }
    (name,) = (n for n in weights[local] if n.endswith(".safetensors") and "/" not in n)
    assert weights[local][name] == weights[tmp_path / "remote"][name]
    assert weights[local][name] != weights[trained[task]][name]
    one, other = (json.loads((folder / "results.json").read_text()) for folder in (local, tmp_path / "remote"))
    assert [epoch["loss"] for epoch in one["epochs"]] == [epoch["loss"] for epoch in other["epochs"]]
    assert len(one["epochs"]) == 4


def test_what_was_published_without_state_cannot_be_resumed(hub, tmp_path):
    push_run(made_up(tmp_path / "run"), "lab/run", api=hub.api())
    with pytest.raises(ValueError, match="was published without its training state"):
        rerun.resume("lab/run", tmp_path / "out", api=hub.api())


def test_a_run_is_reproduced_to_the_bit_and_both_results_are_shown(trained, hub, tmp_path, capfd, monkeypatch):
    push_run(trained["image-classification"], "lab/run", api=hub.api())
    rows = rerun.reproduce("lab/run", tmp_path / "again", api=hub.api())
    assert {name for name, _, _ in rows} == {"accuracy", "top5_accuracy", "loss"}
    assert all(published == repeated for _, published, repeated in rows)
    out = capfd.readouterr().out
    assert "| metric | published | repeated | difference |" in out
    assert "+0" in out
    record = json.loads((tmp_path / "again/reproduction.json").read_text())
    assert record["published"] == record["repeated"]
    with pytest.raises(ValueError, match="is there and not empty"):
        rerun.reproduce("lab/run", tmp_path / "again", api=hub.api())
    # The comparison sees a difference where there is one.
    monkeypatch.setattr(rerun, "run_script", run_here)
    rows = rerun.reproduce("lab/run", tmp_path / "other", ["--seed", "8"], api=hub.api())
    assert any(published != repeated for _, published, repeated in rows)


def test_other_data_than_published_are_named():
    known = {"name": "train", "files": ["train.parquet"], "sha256": ["a"], "examples": 500, "evaluated": None}
    one, other = (replace(published("train_albert.py", {}), dataset={**known, **of}) for of in ({}, {
        "sha256": ["b"], "examples": 400, "evaluated": 20})
    )  # fmt: skip
    assert rerun.other_data(one, one) == []
    assert rerun.other_data(one, other) == [
        "other data than published: examples 500, here 400", "other data than published: sha256 ['a'], here ['b']"
    ]  # fmt: skip


def published(script, arguments):
    """A record with these, of which the rest is of no interest here."""
    return RunRecord(
        script=script, arguments=arguments, task="x", optimizer="x", metrics={}, config={}, epochs=[]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("evil.py", {"seed": 1}, "is not one of agr_hf's scripts"),
        ("../train_ddpm.py", {}, "is not one of agr_hf's scripts"),
        ("minimize_functions.py", {}, "is not one of agr_hf's scripts"),
        ("rm -rf /", {}, "is not one of agr_hf's scripts"),
        ("train_ddpm.py", {"features": "os:system"}, "would load code or files"),
        ("train_ddpm.py", {"features": "resnet20:x.th"}, "would load code or files"),
        ("train_ddpm.py", {"features": "timm:a\n/b"}, "would load code or files"),
        ("train_ddpm.py", {"optim": "evil:Optimizer"}, "would load code or files"),
        ("train_albert.py", {"optim": "evil:Optimizer"}, "would load code or files"),
        ("train_albert.py", {"optim": ["agr_adamw", "evil:Optimizer"]}, "would load code or files"),
        ("train_albert.py", {"deepspeed": "x.json"}, "has --deepspeed, which is not repeated"),
        ("train_albert.py", {"output_dir": "x"}, "has --output_dir, which is not repeated"),
        ("train_ddpm.py", {"output_dir": "x"}, "has --output_dir, which is not repeated"),
        ("train_ddpm.py", {"push_to_hub": True}, "has --push_to_hub, which is not repeated"),
        ("train_albert.py", {"push_training_state": True}, "has --push_training_state, which is not repeated"),
        ("train_albert.py", {"help": "x"}, "has --help, which is not repeated"),
        ("train_ddpm.py", {"help": "x"}, "has --help, which is not repeated"),
        ("train_albert.py", {"feat": "x"}, "has --feat, which is not repeated"),
        ("train_albert.py", {"model-name-or-path": "x"}, "has --model-name-or-path, which is not repeated"),
        ("train_albert.py", {"": "config.json"}, "has --, which is not repeated"),
        ("train_albert.py", {"seed=1 --deepspeed": "x"}, "which is not repeated"),
        ("train_image_classifier.py", {"torch_compile": True}, "--torch_compile"),
        # A value must be read back by the script's parser as it was: no argument hides in it, and its type is right.
        ("train_image_classifier.py", {"lr_milestones": [1, "--deepspeed=x.json"]}, "are not those of"),
        ("train_image_classifier.py", {"lr_milestones": [1, "--push_to_hub"]}, "are not those of"),
        ("train_image_classifier.py", {"lr_milestones": []}, "are not those of"),
        ("train_image_classifier.py", {"lr_milestones": ["-h"]}, "are not those of"),
        ("train_image_classifier.py", {"model_name": ["mlp", "--torch_compile"]}, "are not those of"),
        ("train_image_classifier.py", {"seed": "one"}, "are not those of"),
        ("train_image_classifier.py", {"seed": "1"}, "are not those of"),
        ("train_image_classifier.py", {"optim": "lion"}, "are not those of"),
        ("train_image_classifier.py", {"model_name": 3}, "are not those of"),
        ("train_image_classifier.py", {"train_file": "http://host/x.parquet"}, "is a place outside"),
        ("train_albert.py", {"train_file": "hf://datasets/x/y.parquet"}, "is a place outside"),
        ("train_albert.py", {"train_file": "/etc/passwd.txt"}, "is a place outside"),
        ("train_albert.py", {"tokenizer_name": "../../secret"}, "is a place outside"),
        ("train_ddpm.py", {"train_data": "~/photos"}, "is a place outside"),
        ("train_ddpm.py", {"train_data": ["~/photos"]}, "is a place outside"),
        ("train_ddpm.py", {"train_data": "///etc/x"}, "is a place outside"),
        ("train_ddpm.py", {"dataset_name": "!/" * 20_000}, "no run's have over 10,000"),
    ],
)
def test_hostile_arguments_are_refused(script, arguments, message, capfd):
    with pytest.raises(UserError, match=message) as error:
        rerun.published_arguments(published(script, arguments))
    assert "\n" not in str(error.value)
    assert capfd.readouterr().out == ""  # no help was shown


def test_code_in_a_tokenizer_of_others_is_not_run(tmp_path, monkeypatch):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tok.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tok: pass\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": ["tok.Tok", None]}})
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # nothing is to be asked
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises((ValueError, OSError, KeyError)):
        run_here("train_albert.py", [
            *SMALL["albert"][1:], "--tokenizer_name", str(folder), "--output_dir", str(tmp_path / "o"),
        ])  # fmt: skip
    assert not (tmp_path / "ran").exists()


def test_arguments_that_say_what_is_trained_become_words_for_the_script():
    arguments = {
        "model_name": "-x y", "lr_milestones": [1, 2], "use_cpu": True, "bf16": False, "learning_rate": 2e-05, "seed": 3,
        "num_train_epochs": 1.0, "save_strategy": "epoch", "optim": "agr_adamw", "optim_args": "second_moment=raw",
        "lr_scheduler_kwargs": '{"num_cycles": 2}',
    }  # fmt: skip
    assert rerun.published_arguments(published("train_image_classifier.py", arguments)) == [
        "--model_name=-x y", "--lr_milestones", "1", "2", "--use_cpu", "true", "--bf16", "false", "--learning_rate", "2e-05",
        "--seed", "3", "--num_train_epochs", "1", "--save_strategy", "epoch", "--optim", "agr_adamw",
        "--optim_args", "second_moment=raw", "--lr_scheduler_kwargs", '{"num_cycles": 2}',
    ]  # fmt: skip
    words = ["--features", "timm:resnet18", "--use_ema", "false", "--recipe", "digits"]
    arguments = {"features": "timm:resnet18", "use_ema": False, "recipe": "digits"}
    assert rerun.published_arguments(published("train_ddpm.py", arguments)) == words
    for script in rerun.SCRIPTS:
        assert rerun.published_arguments(published(script, {})) == []


@pytest.mark.parametrize(
    "name", ["--hub_token", "--hub-token", "--hub_tok", "--push_to_hub_token", "--push-to-hub-tok"]
)
def test_a_token_is_left_out_however_its_argument_is_written(name):
    rest = ["--push_to_hub", "true", "--seed", "1"]
    assert rerun.without_token_arguments([name, "secret", *rest]) == rest
    assert rerun.without_token_arguments([f"{name}=secret", *rest]) == rest


def test_a_token_behind_the_dashes_is_not_printed(capfd, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: SimpleNamespace(returncode=0))
    rerun.run_script("train_albert.py", ["--seed", "1", "--hub-token", "secret", "--x", "hf_" + "a" * 34])
    assert capfd.readouterr().out == "python training_scripts/train_albert.py --seed 1 --x '<secret>'\n"


def test_of_trainers_arguments_the_listed_ones_are_repeated_and_of_ours_all_but_those_that_say_no():
    trainers = {field.name for field in fields(TrainingArguments)}
    assert trainers >= rerun.TRAINER_ARGUMENTS
    for script in rerun.SCRIPTS:
        of_ours = {name: may for name, may in rerun.script_parser(script).repeatable.items() if name not in trainers}
        refused = {name for name, may in of_ours.items() if may is False}
        assert {"recipe", "gradient_statistics_every"} <= of_ours.keys() - refused
        assert {"help", "push_training_state"} <= refused


@pytest.mark.parametrize("kind", ["500", "429", "drop", "truncate", "checksum"])
def test_a_faulty_download_ends_whole_or_with_a_sentence(kind, hub, tmp_path, monkeypatch):
    from agr_hf.hub import retry

    monkeypatch.setattr(retry.time, "sleep", lambda seconds: None)
    run = made_up(tmp_path / "run")
    push_run(run, "lab/run", api=hub.api())
    before = len(hub.requests)
    download_run("lab/run", tmp_path / "clean", lambda name: True, api=hub.api())
    count = len(hub.requests) - before
    expected = {n: c for n, c in contents(tmp_path / "clean").items() if not n.startswith(".cache")}
    assert expected["model.safetensors"] == (run / "model.safetensors").read_bytes()
    for number in range(count):
        for times in (1, None):
            target = tmp_path / f"{number}-{times}"
            hub.fail(number, kind, times=times)
            try:
                download_run("lab/run", target, lambda name: True, api=hub.api())
                found = {n: c for n, c in contents(target).items() if not n.startswith(".cache")}
                assert found == expected, (number, times)
            except ConnectionError as error:
                assert times is None
                assert str(error).startswith("lab/run was not downloaded: ")
                for name, content in contents(target).items() if target.exists() else ():
                    assert name.startswith(".cache") or content == expected[name]
            hub.clear()


@pytest.mark.parametrize(
    "name",
    ["training_state/../../evil.json", "training_state\\..\\..\\evil.json", "/etc/evil.json", "samples/a\nb.png"],
)
def test_names_that_lead_out_of_the_folder_are_not_followed(name, hub, tmp_path):
    push_run(made_up(tmp_path / "run"), "lab/run", api=hub.api())
    hub.plant("lab/run", name, b"{}")
    target = tmp_path / "a" / "b"
    try:
        download_run("lab/run", target, lambda name: True, api=hub.api())
    except ValueError as error:
        assert "would leave the folder" in str(error)
    assert not [path for path in tmp_path.rglob("*evil*") if not path.is_relative_to(target)]
    assert not os.path.exists("/etc/evil.json")


def test_a_table_over_local_and_published_runs(trained, hub, tmp_path):
    for seed, value in enumerate((8.0, 9.0)):
        made_up(
            tmp_path / "runs" / str(seed),
            value,
            seed=seed,
            config={"model_name": "mlp", "learning_rate": 1e-3, "seed": seed},
        )
    push_run(made_up(tmp_path / "hub", 9.5, optimizer="adamw"), "lab/run", api=hub.api())
    table = leaderboard(collect([str(tmp_path / "runs"), "lab/run", str(trained["albert"])], api=hub.api()))
    lines = table.splitlines()
    assert lines[2].startswith("| albert | pydoc-topics | hidden 32 | AdaL |")
    assert lines[3] == "| image-classification | cifar10 | mlp | AdamW | 0.001 | – | 1 | Top-1 accuracy | 0.95 | 12 |"
    assert (
        lines[4]
        == "| image-classification | cifar10 | mlp | AdamW(AGR) | 0.001 | – | 2 | Top-1 accuracy | 0.85 ± 0.071 | 12 |"
    )
    with pytest.raises(ValueError, match=r"there is no results.json in .* or below it"):
        (tmp_path / "empty").mkdir()
        collect([str(tmp_path / "empty")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": [1]}, "Field 'metrics' expected a dict, got list"),
        ({"processes": "2"}, "Field 'processes' with value '2'"),
        ({"processes": 10**9}, "was made with 1000000000 processes"),
        ({"processes": -1}, "was made with -1 processes"),
    ],
)
def test_results_of_strangers_may_be_anything(changes, message, hub, tmp_path):
    run = made_up(tmp_path / "run")
    push_run(run, "lab/run", api=hub.api())
    hub.plant("lab/run", "results.json", json.dumps(json.loads((run / "results.json").read_text()) | changes).encode())
    with pytest.raises(ValueError, match=message):
        rerun.reproduce("lab/run", tmp_path / "again", api=hub.api())


@pytest.mark.parametrize("command", ["resume", "reproduce"])
def test_a_folder_with_files_of_the_user_is_not_touched(command, trained, hub, tmp_path):
    push_run(trained["image-classification"], "lab/run", with_training_state=True, api=hub.api())
    mine = tmp_path / "mine"
    (mine / "checkpoint-10").mkdir(parents=True)
    (mine / "checkpoint-10/model.safetensors").write_bytes(b"mine")
    before = contents(mine)
    with pytest.raises(ValueError, match=r"mine is there and not empty; pass a new folder as --output-dir"):
        getattr(rerun, command)("lab/run", mine, api=hub.api())
    assert contents(mine) == before


def test_a_table_leaves_out_what_is_no_training(tmp_path, caplog):
    made_up(tmp_path / "runs/a")
    (tmp_path / "runs/functions").mkdir()
    (tmp_path / "runs/functions/results.json").write_text('{"task": "functions"}')
    assert len(collect([str(tmp_path / "runs")])) == 1
    assert "left out: " in caplog.text


def test_arguments_behind_the_dashes_reach_the_script(hub, logged_in, tmp_path, capsys, monkeypatch):
    """The lines of README."""
    push_run(made_up(tmp_path / "run"), "lab/digits", api=hub.api())
    given = []

    def stop(script, arguments, processes):
        given.extend(arguments)
        raise RuntimeError("enough")

    monkeypatch.setattr(rerun, "run_script", stop)
    line = ["reproduce", "lab/digits", "--output-dir", str(tmp_path / "again"), "--", "--num_train_epochs", "20"]
    assert main(line) == 1
    assert given[-2:] == ["--num_train_epochs", "20"]
    assert capsys.readouterr().err.endswith("agr-hf: enough\n")
    for words, message in (
        (["reproduce", "lab/digits", "--output-dir", "x", "--max_steps", "3"], "come behind --"),
        (["push", "run", "--repo-id", "x", "--", "--seed", "1"], "unrecognized arguments: -- --seed 1"),
        (
            ["reproduce", "lab/digits", "--output-dir", "x", "--max_steps", "3"],
            "unrecognized arguments: --max_steps 3;",
        ),
        (["leaderboard", "run", "--seeds"], "unrecognized arguments: --seeds"),
    ):
        with pytest.raises(SystemExit):
            main(words)
        assert message in capsys.readouterr().err


def test_a_typing_error_in_a_folder_is_not_only_the_hubs_matter(hub, logged_in, tmp_path, capsys):
    assert main(["leaderboard", "runs/typo"]) == 1
    assert "there is no folder runs/typo here, and runs/typo was not downloaded" in capsys.readouterr().err
    assert main(["resume", str(tmp_path), "--output-dir", str(tmp_path / "x")]) == 1
    assert "is a folder here; run its own command again" in capsys.readouterr().err


def test_the_command_line(hub, logged_in, tmp_path, capsys):
    run = made_up(tmp_path / "run")

    def agr_hf(*words):
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    code, out, _ = agr_hf("push", run, "--repo-id", "lab/run", "--private", "--message", "By hand")
    assert code == 0
    assert out.startswith(f"{hub.endpoint}/lab/run/commit/")
    assert hub.commits("lab/run")[0].title == "By hand"
    assert agr_hf("card", run, "--output", tmp_path / "card")[0] == 0
    assert {path.name for path in (tmp_path / "card").iterdir()} == {"README.md", "curves.png"}
    assert "AdamW(AGR)" in agr_hf("leaderboard", "lab/run")[1]
    code, _, error = agr_hf("resume", "lab/absent", "--output-dir", tmp_path / "x")
    assert code == 1
    assert error.startswith("agr-hf: lab/absent was not downloaded: ")
    _, _, error = agr_hf("push", tmp_path, "--repo-id", "lab/run")
    assert error.startswith(f"agr-hf: {tmp_path} has no results.json: add RecordRun to your Trainer")
