"""Scripts in processes that begin with torch and transformers loaded: a run of seconds does not wait ten for imports."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from agr_hf.experiments.results import read_metrics
from agr_hf.files import write_text

# Loaded once, in the server that the processes are forked from. Nothing there may start a thread or touch a device.
PRELOADED = """
    transformers.trainer accelerate timm datasets diffusers sklearn.datasets sklearn.model_selection agr_hf.hub.push
    agr_hf.integrations.trainer agr_hf.integrations.run agr_hf.tasks.images agr_hf.tasks.classifiers
""".split()


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a file."""
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


@dataclass(frozen=True)
class ScriptRun:
    """A script, and where what it leaves is found.

    Attributes:
        script: its file.
        arguments: of the script.
        optimizer: its name, or the `module:Class` of another package, which the process makes known as `--optim`.
        folder: of the run. Its log, its lock, and the file that says that it is done stand beside it.
        threads: of torch.
    """

    script: Path
    arguments: tuple[str, ...]
    optimizer: str
    folder: Path
    threads: int

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name}, {self.folder.name}"

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def mark(self) -> Path:
        """There once the script has ended well: a Trainer script has a record before its last evaluation."""
        return self.folder.with_name(f"{self.folder.name}.done")

    @property
    def is_going(self) -> bool:
        """Whether a process has it in hand: that of a command that was killed goes on to its end."""
        return is_locked(self._lock)

    @property
    def _lock(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.lock")

    def start(self) -> BaseProcess:
        """Start it in a process of its own; it returns at once where the run is done already."""
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            multiprocessing.set_forkserver_preload(PRELOADED)
        process: BaseProcess = context.Process(target=_execute, args=(self,), name=self.folder.name)
        process.start()
        return process

    def last_line(self) -> str:
        """Of what the script wrote: why it failed, as a rule."""
        try:
            lines = self.log.read_text(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1][:1000] if lines else ""


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Let Ctrl-C wait until the end of the block: what is started there must be known to those who end it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python interrupts the main thread alone
        return
    came: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if handler is None else handler)
        if came:
            signal.raise_signal(signal.SIGINT)


def _execute(run: ScriptRun) -> None:
    # The process holds the lock itself: whoever started it may be killed, and the run is still in hand until it ends.
    with FileLock(run._lock):
        if run.mark.exists() and read_metrics(run.folder) is not None:
            return
        for left in (run.mark, run.folder / "results.json"):  # of a go that failed
            left.unlink(missing_ok=True)
        file = os.open(run.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file, stream.fileno())
        os.close(file)
        os.environ["OMP_NUM_THREADS"] = str(run.threads)  # of the processes that the script starts
        import torch

        from agr_hf.integrations.run import run as run_script
        from agr_hf.optim.registry import add_optimizer

        torch.set_num_threads(run.threads)
        if ":" in run.optimizer:
            add_optimizer(run.optimizer)
        try:
            run_script(str(run.script), run.arguments)
        except SystemExit as end:
            if end.code not in (None, 0):
                raise
        write_text(run.mark, "")
