"""`agr-hf compare` with a script that is not the package's own: in one go, stopped and continued, shared by two."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from filelock import FileLock

from agr_hf.cli import main
from agr_hf.errors import UserError
from agr_hf.experiments.compare import compare
from agr_hf.experiments.comparison import plan_comparison
from agr_hf.experiments.processes import interrupts_wait

SCRIPT = """
import argparse, json, math, pathlib, random, sys, time
parser = argparse.ArgumentParser()
for name in ("--optim", "--output_dir", "--scale", "--trace"):
    parser.add_argument(name)
parser.add_argument("--seed", type=int)
arguments = parser.parse_args()
with open(arguments.trace, "a") as file:
    file.write(f"{arguments.optim} {arguments.seed} {arguments.scale}\\n")
time.sleep(0.05)
if arguments.optim == "broken":
    sys.exit("the script says why")
scale = float(arguments.scale or 1)
level = random.Random(arguments.seed).gauss(0.9, 0.05)  # of the seed, whatever the optimizer
noise = random.Random(f"{arguments.optim} {arguments.seed}").gauss(0, 0.001)
gain = {"adamw": 0.0, "helps": 0.01, "diverges": 0.0}[arguments.optim]
metrics = {"accuracy": level + gain + noise, "loss": 1 - level - gain + noise + abs(math.log(scale))}
if arguments.optim == "diverges" and arguments.seed == 1:
    metrics = {"accuracy": 0.1, "loss": None}
folder = pathlib.Path(arguments.output_dir)
folder.mkdir(parents=True, exist_ok=True)
(folder / "results.json").write_text(json.dumps({"metrics": metrics}))
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def plan(script, *names, seeds=4, settings=(), margin=0.2):
    return plan_comparison(
        str(script), names, seeds, settings, margin, None, ["--trace", str(script.with_name("trace"))]
    )


def trace(script):
    return sorted(script.with_name("trace").read_text().splitlines())


def test_a_comparison_finds_what_helps(script, tmp_path, capsys):
    trace_file = tmp_path / "trace"
    arguments = ["compare", str(script), "--optim", "adamw", "helps", "--seeds", "4", "--output", str(tmp_path / "out")]
    assert main([*arguments, "--set", "scale=1,2", "--", "--trace", str(trace_file)]) == 0
    out = capsys.readouterr().out
    assert "; 0 left, about" in out
    assert "| helps, scale=1 | AdamW, scale=1 | accuracy | 4 |" in out
    assert "helps, scale=2 against AdamW, scale=2, accuracy: better." in out
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    rows = {(row["metric"], row["settings"]["scale"]): row for row in found["comparisons"]}
    assert len(rows) == 4
    row = rows["accuracy", "2"]
    assert row["verdict"] == "better"
    assert row["low"] < 1.0 < row["high"]  # points of accuracy
    assert rows["loss", "1"]["difference"] > 0  # of a loss too, positive is better
    # What pairing is for: the seeds' own levels cancel.
    assert row["deviation"] < row["unpaired_deviation"] / 10
    assert (tmp_path / "out" / "runs" / "helps,scale=2" / "seed-3" / "results.json").exists()
    assert (tmp_path / "out" / "report.md").read_text() in out


def test_a_killed_comparison_goes_on_and_repeats_nothing(script, tmp_path):
    command = [
        sys.executable, "-m", "agr_hf", "compare", str(script), "--optim", "adamw", "helps", "--seeds", "4",
        "--output", str(tmp_path / "out"), "--", "--trace", str(tmp_path / "trace"),
    ]  # fmt: skip
    process = subprocess.Popen(command)
    while len(list((tmp_path / "out").glob("runs/*/*/results.json"))) < 3:
        time.sleep(0.01)
        assert process.poll() is None
    process.kill()
    process.wait()
    continued = compare(plan(script, "adamw", "helps"), tmp_path / "out")
    # The run that was in hand ended by itself, and is found done.
    assert len(trace(script)) == len(set(trace(script))) == 8
    whole = compare(plan(script, "adamw", "helps"), tmp_path / "other")
    assert continued["comparisons"] == whole["comparisons"]


def test_what_is_being_started_is_known_before_ctrl_c_ends_it():
    started = []
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt), interrupts_wait():
            signal.raise_signal(signal.SIGINT)
            started.append("run")
        assert started == ["run"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)  # as before
    finally:
        signal.signal(signal.SIGINT, handler)


