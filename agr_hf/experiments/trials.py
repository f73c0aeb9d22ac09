"""Runs as Optuna's trials: a queue that commands, workers and machines share, and what came out of each run."""

from __future__ import annotations

import logging
import math
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from filelock import FileLock
from optuna.storages import RDBStorage, RetryFailedTrialCallback, fail_stale_trials
from optuna.trial import TrialState

from agr_hf.errors import UserError
from agr_hf.experiments.processes import is_locked

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

# A worker says every few seconds that it lives. The runs of one that has been silent for longer are taken by others: it may
# be on another machine, where nobody can look.
BEAT, SILENT = 5, 60

optuna.logging.set_verbosity(optuna.logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)


def open_storage(url: str) -> RDBStorage:
    """A database of trials, by SQLAlchemy's URL, such as `sqlite:///trials.db` or `postgresql+psycopg2://user@host/name`.

    Raises:
        UserError: it cannot be opened; the message has no password.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import IntegrityError, SQLAlchemyError

    timeout = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    for attempt in range(5):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the heartbeat is experimental, and its callback gets another name
                storage = RDBStorage(
                    url, engine_kwargs=timeout, heartbeat_interval=BEAT, grace_period=SILENT,
                    failed_trial_callback=RetryFailedTrialCallback(),
                )  # fmt: skip
            if url.startswith("sqlite"):
                _lock_from_the_first_read(storage.engine)
            return storage
        except (SQLAlchemyError, ImportError) as error:
            reason = str(error).splitlines()[0]
            if not (isinstance(error, IntegrityError) or "already exists" in reason) or attempt == 4:
                break
            time.sleep(1)  # another command makes the tables at this moment
    try:
        shown = make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        shown = "the URL"
    raise UserError(f"--storage: {shown} cannot be opened: {reason}")


def _lock_from_the_first_read(engine: Engine) -> None:
    """Make SQLite's transactions one after another.

    Optuna reads a trial's state and then writes it. PostgreSQL locks the row in between; SQLite has no such lock, and its
    driver begins a transaction only at the writing: two commands would both take the trial that waits.
    """
    from sqlalchemy import event

    @event.listens_for(engine, "connect")
    def leave_transactions_to_us(connection: Any, record: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections from before


@dataclass(frozen=True)
class Range:
    """Where a search looks for an argument.

    Attributes:
        low, high: ends, by orders of magnitude where they are far apart.
        choices: in their place: each is tried in turn.
    """

    argument: str
    low: float = 0.0
    high: float = 0.0
    choices: tuple[float, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Range:
        """`learning_rate=1e-4..1e-2`, or `learning_rate=0.01,0.001`.

        Raises:
            UserError: it is not of that form, or the range is empty.
        """
        argument, _, ends = text.partition("=")
        try:
            numbers = [float(end) for end in (ends.split("..") if ".." in ends else ends.split(","))]
        except ValueError:
            numbers = []
        if argument and ".." not in ends and len(numbers) > 1 and all(map(math.isfinite, numbers)):
            return cls(argument, choices=tuple(numbers))
        if not (argument and len(numbers) == 2 and -math.inf < numbers[0] < numbers[1] < math.inf):
            raise UserError(
                f"--search {text} is not allowed; it must be ARGUMENT=LOW..HIGH with LOW < HIGH, or ARGUMENT=A,B,..."
            )
        return cls(argument, numbers[0], numbers[1])

    def suggest(self, trial: optuna.Trial) -> float:
        if self.choices:
            return float(trial.suggest_categorical(self.argument, self.choices))
        return trial.suggest_float(self.argument, self.low, self.high, log=self.low > 0 and self.high / self.low >= 10)


class Worker:
    """This command as others on this disk see it: alive as long as it holds the lock of its file."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.name = folder, f"worker-{uuid.uuid4().hex}.lock"
        self._lock = FileLock(folder / self.name)
        self._lock.acquire()

    def is_dead(self, name: str) -> bool:
        """Whether a worker of this folder ended, and left its file. False for those of other disks."""
        path = self._folder / name
        return name != self.name and path.exists() and not is_locked(path)

    def end(self) -> None:
        self._lock.release()
        (self._folder / self.name).unlink(missing_ok=True)


