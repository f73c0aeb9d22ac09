"""transformers' Trainer: training that resumes from what is complete, and completely."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from agr_hf.integrations import private
from agr_hf.integrations.checkpoints import read_weight_map, resolve_checkpoint
from agr_hf.integrations.optimizer_states import loads_older_state
from agr_hf.integrations.random_states import kept_random_states
from agr_hf.optim.attach import has_agr
from agr_hf.optim.flags import agr_flags, unwrapped
from agr_hf.optim.shards import is_dtensor

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import TrainOutput

logger = logging.getLogger(__name__)


def train(trainer: Trainer, resume_from_checkpoint: str | bool | None = None, **options: Any) -> TrainOutput:
    """`trainer.train(resume_from_checkpoint=...)` that resumes from what is complete, and completely.

    These go wrong without it:

    - Trainer's own "latest" takes a checkpoint that a kill left half-written. One of several processes may die before it
      wrote its random states, and the checkpoint looks complete: here the first process waits for the others.
    - For models whose files name weights otherwise than the model does (ViT and many others in transformers 5), Trainer
      loads what it finds by name, warns of missing keys and trains on from fresh weights (transformers #43701).
    - What a collator masks and a transform crops is drawn anew in the rest of an epoch: see
      `agr_hf.integrations.epochs.SeededDraws`. An evaluation takes from the random numbers of the training, so that a run
      resumed from a checkpoint before it trains otherwise. Here neither is so, and the run never stopped is to be trained
      by this function too.
    - A run with `max_steps` that is finished takes one step more.
    - A sharded optimizer state that was saved before an option of the groups existed, or by torch's AdamW, is not loaded.
    - A run with AGR goes on with torch's AdamW where its optimizer is not named again, and the other way round. It may be
      meant: a warning says so.

    Args:
        trainer: ready to train.
        resume_from_checkpoint: None, a checkpoint folder, or "latest" for the last complete one of the output folder (a
            fresh start where there is none); True is "latest".
        **options: other arguments of `trainer.train`.

    Raises:
        ValueError: the named checkpoint is not complete, or the newest one holds weights only; the message says what is
            wrong with which file.
    """
    from agr_hf.integrations.epochs import SeededDraws

    args = trainer.args
    # Without a disk that all share, each host has the random states of its own processes only.
    processes = None if args.save_on_each_node else args.world_size
    checkpoint = resolve_checkpoint(resume_from_checkpoint, args.output_dir, processes)
    evaluate, get_loader = trainer.evaluate, trainer.get_train_dataloader
    draws = SeededDraws(args.seed)

    def evaluate_apart(*args: Any, **kwargs: Any) -> dict[str, float]:
        with kept_random_states(_find_devices(trainer)):
            return evaluate(*args, **kwargs)

    def seeded_loader() -> DataLoader[Any]:
        loader, reason = get_loader(), None
        if not draws.seed_loader(loader) and checkpoint and (_read_state(checkpoint).get("epoch") or 0) % 1:
            reason = "the data are a stream or come from a loader of another kind; save at the ends of epochs"
        elif checkpoint and getattr(trainer.data_collator, "seed", None) is not None:
            reason = "the collator has a generator of its own; give it no seed"
        if reason:
            logger.warning("resumed from %s, batches are not those of a run never stopped: %s", checkpoint, reason)
        return loader

    with ExitStack() as stack:
        stack.enter_context(_replaced(trainer, "evaluate", evaluate_apart))
        stack.enter_context(_replaced(trainer, "get_train_dataloader", seeded_loader))
        if args.world_size > 1:
            name, save = private.rank_states_saver(trainer)

            def save_and_wait(output_dir: str) -> None:
                save(output_dir)
                trainer.accelerator.wait_for_everyone()

            stack.enter_context(_replaced(trainer, name, save_and_wait))
        callbacks: list[TrainerCallback] = [draws]
        if checkpoint is not None:
            callbacks.append(_check_resumed_callback(checkpoint))
            if found := private.optimizer_loader(trainer):
                name, load = found

                def load_older(folder: str | None) -> None:
                    optimizer: Any = trainer.optimizer
                    with loads_older_state(optimizer, Path(checkpoint) / "optimizer_0"):
                        load(folder)

                stack.enter_context(_replaced(trainer, name, load_older))
            if 0 < args.max_steps <= _read_state(checkpoint)["global_step"]:
                # Trainer looks for the end behind a step only; without data an epoch is one step, and all of them are over.
                empty: DataLoader[Any] = DataLoader([])  # type: ignore[arg-type]
                stack.enter_context(_replaced(trainer, "get_train_dataloader", lambda: empty))
        for callback in callbacks:
            trainer.add_callback(callback)
            stack.callback(trainer.remove_callback, callback)
        return trainer.train(resume_from_checkpoint=checkpoint, **options)


def _find_devices(trainer: Trainer) -> list[torch.device]:
    """Whose generators a forward pass may draw from: with DataParallel those of several devices."""
    device, count = trainer.args.device, trainer.args.n_gpu
    return [torch.device(device.type, index) for index in range(count)] if count > 1 else [device]


def save_model(trainer: Trainer) -> None:
    """`trainer.save_model()` that writes the whole model under FSDP too. Every process calls it.

    With `SHARDED_STATE_DICT`, the kind of its checkpoints, Trainer writes no model at all, and says nothing.
    """
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()


@contextmanager
def _replaced(trainer: Trainer, method: str, function: Callable[..., Any]) -> Iterator[None]:
    """A method of one trainer replaced for a while."""
    before = vars(trainer).get(method)
    setattr(trainer, method, function)
    try:
        yield
    finally:
        if before is None:
            delattr(trainer, method)
        else:
            setattr(trainer, method, before)


def _read_state(checkpoint: str) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    return state


def _check_resumed_callback(checkpoint: str) -> TrainerCallback:
    from transformers import TrainerCallback

    class CheckResumed(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            load_renamed_weights(kwargs["model"], checkpoint)
            if state.global_step < state.max_steps:
                _say_agr_changes(kwargs.get("optimizer"), checkpoint)

    return CheckResumed()


def _say_agr_changes(optimizer: torch.optim.Optimizer | None, checkpoint: str) -> None:
    """Where a run with AGR goes on without, or the other way round: torch's AdamW and ours take each other's state, and
    whoever forgot --optim would not notice."""
    path = Path(checkpoint) / "optimizer.pt"
    if optimizer is None or not path.is_file():
        return
    groups = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["param_groups"]
    # AGR that was attached leaves its count alone.
    had = any(any(agr_flags(group)) for group in groups if "agr" in group or "agr_step" in group)
    has = has_agr(unwrapped(optimizer)) and any(any(agr_flags(group)) for group in optimizer.param_groups)
    if had != has:
        logger.warning(
            "%s was trained %s AGR, and goes on %s: this run's optimizer is %s; if that is not meant, give the optimizer of "
            "the first run again (--optim %s, for example)",
            checkpoint,
            *(("with", "without") if had else ("without", "with")),
            type(unwrapped(optimizer)).__name__,
            "agr_adamw" if had else "adamw_torch",
        )


def load_renamed_weights(model: torch.nn.Module, checkpoint: str) -> bool:
    """Load a transformers model whose file names weights otherwise than it does. False where the names agree.

    Raises:
        RuntimeError: the weights are sharded over processes; the message says what to do.
    """
    from safetensors import safe_open
    from transformers import PreTrainedModel

    path, index = Path(checkpoint) / "model.safetensors", Path(checkpoint) / "model.safetensors.index.json"
    if not isinstance(model, PreTrainedModel) or not (path.exists() or index.exists()):
        return False
    if path.exists():
        with safe_open(path, framework="pt") as file:
            saved = set(file.keys())
    else:
        saved = set(read_weight_map(index))
    if saved <= set(model.state_dict()):
        return False
    if any(is_dtensor(param) for param in model.parameters()):
        raise RuntimeError(
            f"{checkpoint} names weights otherwise than {type(model).__name__} does, and Trainer cannot load such a file "
            "into sharded weights (transformers #43701); make the model with from_pretrained(checkpoint) before sharding"
        )
    loaded = type(model).from_pretrained(checkpoint, config=model.config)
    model.load_state_dict(loaded.state_dict())
    logger.warning(
        "the weights of %s were loaded under the names that %s gives them: keys that Trainer misses above are there",
        checkpoint,
        type(model).__name__,
    )
    return True