def test_who_waits_for_the_run_of_a_stopped_command_says_so(script, tmp_path):
    folder, said = tmp_path / "out" / "runs" / "adamw", []
    folder.mkdir(parents=True)
    lock = FileLock(folder / "seed-0.lock", thread_local=False)
    lock.acquire()
    release = threading.Timer(2, lock.release)
    release.start()
    compare(plan(script, "adamw", "helps", seeds=1), tmp_path / "out", say=said.append)
    release.join()
    assert said[0] == "one seed has no interval, and no verdict: two or more have"
    assert said[1] == "adamw, seed-0: a command that was stopped has it in hand; waiting for it"
    assert len(said) == 4


@pytest.mark.kills
@pytest.mark.timeout(1800)
def test_ten_kills_leave_the_table_of_a_comparison_in_one_go(tmp_path):
    def command(name):
        return [
            sys.executable, "-m", "agr_hf", "compare", "images", "--optim", "adamw", "agr_adamw", "--seeds", "4",
            "--output", str(tmp_path / name), "--workers", "2", "--", "--model_name", "vit-micro", "--num_train_epochs", "4",
            "--max_train_samples", "512", "--gradient_statistics_every", "0",
        ]  # fmt: skip

    generator, kills = random.Random(0), 0
    while kills < 10:
        process = subprocess.Popen(command("killed"), start_new_session=True)
        try:
            process.wait(timeout=generator.uniform(5, 25))
        except subprocess.TimeoutExpired:
            # The command and all that it started, as when a machine goes down.
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
            process.wait()
        else:  # it came to an end before its time: begin another one
            assert process.returncode == 0
            shutil.rmtree(tmp_path / "killed")
    subprocess.run(command("killed"), check=True)
    subprocess.run(command("whole"), check=True)
    tables = [json.loads((tmp_path / name / "comparison.json").read_text()) for name in ("killed", "whole")]
    assert tables[0]["comparisons"] == tables[1]["comparisons"]


def test_two_commands_share_the_runs_and_take_none_twice(script, tmp_path):
    command = [
        sys.executable, "-m", "agr_hf", "compare", str(script), "--optim", "adamw", "helps", "--seeds", "8",
        "--output", str(tmp_path / "out"), "--workers", "2", "--", "--trace", str(tmp_path / "trace"),
    ]  # fmt: skip
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    tables = [out[out.index("# script.py") :] for out in said]
    assert tables[0] == tables[1]
    assert all(", seed-" in out for out in said)  # each took some
    assert len(trace(script)) == len(set(trace(script))) == 16


@pytest.mark.postgres
def test_two_machines_share_the_runs_through_a_database(script, tmp_path, postgres):
    def command(name):
        return [
            sys.executable, "-m", "agr_hf", "compare", str(script), "--optim", "adamw", "helps", "--seeds", "8",
            "--output", str(tmp_path / name), "--storage", postgres, "--", "--trace", str(tmp_path / "trace"),
        ]  # fmt: skip

    processes = [subprocess.Popen(command(name), stdout=subprocess.PIPE, text=True) for name in ("one", "other")]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    # Each has the files of its own runs, and both have the numbers of all.
    done = [len(list((tmp_path / name).glob("runs/*/*/results.json"))) for name in ("one", "other")]
    assert sum(done) == 16
    assert min(done) > 0
    tables = [json.loads((tmp_path / name / "comparison.json").read_text()) for name in ("one", "other")]
    assert tables[0]["comparisons"] == tables[1]["comparisons"]
    assert tables[0]["comparisons"][0]["n"] == 8
    assert len(trace(script)) == len(set(trace(script))) == 16


