"""`agr-hf run`: a script of others, unedited, that knows the optimizers by name."""

from __future__ import annotations

import functools
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from multiprocessing import current_process
from pathlib import Path
from typing import Any

from agr_hf.errors import UserError
from agr_hf.integrations import private, register


class _Registration:
    """Registers where it is unpickled, and is itself again there: for the processes of processes."""

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _register_again, ()


def _register_again() -> _Registration:
    _prepare()
    return _Registration()


def _prepare() -> None:
    from agr_hf.integrations.recording import AutomaticRecord

    register()
    private.add_default_callback(AutomaticRecord)
    _train_resumably()


def _train_resumably() -> None:
    """Have the script's `trainer.train(...)` be `agr_hf.integrations.trainer.train`.

    The first part of a run too: what evaluations and collators draw is then the same in a run that was resumed.
    """
    from transformers import Trainer

    from agr_hf.integrations.resume import train

    own_train = Trainer.train
    if getattr(own_train, "__module__", None) == __name__:  # ours already
        return
    training: list[Trainer] = []

    @functools.wraps(own_train, assigned=("__doc__", "__name__"))
    def train_resumably(trainer: Trainer, resume_from_checkpoint: Any = None, *args: Any, **options: Any) -> Any:
        if trainer in training:
            return own_train(trainer, resume_from_checkpoint, *args, **options)
        training.append(trainer)
        try:
            names = ("trial", "ignore_keys_for_eval")
            return train(trainer, resume_from_checkpoint or None, **dict(zip(names, args, strict=False)), **options)
        finally:
            training.remove(trainer)

    Trainer.train = train_resumably  # type: ignore[method-assign, assignment]


def run(target: str, arguments: Sequence[str], *, as_module: bool = False) -> None:
    """Register the optimizers' names, then run a script as `python SCRIPT` or `python -m MODULE` would.

    It is `__main__`, with its own arguments and its folder first on `sys.path` (the current one for a module). Exceptions
    and `SystemExit` come out as they are. Processes that it starts by `multiprocessing` know the names too, whatever the
    start method; those that it starts as new programs do not. Every Trainer leaves the record of its run in its output
    folder (`agr_hf.integrations.callbacks.RecordRun`), and trains as `agr_hf.integrations.trainer.train` does: a resumed run
    ends as one never stopped, and `--resume_from_checkpoint latest` takes the last complete checkpoint.

    Args:
        target: path of a script, or with `as_module` the name of a module or package.
        arguments: those of the script.

    Raises:
        SystemExit: there is no such script or module; its code is the sentence for stderr.
    """
    if not as_module and not Path(target).exists():
        sys.exit(f"agr-hf: there is no script {target!r}; give its path, or the name of a module behind -m")
    folder = os.getcwd() if as_module else os.path.dirname(os.path.realpath(target))
    if not sys.flags.safe_path:
        sys.path[0] = folder
    if as_module and not _exists(target):
        sys.exit(f"agr-hf: there is no module {target!r} in this environment or in {folder}")
    _prepare()
    # What a process was configured with is sent to those that it spawns, and unpickled there before their function.
    current_process()._config["agr_hf"] = _Registration()  # type: ignore[attr-defined]
    sys.argv = [target, *arguments]
    if as_module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(target, run_name="__main__")
    _say_recorded()


def _say_recorded() -> None:
    from agr_hf.integrations.recording import AutomaticRecord

    for folder in AutomaticRecord.folders:
        print(
            f"agr-hf: {folder}/results.json is the record of the run; its card: agr-hf card {folder}", file=sys.stderr
        )
    AutomaticRecord.folders.clear()


def run_own_script(
    script: str | os.PathLike[str], arguments: Sequence[str], checkpoint: Path, output_dir: Path
) -> None:
    """`run` a script whose first `Trainer.train()` goes on from a checkpoint, as `agr_hf.integrations.trainer.train` does.

    The script need not know of it: whatever folder it names, that Trainer writes into `output_dir`.

    Raises:
        UserError: the script did not call `Trainer.train()`.
        SystemExit: there is no such script.
    """
    from transformers import Trainer

    from agr_hf.integrations.resume import train

    own_train, resumed = Trainer.train, False

    def train_on(trainer: Trainer, *ignored: Any, **options: Any) -> Any:
        nonlocal resumed
        resumed = True
        Trainer.train = own_train  # type: ignore[method-assign]
        trainer.args.output_dir = str(output_dir)
        found = train(trainer, str(checkpoint))
        _train_resumably()  # those that the script trains after it
        return found

    Trainer.train = train_on  # type: ignore[method-assign, assignment]
    try:
        run(str(script), arguments)
    finally:
        Trainer.train = own_train  # type: ignore[method-assign]
    if not resumed:
        raise UserError(
            f"{script} ended without a call of Trainer.train(), so nothing was resumed from {checkpoint}; it gets the "
            "arguments behind -- and no others: repeat there those of the first run"
        )


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # of a parent that is missing, or is no package
        return False
