"""Accelerate loops: checkpoints that survive a kill, an average of the weights, and clipping inside the step."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from agr_hf.errors import UserError
from agr_hf.files import write_text
from agr_hf.integrations import private
from agr_hf.integrations.checkpoints import folder_fault, newest_complete, numbered_checkpoints
from agr_hf.integrations.clipping import clip_in_step
from agr_hf.integrations.optimizer_states import loads_older_state
from agr_hf.integrations.random_states import mixed_seed

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)
# The names of a checkpoint's files: a copy of it may lack some.
MANIFEST = "files.json"


class Progress:
    """Where a loop is, saved and loaded with `accelerator.register_for_checkpointing`.

    Attributes:
        epoch: epochs completed.
        batches: batches of this process taken in the current epoch.
        step: optimizer steps made, steps skipped by a loss scaler included.
        total_batch_size: examples of a batch on all processes together; None before `batches_of_epoch`.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.batches = 0
        self.step = 0
        self.total_batch_size: int | None = None

    def state_dict(self) -> dict[str, int | None]:
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, int | None]) -> None:
        vars(self).update({"total_batch_size": None, **state})  # states of older versions lack it


def batches_of_epoch(accelerator: Accelerator, loader: Any, progress: Progress) -> Any:
    """The batches of epoch `progress.epoch` that are still to be taken, in the order of a run never stopped.

    The number of processes and the batch of each may be others than before the run was stopped: what was taken of the epoch
    is counted in examples.

    Args:
        accelerator: the one that prepared `loader`, with `DataLoaderConfiguration(use_seedable_sampler=True)`.
        loader: a prepared DataLoader.
        progress: where the loop is.

    Raises:
        ValueError: what was taken of the epoch is no whole number of batches now.
    """
    before, progress.total_batch_size = progress.total_batch_size, loader.total_batch_size
    if progress.batches and before not in (None, loader.total_batch_size):
        taken = progress.batches * before
        progress.batches, left_over = divmod(taken, loader.total_batch_size)
        if left_over:
            raise UserError(
                f"the checkpoint is of {taken} examples of an epoch, taken in batches of {before} on all processes "
                f"together, and now they are of {loader.total_batch_size}, which does not divide them; start a number of "
                "processes, or give each a batch, with a total that does, or go on from a checkpoint at the end of an epoch"
            )
    loader.set_epoch(progress.epoch)
    if not progress.batches:
        return loader
    rest = accelerator.skip_first_batches(loader, progress.batches)
    # accelerate < 1.15 lets the new loader begin at epoch 0, and so in another order.
    rest.set_epoch(progress.epoch)
    # A loader draws a seed for its workers as it begins. This one begins once more than that of a run never stopped, whose
    # next numbers are to be those of the model: of its dropout, say.
    if rest.base_dataloader.generator is None:
        seed = mixed_seed(progress.epoch, progress.batches)
        rest.base_dataloader.generator = torch.Generator().manual_seed(seed)
    return rest