def test_a_search_tunes_each_optimizer_with_seeds_of_its_own(script, tmp_path):
    own = ["--trace", str(script.with_name("trace"))]
    comparison = plan_comparison(str(script), ["adamw", "helps"], 2, [], 0.2, None, own, ["scale=0.1..1000"], 5)
    found = compare(comparison, tmp_path / "out", workers=2)
    tuned = found["search"]["tuned"]
    lines = [line.split() for line in trace(script)]
    for name in ("adamw", "helps"):
        trials = [float(scale) for optimizer, seed, scale in lines if optimizer == name and seed == "1000000"]
        assert len(trials) == 5
        # The loss of the script is least at a scale of 1.
        best = min(trials, key=lambda scale: abs(math.log(scale)))
        assert tuned[name]["scale"] == best
        tried = found["search"]["tried"][name]
        assert sorted(of["arguments"]["scale"] for of in tried) == sorted(trials)
        assert min(tried, key=lambda of: of["value"])["arguments"] == tuned[name]
        assert {float(scale) for optimizer, seed, scale in lines if optimizer == name and seed != "1000000"} == {best}
    assert len(lines) == 2 * (5 + 2)
    compare(comparison, tmp_path / "out")  # repeats nothing
    assert len(trace(script)) == len(lines)
    with pytest.raises(ValueError, match="and 5 trials of scale"):
        compare(plan(script, "adamw", "helps"), tmp_path / "out")


def test_a_search_over_choices_tries_each_once(script, tmp_path):
    own = ["--trace", str(script.with_name("trace"))]
    comparison = plan_comparison(str(script), ["adamw", "helps"], 1, [], 0.2, None, own, ["scale=10,1,0.1"], 3)
    assert compare(comparison, tmp_path / "out")["search"]["tuned"] == {n: {"scale": 1.0} for n in ("adamw", "helps")}
    assert len(trace(script)) == 2 * (3 + 1)


# What it does beside a result, `--does` says; a file `repaired` beside it ends that.
ODD = """
import argparse, json, pathlib, sys
parser = argparse.ArgumentParser()
for name in ("--optim", "--output_dir", "--does"):
    parser.add_argument(name)
parser.add_argument("--seed", type=int)
parser.add_argument("--width", type=int, default=1)
arguments = parser.parse_args()
does = "" if pathlib.Path(__file__).with_name("repaired").exists() else arguments.does
folder = pathlib.Path(arguments.output_dir)
folder.mkdir(parents=True, exist_ok=True)
with open(folder.parents[2] / "trace", "a") as file:
    file.write(f"{arguments.optim} {arguments.seed} {arguments.width}\\n")
accuracy = {1: 0.7, 2: 0.9, 3: 0.8}[arguments.width] + 0.001 * arguments.seed % 0.01
metrics = {"accuracy": accuracy, "mse": 0.2}
if does == "fails after its record":
    metrics = {"train_loss": 1.0}
if arguments.optim == "b" and arguments.seed != 0 and does in ("NaN", "Infinity", "1" + 400 * "0"):
    metrics["mse"] = "?"
text = json.dumps({"metrics": metrics, "epochs": 5, "seconds": "ten"}).replace('"?"', does or "0")
if does == "writes no metrics":
    text = '{"metrics": {"accuracy": "high"}}'
if does == "writes no JSON":
    text = "{"
(folder / "results.json").write_text(text)
if does == "fails after its record":
    sys.exit("out of memory")
"""


@pytest.fixture
def odd(tmp_path):
    path = tmp_path / "odd.py"
    path.write_text(ODD)

    def plan_odd(does="", seeds=2, **options):
        return plan_comparison(
            str(path), ["adamw", "b"], seeds, [], 0.2, None, [f"--does={does}"] * bool(does), **options
        )

    return plan_odd


def test_a_mistake_that_all_runs_share_is_reported_once(odd, tmp_path):
    said = []
    with pytest.raises(RuntimeError, match=r"^4 of 4 runs failed: exit code 1: out of memory \(.*\)$") as caught:
        compare(odd("fails after its record"), tmp_path / "out", say=said.append)
    assert str(caught.value).count("out of memory") == 1
    assert str(caught.value).count(".log") == 4
    assert ["out of memory" in line for line in said] == [True, False, False, False]


@pytest.mark.parametrize(
    ("task", "name", "sentence"),
    [
        ("images", "agr_adamww", r"no optimizer 'agr_adamww' \(did you mean agr_adamw\?\); the names are"),
        ("images", "agr_adamw,agr_step=3", r"agr_adamw has no option agr_step \(did you mean agr_steps\?\); it has"),
        ("functions", "agr_adamw,agr_steps", r"'agr_steps' is not allowed; entries are name=value"),
        ("script", "agr_adamw,min_ndim=x", r"min_ndim='x' is not allowed"),
    ],
)
def test_what_every_run_would_fail_of_is_said_before_the_first(task, name, sentence, script):
    with pytest.raises(UserError, match=sentence):
        plan_comparison(str(script) if task == "script" else task, ["adamw", name], 2, [], 0.2, None, [])


