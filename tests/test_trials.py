"""The queue of runs that commands and machines share: nothing is taken twice, and nothing of a dead worker is lost."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from agr_hf.experiments import trials as module
from agr_hf.experiments.trials import Range, Trials, Worker, open_storage


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def url(request, tmp_path):
    return f"sqlite:///{tmp_path}/trials.db" if request.param == "sqlite" else request.getfixturevalue("postgres")


def queue(url, folder, name):
    folder.mkdir(exist_ok=True)
    return Trials(open_storage(url), Worker(folder), name, maximize=False)


def test_workers_take_every_run_once(url, tmp_path, request):
    one, other = (queue(url, tmp_path / name, request.node.name) for name in ("one", "other"))
    runs = {f"run-{i}": {"arguments": [str(i)]} for i in range(6)}
    one.add(runs)
    other.add(runs)
    taken = []
    while (mine := one.take()) or (theirs := other.take()):
        for trial in (mine, theirs if mine is None else other.take()):
            if trial is not None:
                taken.append((trial.run, trial.trial.user_attrs["arguments"]))
                trial.finish({"loss": 0.5}, 0.5)
    assert sorted(taken) == [(f"run-{i}", [str(i)]) for i in range(6)]
    assert one.metrics() == {run: {"loss": 0.5} for run in runs}
    assert other.in_hand() == 0


def test_runs_that_two_have_queued_at_once_are_taken_once(url, tmp_path, request):
    one, other = (queue(url, tmp_path / name, request.node.name) for name in ("one", "other"))
    for of in (one, other):  # both looked before either had queued
        of._study.enqueue_trial({}, user_attrs={"run": "the same"})
    first = one.take()
    assert first.run == "the same"
    assert other.take() is None


def test_commands_that_take_at_the_same_moment_take_every_run_once(url, tmp_path, request):
    code = (
        "import sys; sys.path.insert(0, sys.argv[3]); from test_trials import *; q = queue(sys.argv[1], Path(sys.argv[2]), "
        "sys.argv[4]); print('ready', flush=True); sys.stdin.readline(); q.add({f'run-{i}': {} for i in range(30)})\n"
        "while taken := q.take():\n    taken.finish({'loss': 1.0}, 1.0); print(taken.run, flush=True)"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, url, str(tmp_path / name), str(Path(__file__).parent), request.node.name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for name in ("one", "other", "third")
    ]  # fmt: skip
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 3
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    taken = [run for process in processes for run in process.communicate()[0].split()]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(taken) == sorted(f"run-{i}" for i in range(30))


def test_a_trial_that_another_ended_in_the_same_moment_is_left_as_it_is(url, tmp_path, request, monkeypatch):
    one = queue(url, tmp_path / "one", request.node.name)
    one.add({"run": {}})
    taken = one.take()
    tell = one._study.tell

    def the_other_was_faster(number, **outcome):
        tell(number, state=module.TrialState.PRUNED)
        one._storage.set_trial_state_values(
            taken.identity, module.TrialState.FAIL
        )  # what tell does after it has looked

    monkeypatch.setattr(one._study, "tell", the_other_was_faster)
    taken.fail()
    assert one._study.trials[0].state == module.TrialState.PRUNED


def test_a_dead_worker_on_this_disk_is_known_at_once(url, tmp_path, request):
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[3]); from test_trials import *; "
        "q = queue(sys.argv[1], Path(sys.argv[2]), sys.argv[4]); q.add({'run': {}}); print(q.take().run, flush=True); "
        "time.sleep(100)"
    )
    command = [sys.executable, "-c", code, url, str(tmp_path / "shared"), str(Path(__file__).parent), request.node.name]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "run\n"
    own = queue(url, tmp_path / "shared", request.node.name)
    assert own.take() is None  # it lives, and has it in hand
    assert own.in_hand() == 1
    process.kill()
    process.wait()
    assert own.take().run == "run"


def test_a_silent_worker_on_another_machine_loses_its_run(url, tmp_path, request, monkeypatch):
    monkeypatch.setattr(module, "BEAT", 1)
    monkeypatch.setattr(module, "SILENT", 2)
    far, own = (queue(url, tmp_path / name, request.node.name) for name in ("far", "own"))
    far.add({"run": {"arguments": ["kept"]}})
    lost = far.take()
    for _ in range(3):  # as long as it says that it lives, it has the run
        time.sleep(1)
        lost.beat()
        assert own.take() is None
    time.sleep(3)
    taken = own.take()
    assert (taken.run, taken.trial.user_attrs["arguments"]) == ("run", ["kept"])
    taken.finish({"loss": 1.0}, 1.0)
    lost.finish({"loss": 2.0}, 2.0)  # awake again: too late
    assert own.metrics() == {"run": {"loss": 1.0}}


def test_what_failed_is_queued_again_by_the_next_command_only(tmp_path):
    url = f"sqlite:///{tmp_path}/trials.db"
    one = queue(url, tmp_path, "study")
    one.add({"run": {}})
    one.take().fail()
    assert one.take() is None
    one.add({"run": {}})
    assert one.take().run == "run"


def test_a_run_that_was_stopped_is_given_back(tmp_path):
    one = queue(f"sqlite:///{tmp_path}/trials.db", tmp_path, "study")
    one.add({"run": {"arguments": ["a"]}})
    one.take().give_back()
    again = one.take()
    assert (again.run, again.trial.user_attrs["arguments"]) == ("run", ["a"])


def test_a_search_has_its_budget_and_the_best_is_found(tmp_path):
    storage, worker = open_storage(f"sqlite:///{tmp_path}/trials.db"), Worker(tmp_path)
    search = Trials(storage, worker, "study", maximize=True, ranges=(Range("rate", 1e-4, 1.0),), budget=6)
    seen = []
    while taken := search.take():
        rate = taken.searched["rate"]
        seen.append(rate)
        # One run diverges, and is the worst there is.
        taken.finish({}, None if len(seen) == 2 else -abs(rate - 0.1))
    assert len(seen) == 6
    assert search.best() == {"rate": min((r for i, r in enumerate(seen) if i != 1), key=lambda r: abs(r - 0.1))}


def test_a_database_that_cannot_be_opened_is_named_without_its_password():
    with pytest.raises(ValueError, match=r"--storage: sqlite:////no/such/folder/t.db cannot be opened"):
        open_storage("sqlite:////no/such/folder/t.db")
    with pytest.raises(ValueError, match="cannot be opened") as caught:
        open_storage("nodialect://user:secret@host/name")
    assert "secret" not in str(caught.value)