def make_ema(model: torch.nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the parameters, buffers copied; update it with `.update_parameters(model)`.

    Args:
        model: not wrapped.
        decay: weight of the past, 0 <= decay < 1 (DDPM: 0.9999).
    """
    if not (isinstance(decay, Real) and 0 <= decay < 1):
        raise UserError(f"ema: decay={decay!r} is not allowed; it must be a number >= 0 and < 1")
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


ema_of = make_ema  # its name in 0.1


def clip_grad_norm_(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor], max_norm: float
) -> torch.Tensor:
    """`accelerator.clip_grad_norm_` that an optimizer of the package does inside its next step, without a pass of its own.

    For any other optimizer, for parameters with gradients that are not exactly the optimizer's, and under DeepSpeed, FSDP1
    and other kinds of distribution it is `accelerator.clip_grad_norm_` itself. Call it where that is called: after the last
    backward before the step.

    Args:
        accelerator: the one that prepared `optimizer`.
        optimizer: prepared, or one that needs no preparation.
        parameters: those to clip, such as `model.parameters()`.
        max_norm: > 0; math.inf measures only.

    Returns:
        The norm before clipping, a 0-dim tensor. Inside the step it is NaN until `optimizer.step()`: read it afterwards.
    """
    parameters = list(parameters)
    norm = clip_in_step(accelerator, optimizer, parameters, max_norm)
    return accelerator.clip_grad_norm_(parameters, max_norm) if norm is None else norm


def save_checkpoint(
    accelerator: Accelerator, output_dir: str | os.PathLike[str], step: int, keep: int | None = 2
) -> None:
    """`accelerator.save_state` into `checkpoint-{step}`, complete or not there at all; older ones than `keep` are removed.

    Every process calls it. The folder gets its name when every process has written; one that a kill left unfinished has
    another name, and is removed by the next save. Checkpoints of later steps, of a run that was resumed from before them,
    are renamed to `abandoned-...`, so that "latest" is this run's.

    Args:
        accelerator: the one that holds model, optimizer, scheduler and registered objects.
        output_dir: made if it is not there.
        step: >= 0.
        keep: how many checkpoints stay, the new one included, >= 1; None for all.

    Raises:
        ValueError: `step` or `keep` is out of range; nothing is written or removed then.
    """
    if not _is_whole(step, 0):
        raise UserError(f"save_checkpoint: step={step!r} is not allowed; it must be an integer >= 0")
    if keep is not None and not _is_whole(keep, 1):
        raise UserError(
            f"save_checkpoint: keep={keep!r} is not allowed; it must be an integer >= 1, or None to keep all"
        )
    output_dir = Path(output_dir)
    unfinished, finished = output_dir / f".unfinished-{step}", output_dir / f"checkpoint-{step}"
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        for old in output_dir.glob(".unfinished-*"):
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files = sorted(path.relative_to(unfinished).as_posix() for path in unfinished.rglob("*") if path.is_file())
        write_text(unfinished / MANIFEST, json.dumps(files) + "\n")
        # Of the same step twice, the older one is there until the newer has its name: checkpoint-05 is one of step 5 too.
        replaced = output_dir / f"checkpoint-0{step}"
        if finished.exists():
            _remove(replaced)
            os.replace(finished, replaced)
        os.replace(unfinished, finished)
        _remove(replaced)
        for number, later in numbered_checkpoints(output_dir):
            if number > step:
                # Of a run that this one left behind when it was resumed from an older checkpoint.
                aside = output_dir / f"abandoned-{later.name}-{time.time_ns()}"
                os.replace(later, aside)
                logger.warning("%s is of later steps than this run has made, and is kept as %s", later, aside)
        if keep is not None:
            for _, old in sorted(numbered_checkpoints(output_dir), reverse=True)[keep:]:
                _remove(old)
    accelerator.wait_for_everyone()


def _is_whole(number: Any, least: int) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool) and int(number) >= least


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, if there is one. Renamed first: a kill while files go must not leave one with holes."""
    if checkpoint.exists():
        gone = checkpoint.with_name(f".unfinished-{checkpoint.name}")
        os.replace(checkpoint, gone)
        shutil.rmtree(gone)


def load_checkpoint(
    accelerator: Accelerator, resume: str | os.PathLike[str] | bool | None, output_dir: str | os.PathLike[str]
) -> bool:
    """Load what `save_checkpoint` wrote; call it after everything is prepared and registered.

    Args:
        accelerator: the one that holds model, optimizer, scheduler and registered objects.
        resume: None to start afresh, "latest" for the last complete checkpoint of `output_dir` (if any; one that is not
            is named in a warning), or a folder. True is "latest", False is None, as for `agr_hf.integrations.trainer.train`.
        output_dir: where `save_checkpoint` writes.

    Returns:
        Whether anything was loaded.

    Raises:
        ValueError: the named folder does not exist or is not complete; the message says what is wrong with which file. Or
            its sharded state is of another optimizer.
    """
    if resume is None or resume is False:
        return False
    if resume is True or resume == "latest":
        found = latest_state(output_dir)
        if found is None:
            return False
        resume = str(found)
    fault = state_fault(Path(resume))
    if fault:
        raise UserError(f"cannot resume from {resume}: {fault}; name another one, or 'latest'")
    with ExitStack() as stack:
        for i, optimizer in enumerate(private.prepared_optimizers(accelerator)):
            stack.enter_context(loads_older_state(optimizer, Path(resume) / f"optimizer_{i}"))
        accelerator.load_state(resume)
    logger.info("resumed from %s", resume)
    return True


def record_run(
    accelerator: Accelerator,
    output_dir: str | os.PathLike[str],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    metrics: Mapping[str, Any],
    *,
    arguments: Mapping[str, Any] | Namespace | None = None,
    epochs: Sequence[Mapping[str, Any]] = (),
    train_data: Any = None,
    eval_data: Any = None,
    dataset: str | None = None,
    seconds: float | None = None,
) -> None:
    """Leave the record of a finished loop, `results.json`, as `agr_hf.integrations.callbacks.RecordRun` does for Trainer.

    Call it in every process when the model is saved; the main process writes.

        record_run(accelerator, args.output_dir, model, optimizer, {"accuracy": accuracy}, arguments=args)

    Args:
        accelerator: of the loop.
        output_dir: where the model is.
        model, optimizer: prepared or not.
        metrics: at the end.
        arguments: of the script, such as what `parse_args()` returned; those named like a secret are left out. "seed" is
            the run's.
        epochs: one mapping for each epoch, with its "epoch" and metrics, for the curves of the card.
        train_data, eval_data: data sets, for their names and sizes.
        dataset: name of the data, which wins.
        seconds: of training.
    """
    if not accelerator.is_main_process:
        return
    from agr_hf.tasks.own_run import describe_own_dataset, write_own_record

    given = vars(arguments) if isinstance(arguments, Namespace) else arguments or {}
    arguments = {str(key): value for key, value in given.items()}
    seed = arguments.get("seed")
    write_own_record(
        output_dir,
        model=model,
        optimizer=optimizer,
        metrics=metrics,
        config=arguments,
        device=accelerator.device,
        epochs=[dict(epoch) for epoch in epochs],
        dataset=describe_own_dataset(train_data, eval_data, dataset),
        seed=int(seed) if isinstance(seed, Integral) else None,
        seconds=seconds,
    )


def latest_state(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest complete `checkpoint-N` that `save_checkpoint` wrote, or None; broken ones are named in warnings."""
    return newest_complete(Path(output_dir), state_fault)


def state_fault(folder: Path) -> str | None:
    """What keeps `accelerator.load_state` from loading a folder, as a sentence, or None. Nothing is unpickled."""
    fault = folder_fault(folder)
    if fault:
        return fault
    if not list(folder.glob("random_states_*.pkl")):
        return "random_states_0.pkl is missing"
    if (folder / MANIFEST).exists():
        names = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return f"{MANIFEST} is no list of files"
        for name in names:
            if not (folder / name).exists():
                return f"{name} is missing"
    return None