def test_names_that_only_a_script_may_know_are_left_to_it(script):
    assert plan(script, "adamw", "of_the_script,x=1").cells[1].optim == "of_the_script"
    assert plan(script, "adamw,x=1", "agr_adamw").cells[0].optim == "adamw"
    assert plan_comparison("images", ["adamw_torch", "m:Class"], 2, [], 0.2, None, []).cells[1].optim == "m:Class"


def test_an_abbreviation_is_no_option(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["compare", str(script), "--optim", "adamw", "b", "--seed", "2", "--output", str(tmp_path / "out")])
    assert "--seeds" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("fails after its record", r"4 of 4 runs failed.*exit code 1: out of memory"),
        ("writes no metrics", r"4 of 4 runs failed.*no results.json with numbers as metrics \("),
        ("writes no JSON", r"4 of 4 runs failed.*no results.json with numbers as metrics \("),
    ],
)
def test_what_a_failed_run_has_left_is_no_result_and_the_repaired_script_runs_again(does, said, odd, tmp_path):
    for _ in range(2):
        with pytest.raises(RuntimeError, match=said):
            compare(odd(does), tmp_path / "out")
    (tmp_path / "repaired").touch()
    found = compare(odd(does), tmp_path / "out")
    assert {row["metric"]: row["n"] for row in found["comparisons"]} == {"accuracy": 2, "mse": 2}
    ran = len((tmp_path / "out" / "trace").read_text().splitlines())
    compare(odd(does), tmp_path / "out")
    assert len((tmp_path / "out" / "trace").read_text().splitlines()) == ran == 3 * 4


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1" + 400 * "0"], ids=lambda value: value[:9])
def test_a_number_that_is_not_finite_diverges_and_the_others_of_the_run_count(value, odd, tmp_path):
    found = compare(odd(value, seeds=3), tmp_path / "out")
    assert found["diverged"] == ["b, seed 1", "b, seed 2"]
    assert {row["metric"]: row["n"] for row in found["comparisons"]} == {"accuracy": 3, "mse": 1}
    searched = odd(value, seeds=1, search=["width=1,2"], trials=2, metric="mse")
    assert len(compare(searched, tmp_path / "searched")["search"]["tuned"]) == 2  # it ends
    assert len((tmp_path / "searched" / "trace").read_text().splitlines()) == 2 * (2 + 1)


def test_a_search_goes_by_a_metric_that_the_script_has_and_writes_whole_numbers(odd, tmp_path):
    said = "the search goes by loss, and the script's metrics are accuracy, mse: pass one as --metric"
    with pytest.raises(RuntimeError, match=said):
        compare(odd(search=["width=1,2,3"], trials=3), tmp_path / "loss")
    found = compare(odd(search=["width=1,2,3"], trials=3, metric="accuracy"), tmp_path / "accuracy")
    assert found["search"]["tuned"] == {"adamw": {"width": 2.0}, "b": {"width": 2.0}}
    command = "odd.py --optim adamw b --search width=1,2,3 --trials 3 --metric accuracy --seeds 2 --output DIR`"
    assert command in (tmp_path / "accuracy" / "report.md").read_text()


def test_another_script_of_the_same_name_and_what_is_damaged_are_refused(odd, tmp_path):
    compare(odd(), tmp_path / "out")
    other = tmp_path / "other" / "odd.py"
    other.parent.mkdir()
    other.write_text(ODD)
    with pytest.raises(ValueError, match=r"holds a comparison of .*/odd.py; pass another --output for .*/other/odd.py"):
        compare(plan_comparison(str(other), ["adamw", "b"], 2, [], 0.2, None, []), tmp_path / "out")
    for text in ("", "[]", '{"script": "odd.py"}'):
        (tmp_path / "out" / "compare.json").write_text(text)
        with pytest.raises(ValueError, match="compare.json is damaged; give another --output"):
            compare(odd(), tmp_path / "out")
    for name in ("a?b", "a%20b"):
        with pytest.raises(ValueError, match="has . or % in its path"):
            compare(odd(), tmp_path / name)