class Trials:
    """One study: a queue of named runs, or a search with a number of trials.

    Args:
        storage: from `open_storage`.
        worker: that takes the trials.
        name: of the study.
        maximize: whether a large value is a good one.
        ranges: of a search; empty for a queue.
        budget: trials of a search.
    """

    def __init__(
        self,
        storage: RDBStorage,
        worker: Worker,
        name: str,
        *,
        maximize: bool,
        ranges: Sequence[Range] = (),
        budget: int = 0,
    ) -> None:
        self._storage, self._worker = storage, worker
        self._maximize, self._ranges, self._budget = maximize, ranges, budget
        self.failed = 0  # here, by the script's own fault
        with warnings.catch_warnings():
            # Workers on many trials at once: TPE then takes those in hand for bad ones, and looks elsewhere.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(seed=0, constant_liar=True)
        self._study = optuna.create_study(
            storage=storage, study_name=name, sampler=sampler, load_if_exists=True,
            direction="maximize" if maximize else "minimize",
        )  # fmt: skip

    @property
    def is_search(self) -> bool:
        return bool(self._ranges)

    def add(self, runs: Mapping[str, Mapping[str, Any]]) -> None:
        """Queue runs by name, with what a worker must know of them; those that failed before are queued again."""
        there = {trial.user_attrs.get("run") for trial in self._trials() if trial.state != TrialState.FAIL}
        for run, known in runs.items():
            if run not in there:
                self._study.enqueue_trial({}, user_attrs={"run": run, **known})

    def add_grid(self) -> None:
        """Queue every combination of a search's choices, where it has nothing but choices, as far as the budget goes."""
        if self._ranges and all(of.choices for of in self._ranges) and not self._trials():
            grid = [dict(zip([of.argument for of in self._ranges], values, strict=True))
                    for values in product(*(of.choices for of in self._ranges))]  # fmt: skip
            for values in grid[: self._budget]:
                self._study.enqueue_trial(values)

    def take(self) -> Taken | None:
        """A trial that is now this worker's; None where there is none to take."""
        with warnings.catch_warnings():
            # Experimental, and known from Study.optimize; here runs are asked for one by one.
            warnings.simplefilter("ignore")
            fail_stale_trials(self._study)
            self._take_from_the_dead()
            return self._take()

    def _take_from_the_dead(self) -> None:
        """Queue again what workers had in hand that are known to have ended, or that ended before they said who they are."""
        for trial in self._trials(TrialState.RUNNING):
            worker, began = trial.user_attrs.get("worker"), trial.datetime_start
            nobody = worker is None and began is not None and (datetime.now() - began).total_seconds() > SILENT
            if nobody or (worker and self._worker.is_dead(worker)):
                self.tell(trial.number, state=TrialState.FAIL)
                self.put_back(trial.params, trial.user_attrs)

    def put_back(self, params: Mapping[str, Any], known: Mapping[str, Any]) -> None:
        """Queue a run again that was stopped on the way."""
        self._study.enqueue_trial(dict(params), user_attrs={k: v for k, v in known.items() if k != "worker"})

    def _take(self) -> Taken | None:
        while True:
            trials = self._trials()
            waiting = any(trial.state == TrialState.WAITING for trial in trials)
            begun = self.failed + sum(trial.state != TrialState.FAIL for trial in trials)
            if not waiting and begun >= self._budget:
                return None
            trial = self._study.ask()
            searched = {of.argument: of.suggest(trial) for of in self._ranges}
            run = trial.user_attrs.get("run") or (f"trial-{trial.number}" if self._ranges else None)
            if run and not self._is_taken(run, trial.number):
                trial.set_user_attr("worker", self._worker.name)
                trial.set_user_attr("run", run)
                study = self._storage.get_study_id_from_name(self._study.study_name)
                identity = self._storage.get_trial_id_from_study_id_trial_number(study, trial.number)
                taken = Taken(self, trial, identity, run, searched)
                taken.beat()
                return taken
            # Two commands have queued the same run, or one was faster to take the last one that waited.
            self.tell(trial.number, state=TrialState.PRUNED)

    def tell(self, number: int, **outcome: Any) -> None:
        """Keep the outcome of a trial, as `Study.tell`, where no other worker has given it one."""
        with suppress(optuna.exceptions.UpdateFinishedTrialError):  # in the moment after tell has looked
            self._study.tell(number, skip_if_finished=True, **outcome)

    def _is_taken(self, run: str, number: int) -> bool:
        """Whether an earlier trial has the run; of two, all machines agree on which is earlier."""
        over = (TrialState.FAIL, TrialState.PRUNED)
        return any(t.number < number and t.state not in over and t.user_attrs.get("run") == run for t in self._trials())

    def in_hand(self) -> int:
        """How many runs some worker has, or will have."""
        return len(self._trials(TrialState.RUNNING, TrialState.WAITING))

    def metrics(self) -> dict[str, dict[str, Any]]:
        """Of each run that is done."""
        return {trial.user_attrs["run"]: trial.user_attrs["metrics"] for trial in self._trials(TrialState.COMPLETE)}

    def best(self) -> dict[str, float]:
        """The searched arguments of the best trial."""
        sign = -1 if self._maximize else 1
        return min(self._searched(), key=lambda t: sign * (t.value or 0.0)).params

    def tried(self) -> list[dict[str, Any]]:
        """The searched arguments of each trial, with the value that the search goes by."""
        return [{"arguments": trial.params, "value": trial.value} for trial in self._searched()]

    def _searched(self) -> list[optuna.trial.FrozenTrial]:
        """The first trials that are done, as many as the budget has."""
        return self._trials(TrialState.COMPLETE)[: self._budget]

    def _trials(self, *states: TrialState) -> list[optuna.trial.FrozenTrial]:
        """Those in one of some states, or all."""
        return self._study.get_trials(deepcopy=False, states=states or None)


@dataclass(frozen=True, eq=False)
class Taken:
    """A trial in hand.

    Attributes:
        run: its name; trial.user_attrs has what was queued with it.
        searched: arguments that the search chose for it.
    """

    trials: Trials
    trial: optuna.Trial
    identity: int
    run: str
    searched: Mapping[str, float]

    def beat(self) -> None:
        """Say that it is still in hand."""
        self.trials._storage.record_heartbeat(self.identity)

    def finish(self, metrics: Mapping[str, Any], value: float | None) -> None:
        """Keep what came out; a value of None, of a run that diverged, is the worst there is."""
        worst = -math.inf if self.trials._maximize else math.inf
        # A worker that was silent for long, asleep with its machine, comes back to a trial that others have taken over.
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            self.trial.set_user_attr("metrics", dict(metrics))
            self.trials.tell(self.trial.number, values=worst if value is None else value)

    def fail(self) -> None:
        """It has no result, and is not taken again before it is queued again."""
        self.trials.failed += 1
        self.trials.tell(self.trial.number, state=TrialState.FAIL)

    def give_back(self) -> None:
        """Queue it again: it was stopped on the way."""
        self.trials.tell(self.trial.number, state=TrialState.FAIL)
        self.trials.put_back(self.trial.params, self.trial.user_attrs)
