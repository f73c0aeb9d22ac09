"""A rank that dies ends the job, which names it; started again, the job ends with the bits of a run nobody killed."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launchers import ROOT, TORCHRUN, environment, finish, run
from safetensors.torch import load

LOOP = ["tests/launch/dying_loop.py", "--cpu", "--num_train_epochs", "2", "--save_steps", "5"]
LATEST = ["--resume_from_checkpoint", "latest"]
SEED = 20261
# torchrun 2.14 serves all starts of a job from one store, where a rank may find the addresses of the start before.
NEW_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def launcher(restarts):
    return [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "--max-restarts", restarts]


def ended(folder):
    models = [load((folder / name / "model.safetensors").read_bytes()) for name in ("model", "ema")]
    return {f"{i}.{name}": value for i, model in enumerate(models) for name, value in model.items()}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run([*launcher(0), *LOOP, "--output_dir", folder])
    return ended(folder)


@pytest.mark.launch
@pytest.mark.parametrize(("rank", "place"), [(1, "step"), (1, "collective"), (0, "save"), (1, "save")])
def test_a_job_started_again_ends_with_the_bits_of_a_run_nobody_killed(rank, place, undisturbed, tmp_path):
    dying = {"DYING_RANK": str(rank), "DYING_PLACE": place}
    printed = run([*launcher(1), *LOOP, *LATEST, "--output_dir", tmp_path], **dying, **NEW_STORE)
    assert re.search(rf"exitcode: -9\) local_rank: {rank} ", printed)
    assert same_bits(ended(tmp_path), undisturbed)


@pytest.mark.launch
def test_a_job_not_started_again_ends_soon_and_names_the_rank(tmp_path):
    began = time.monotonic()
    done = finish([*launcher(0), *LOOP, "--output_dir", tmp_path], DYING_RANK="1", DYING_PLACE="collective")
    assert done.returncode != 0
    last = done.stdout[done.stdout.index("Root Cause") :]
    assert re.search(r"rank +: 1 \(local_rank: 1\)", last)
    assert "Signal 9 (SIGKILL)" in last
    assert time.monotonic() - began < 60  # not the half hour for which the other one would have waited


@pytest.mark.launch
def test_one_process_goes_on_where_two_were_with_what_is_left_of_the_epoch(undisturbed, tmp_path):
    """Not to the bit: means of means round otherwise. 2e-3 * 16 steps is the largest move."""
    done = finish([*launcher(0), *LOOP, "--output_dir", tmp_path], DYING_RANK="1", DYING_PLACE="step")
    assert done.returncode != 0
    checkpoint = tmp_path / "checkpoint-5"  # of 8 steps an epoch
    assert checkpoint.exists()
    # The batch of an optimizer step stays what it was.
    alone = ["--per_device_train_batch_size", "128", "--output_dir", tmp_path]
    run([sys.executable, *LOOP, *LATEST, *alone], RANK="0")
    for name, value in ended(tmp_path).items():
        torch.testing.assert_close(value, undisturbed[name], rtol=0, atol=0.01 * 2e-3 * 16)


def workers(agent):
    """Process ids of the ranks that a torchrun agent has started."""
    return [
        int(pid) for task in Path(f"/proc/{agent}/task").iterdir() for pid in (task / "children").read_text().split()
    ]


def unfinished(folder):
    return list(folder.glob(".unfinished-*"))


@pytest.mark.kills
@pytest.mark.timeout(3600)
def test_fifty_kills_at_random_moments(tmp_path):
    random.seed(SEED)
    loop = [*LOOP, "--num_train_epochs", "200"]  # of 8 steps
    run([*launcher(0), *loop, "--output_dir", tmp_path / "whole"], timeout=900)
    log, folder = tmp_path / "log", tmp_path / "killed"
    kills, saving, starts, checkpoints = 0, 0, 0, set()
    with open(log, "w") as file:
        job = subprocess.Popen(
            list(map(str, [*launcher(60), *loop, *LATEST, "--output_dir", folder])), cwd=ROOT,
            env=environment(STEP_SECONDS="0.05", **NEW_STORE), stdout=file, stderr=file,
        )  # fmt: skip
    try:
        while kills < 50:
            while log.read_text().count("first step\n") < starts + 2:
                assert job.poll() is None, f"the job ended after {kills} kills"
                time.sleep(0.05)
            starts = log.read_text().count("first step\n")
            time.sleep(random.uniform(0, 3.0))  # a save is due every half second
            if kills % 2:
                deadline = time.monotonic() + 10
                while not unfinished(folder) and time.monotonic() < deadline:
                    time.sleep(0.0005)
                time.sleep(random.uniform(0, 0.02))
            saving += bool(unfinished(folder))
            checkpoints |= {path.name for path in folder.glob("checkpoint-*")}
            os.kill(random.choice(workers(job.pid)), signal.SIGKILL)
            kills += 1
        assert job.wait(600) == 0, log.read_text()[-3000:]
    finally:
        job.terminate()
        job.wait()
    assert same_bits(ended(folder), ended(tmp_path / "whole"))
    print(
        f"{kills} kills (seed {SEED}), {saving} of them in a save; {len(checkpoints)} checkpoints were there at a kill"
    )
    assert saving > 0
    assert len(checkpoints) > 25  # or the starts went on from nothing