OPTIMIZER = """
import torch

class Halved(torch.optim.SGD):
    def __init__(self, params, lr=1e-3, weight_decay=0.0, *, factor: float = 0.5):
        super().__init__(params, lr=lr * factor, weight_decay=weight_decay)
"""


def test_an_optimizer_of_another_package_trains_through_the_scripts(tmp_path, monkeypatch):
    (tmp_path / "others.py").write_text(OPTIMIZER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = [
        sys.executable, "-m", "agr_hf", "compare", "images", "--optim", "others:Halved,factor=0.25", "sgd", "--seeds", "1",
        "--output", str(tmp_path / "out"), "--", "--model_name", "mlp", "--max_train_samples", "64",
        "--num_train_epochs", "1", "--save_strategy", "no", "--learning_rate", "0.1",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    runs = tmp_path / "out" / "runs"
    results = json.loads((runs / "others.Halved,factor=0.25" / "seed-0" / "results.json").read_text())
    assert results["optimizer"] == "others:Halved"
    assert results["optimizer_groups"][0]["lr"] == 0.1 * 0.25
    page = (tmp_path / "out" / "report.html").read_text()
    assert "SGD against Halved, factor=0.25, accuracy" in page


def test_a_run_that_diverges_is_a_result(script, tmp_path):
    found = compare(plan(script, "adamw", "diverges"), tmp_path / "out")
    assert found["diverged"] == ["diverges, seed 1"]
    rows = {row["metric"]: row for row in found["comparisons"]}
    assert rows["loss"]["seeds"] == [0, 2, 3]
    assert rows["accuracy"]["n"] == 4
    assert "Not finite at the end" in (tmp_path / "out" / "report.md").read_text()


def test_runs_that_fail_are_named_and_the_others_done(script, tmp_path):
    with pytest.raises(RuntimeError, match=r"3 of 9 runs failed.*exit code 1: the script says why.*seed-0\.log"):
        compare(plan(script, "adamw", "helps", "broken", seeds=3), tmp_path / "out")
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert {row["optimizer"] for row in found["comparisons"]} == {"helps"}


def test_more_seeds_join_and_another_comparison_is_refused(script, tmp_path):
    compare(plan(script, "adamw", "helps", seeds=1), tmp_path / "out")
    assert compare(plan(script, "adamw", "helps", seeds=3), tmp_path / "out")["comparisons"][0]["n"] == 3
    assert len(trace(script)) == 6
    other = plan_comparison(str(script), ["adamw", "helps"], 1, [], 0.2, None, ["--trace", "elsewhere"])
    with pytest.raises(ValueError, match="holds a comparison of script.py with the arguments"):
        compare(other, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"optimizers": ["adamw"]}, "two optimizers or more"),
        ({"baseline": "sgd"}, "a baseline among them"),
        ({"margin": 0.0}, "must be a number > 0"),
        ({"arguments": ["--seed=3"]}, "cannot be given to the script"),
        ({"settings": ["scale"]}, "must be ARGUMENT=VALUE"),
        ({"settings": ["scale=a/b"]}, "cannot hold a /"),
        ({"search": ["scale=1..2"]}, "--search and --trials go together"),
        ({"search": ["scale=2..1"], "trials": 3}, "ARGUMENT=LOW..HIGH with LOW < HIGH"),
        ({"search": ["scale=1"], "trials": 3}, "or ARGUMENT=A,B,..."),
        ({"settings": ["optim=sgd"]}, "--optim cannot be given to the script"),
        ({"search": ["seed=1,2"], "trials": 2}, "--seed cannot be given to the script"),
        ({"settings": ["scale=1,1"]}, "each value once"),
        ({"settings": ["scale=1", "scale=2"]}, "take each argument once, but scale, scale were given"),
        ({"settings": ["scale=1"], "search": ["scale=1,2"], "trials": 2}, "take each argument once"),
        ({"margin": math.inf}, "must be a number > 0"),
        ({"task": "nothing"}, "no task and no script 'nothing'; tasks are images"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, sentence, script):
    arguments = {
        "task": str(script), "optimizers": ["adamw", "helps"], "seeds": 1, "settings": [], "margin": 0.2,
        "baseline": None, "arguments": [],
    }  # fmt: skip
    with pytest.raises(ValueError, match=sentence):
        plan_comparison(**(arguments | change))
