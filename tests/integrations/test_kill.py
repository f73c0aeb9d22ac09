"""kill -9 at random moments, saving included: the resumed run ends with the bits of the run never killed."""

import multiprocessing
import random
import signal
import socket
import time

import killed_job
import pytest
import torch
from safetensors.torch import load

from agr_hf.integrations.checkpoints import checkpoint_fault

SEED = 20260


def start(folder):
    """The process of a job, which has begun to train."""
    processes = multiprocessing.get_context("forkserver")
    begun, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=killed_job.run, args=(folder, sender))
    process.start()
    sender.close()
    assert begun.recv() == "training"
    return process


def unfinished(run):
    return [p for p in run.glob("checkpoint-*") if not (p / "trainer_state.json").exists()]


def wait_for_a_save(process, run, known):
    """Until a checkpoint that was not there before is being written."""
    deadline = time.monotonic() + 30
    while process.is_alive() and time.monotonic() < deadline:
        if set(unfinished(run)) - known:
            return
        time.sleep(0.0005)


def same_ends(tmp_path):
    one, other = (load((tmp_path / name / "end.safetensors").read_bytes()) for name in ("whole", "killed"))
    return all(torch.equal(one[name], other[name]) for name in one)


def exit_codes_of_two_ranks(folder, dies_at=None):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = multiprocessing.get_context("forkserver")
    ranks = [processes.Process(target=killed_job.run_rank, args=(folder, rank, port, dies_at)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()  # where it hangs
        process.join()
    return [process.exitcode for process in ranks]


def survive(tmp_path, kills):
    whole = start(tmp_path / "whole")
    whole.join()
    assert whole.exitcode == 0
    random.seed(SEED)
    folder = tmp_path / "killed"
    while_saving, broken, done = 0, 0, 0
    while done < kills:
        process = start(folder)
        if done % 2:
            wait_for_a_save(process, folder / "run", set(unfinished(folder / "run")))
            time.sleep(random.uniform(0, 0.02))
        else:
            time.sleep(random.uniform(0, 0.5))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the job ended before it was killed: give it more steps"
        faults = [checkpoint_fault(p) for p in (folder / "run").glob("checkpoint-*")]
        while_saving += done % 2
        broken += any(faults)
        done += 1
    last = start(folder)
    last.join()
    assert last.exitcode == 0
    assert same_ends(tmp_path)
    print(f"{done} kills (seed {SEED}), {while_saving} of them aimed at a save, {broken} left a broken checkpoint")
    return broken


@pytest.mark.slow
def test_a_rank_that_dies_before_its_random_states_leaves_no_complete_checkpoint(tmp_path):
    assert exit_codes_of_two_ranks(tmp_path / "whole") == [0, 0]
    killed = tmp_path / "killed"
    first, second = exit_codes_of_two_ranks(killed, dies_at=6)
    assert (first, second) == (1, 9)  # the other one does not wait for ever
    assert checkpoint_fault(killed / "run/checkpoint-6") == "trainer_state.json is missing"
    assert checkpoint_fault(killed / "run/checkpoint-3") is None  # save_total_limit=1 has not removed it
    assert exit_codes_of_two_ranks(killed) == [0, 0]
    assert same_ends(tmp_path)


def test_three_kills(tmp_path):
    survive(tmp_path, 3)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_four_kills(tmp_path):
    assert survive(tmp_path, 24) > 0  # or nothing was hit while it was saving
