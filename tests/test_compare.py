"""`agr-hf compare` with a script that is not the package's own: in one go, stopped and continued, shared by two."""

import json
import subprocess
import sys
import threading
import time

import pytest

from agr_hf.cli import main
from agr_hf.experiments.compare import compare, plan_comparison

SCRIPT = """
import argparse, json, pathlib, random, sys, time
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
level = random.Random(arguments.seed).gauss(0.9, 0.05)  # of the seed, whatever the optimizer
noise = random.Random(f"{arguments.optim} {arguments.seed}").gauss(0, 0.001)
gain = {"adamw": 0.0, "helps": 0.01, "diverges": 0.0}[arguments.optim]
metrics = {"accuracy": level + gain + noise, "loss": 1 - level - gain + noise}
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
    assert "[16/16]" in out
    assert "| helps, scale=1 | adamw | accuracy | 4 |" in out
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
    time.sleep(0.3)  # the script of the run that was in hand ends by itself
    done = len(list((tmp_path / "out").glob("runs/*/*/results.json")))
    before = len(trace(script))
    continued = compare(plan(script, "adamw", "helps"), tmp_path / "out")
    assert len(trace(script)) == before + 8 - done
    whole = compare(plan(script, "adamw", "helps"), tmp_path / "other")
    assert continued["comparisons"] == whole["comparisons"]


def test_two_commands_share_the_runs_and_take_none_twice(script, tmp_path):
    found = []

    def work():
        found.append(compare(plan(script, "adamw", "helps", seeds=8), tmp_path / "out", workers=2))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0]["comparisons"] == found[1]["comparisons"]
    assert len(trace(script)) == len(set(trace(script))) == 16


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
        ({"arguments": ["--seed=3"]}, "cannot stand behind --"),
        ({"settings": ["scale"]}, "must be ARGUMENT=VALUE"),
        ({"settings": ["scale=a/b"]}, "cannot hold a /"),
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
