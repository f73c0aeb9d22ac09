"""Workers of a comparison: scripts in processes of their own, as many at a time as the user says."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from agr_hf.experiments.comparison import Cell, Comparison, make_words
from agr_hf.experiments.processes import ScriptRun, interrupts_wait
from agr_hf.experiments.results import is_number, read_metrics
from agr_hf.experiments.trials import BEAT, Taken, Trials

RESUMABLE = ("images", "albert", "ddpm")
TUNING_SEED = 1_000_000  # no run is evaluated with it


class Pool:
    """Runs scripts, as many at a time as there are workers; says which run is done, and how long the others take."""

    def __init__(self, comparison: Comparison, workers: int, say: Callable[[str], None]) -> None:
        self._comparison, self._workers, self._say = comparison, workers, say
        self._seconds: list[float] = []
        self.failed: dict[str, list[str]] = {}  # logs of runs by what they failed of

    def _start(self, taken: Taken, folder: Path, cell: Cell | None) -> tuple[BaseProcess, ScriptRun]:
        known = taken.trial.user_attrs
        optim, words = (known["optim"], known["arguments"]) if cell is None else (
            cell.optim, make_words(cell, taken.searched, TUNING_SEED)
        )  # fmt: skip
        words = [*words, *self._comparison.arguments, "--output_dir", str(folder / taken.run)]
        if self._comparison.task in RESUMABLE:
            words += ["--resume_from_checkpoint", "latest"]
        threads = max(1, (os.cpu_count() or 1) // self._workers)
        if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
            threads = min(threads, max(1, int(os.environ["OMP_NUM_THREADS"])))
        run = ScriptRun(self._comparison.script, tuple(words), optim, folder / taken.run, threads)
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        if run.is_going:
            self._say(f"{run.name}: a command that was stopped has it in hand; waiting for it")
        return run.start(), run

    def describe_failures(self) -> str:
        """What runs failed of, each reason once, with their logs."""
        return "; ".join(f"{why} ({', '.join(logs)})" for why, logs in self.failed.items())

    @property
    def failures(self) -> int:
        return sum(map(len, self.failed.values()))

    def work(self, trials: Trials, folder: Path, cell: Cell | None = None) -> None:
        """Take trials until none is left, here or in the hands of others; those of a search are all of one cell."""
        running: dict[BaseProcess, tuple[Taken, ScriptRun, float]] = {}
        in_hand: set[Taken] = set()
        over = threading.Event()

        def beat() -> None:
            # Apart, for the start of a process may take long: it loads what the scripts need.
            while not over.wait(BEAT):
                for taken in tuple(in_hand):
                    taken.beat()

        beats = threading.Thread(target=beat, daemon=True)
        beats.start()
        try:
            while True:
                while len(running) < self._workers and (taken := trials.take()):
                    in_hand.add(taken)
                    with interrupts_wait():
                        process, run = self._start(taken, folder, cell)
                        running[process] = (taken, run, time.monotonic())
                if not running and not trials.in_hand():
                    return
                if not running:
                    time.sleep(1)  # others have the last runs in hand
                wait([process.sentinel for process in running], timeout=BEAT)
                for process, (taken, run, start) in list(running.items()):
                    if not process.is_alive():
                        del running[process]
                        self._end(process, taken, run, time.monotonic() - start, trials)
                        in_hand.remove(taken)
        finally:
            over.set()
            beats.join()
            for process in running:  # Ctrl-C: the scripts end with their workers
                process.terminate()
                process.join(timeout=BEAT)
                process.kill()  # one that does not listen
                process.join()
            for taken in in_hand:
                taken.give_back()

    def _end(self, process: BaseProcess, taken: Taken, run: ScriptRun, seconds: float, trials: Trials) -> None:
        process.join()
        metrics = read_metrics(run.folder)
        key = self._comparison.objective
        why = "" if process.exitcode == 0 else f"exit code {process.exitcode}"
        if not why and metrics is None:
            why = "no results.json with numbers as metrics"
        if not why and trials.is_search and key not in (metrics or {}):
            why = f"the search goes by {key}, and the script's metrics are {', '.join(metrics or {})}: pass one as --metric"
        if why or metrics is None:
            said = run.last_line() if process.exitcode else ""
            why = f"{why}: {said}" if said else why
            # A mistake that all runs share is reported once.
            self._say(f"{run.name}: {'as before' if why in self.failed else why} ({run.log})")
            self.failed.setdefault(why, []).append(str(run.log))
            taken.fail()
            return
        taken.finish(metrics, metrics.get(key))
        self._seconds.append(seconds)
        in_hand = trials.in_hand()
        left = statistics.median(self._seconds) * in_hand / self._workers
        numbers = ", ".join(f"{key} {value:.4g}" for key, value in metrics.items() if is_number(value))
        self._say(f"{run.name}: {numbers or 'diverged'} ({seconds:.0f} s); {in_hand} left, about {left / 60:.0f} min")
