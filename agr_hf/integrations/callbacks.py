"""Callbacks for Trainer: suspend AGR, show what it does, keep optimizer state without pickle."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from agr_hf.errors import UserError
from agr_hf.integrations.gradient_scale import gradient_scale_warning
from agr_hf.integrations.optimizer_states import save_optimizer
from agr_hf.integrations.recording import RecordRun as RecordRun  # found here too
from agr_hf.integrations.recording import TrainingTime as TrainingTime
from agr_hf.optim.flags import is_suspended, unwrapped
from agr_hf.optim.flattened import is_deepspeed_here
from agr_hf.optim.options import is_at_least_zero
from agr_hf.optim.statistics import agr_gradients, gradient_statistics

logger = logging.getLogger(__name__)


class SuspendAGR(TrainerCallback):
    """Stop applying AGR from an epoch on, to the end of the run (AGR paper, ablation, table 7).

    It sets `agr_suspended=True` in every group, which optimizer checkpoints keep: a run resumed later stays suspended, also
    without the callback. A training that begins before `at_epoch` (another `train()` of the same Trainer, or a checkpoint
    of a suspended run with a later `at_epoch`) begins with AGR. The entry of `log_history` at that step has
    `agr_suspended`, and the logger says so. It works for `attach_agr` too.

    Args:
        at_epoch: epochs with AGR, such as 250 of 300; a fraction suspends within an epoch.

    Raises:
        ValueError: `at_epoch` is no number >= 0.
    """

    def __init__(self, at_epoch: float) -> None:
        if not is_at_least_zero(at_epoch):
            raise UserError(f"SuspendAGR: at_epoch={at_epoch!r} is not allowed; it must be a number >= 0")
        self.at_epoch = at_epoch
        self.suspended = False
        self._to_log = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.suspended = self._to_log = False  # the same callback may be given to another training
        optimizer = unwrapped(kwargs["optimizer"])
        if not _groups_with_agr(optimizer):
            logger.warning("SuspendAGR: %s has no AGR to suspend", type(optimizer).__name__)
        elif state.num_train_epochs <= self.at_epoch:
            logger.warning("SuspendAGR: the run ends before epoch %g, with AGR to its end", self.at_epoch)
        suspended = [group for group in _groups_with_agr(optimizer) if is_suspended(group)]
        if suspended and not self._is_due(state):
            for group in suspended:
                group["agr_suspended"] = False
            logger.info("AGR, suspended before, is applied again until epoch %g", self.at_epoch)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.suspended or not self._is_due(state):
            return
        groups = _groups_with_agr(unwrapped(kwargs["optimizer"]))
        # Not `agr_flags`: under ZeRO a group has one flat parameter, and an `agr` for each of its layers.
        flags = [group.get("agr", True) for group in groups if not is_suspended(group)]
        was_active = any(any(flag) if isinstance(flag, list) else flag for flag in flags)
        for group in groups:
            group["agr_suspended"] = True
        self.suspended = True
        if was_active:
            self._to_log = True
            logger.info("AGR is suspended from epoch %g, step %d on", self.at_epoch, state.global_step)

    def _is_due(self, state: TrainerState) -> bool:
        # Half a step of slack: epochs are sums of step fractions, and 249.99999 is epoch 250.
        epoch = state.epoch or 0.0
        return epoch + 0.5 * epoch / max(state.global_step, 1) >= self.at_epoch

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._to_log:
            control.should_log = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._to_log and state.log_history:
            state.log_history[-1]["agr_suspended"] = True
            self._to_log = False


def _groups_with_agr(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Groups of the package's optimizers, or of one that AGR is attached to."""
    # `agr` alone proves nothing: agr_param_groups writes it for any optimizer.
    return [group for group in optimizer.param_groups if "agr_step" in group]


# What several measurements become in one entry of the log; means where nothing is said.
REDUCTIONS: dict[str, Callable[[list[float]], float]] = {"largest_share": max, "measurements": sum}


class GradientStatistics(TrainerCallback):
    """Log what AGR does to this model's gradients: by layer and overall, every so many steps.

    Keys are `gradients/{overall or parameter}/{effect, largest_share, l1_norm, zeros, log_mean, log_std}`; see
    `agr_hf.optim.statistics.GradientSummary`. They ride on Trainer's next log entry, so they reach `log_history` and
    whatever `report_to` names; the console shows the overall ones. Several measurements between two entries are logged as
    their mean, of the largest share as the maximum, and `gradients/overall/measurements` says how many they were. Gradients
    are measured as they are before the optimizer's step: before clipping where the step clips, and after it where Trainer
    does (docs/integrations.md, "Clipping"). Effect, shares and `log_std` do not depend on their scale; `l1_norm` and
    `log_mean` do.

        trainer = Trainer(...)
        GradientStatistics(every=100).attach(trainer)

    Given as `callbacks=[GradientStatistics()]` instead, the numbers reach `log_history` only: Trainer shows a callback
    nothing that its trackers would still see.

    Args:
        every: steps between measurements; on the others nothing is computed. Default 100.
        layers: whether to log each parameter that AGR applies to, or "overall" alone. Default True.

    Raises:
        ValueError: `every` is no whole number >= 1.
    """

    def __init__(self, every: int = 100, layers: bool = True) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise UserError(f"GradientStatistics: every={every!r} is not allowed; it must be a whole number >= 1")
        self.every = every
        self.layers = layers
        self._pending: dict[str, list[float]] = {}
        self._attached = False

    def attach(self, trainer: Trainer) -> GradientStatistics:
        """Add this callback to a trainer, with its log entries reaching every tracker. Returns itself."""
        log = trainer.log

        def log_with_statistics(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            log({**logs, **self._take()}, *args, **kwargs)

        trainer.log = log_with_statistics  # type: ignore[method-assign]
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, (PrinterCallback, ProgressCallback)):
                callback.on_log = partial(_log_overall, callback.on_log)  # type: ignore[method-assign]
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        self._attached = True
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trackers = [name for name in args.report_to or [] if name != "none"]
        if trackers and not self._attached:
            logger.warning(
                "GradientStatistics reaches log_history but not %s; call GradientStatistics(...).attach(trainer)",
                ", ".join(trackers),
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.every:
            return
        model: torch.nn.Module = kwargs["model"]
        found = gradient_statistics(agr_gradients(model, unwrapped(kwargs["optimizer"])))
        for name, summary in found.items():
            if self.layers or name == "overall":
                # A non-finite number is no JSON, and trackers choke on it; zeros say that a logarithm is missing.
                for key, value in summary.as_dict().items():
                    if math.isfinite(value):
                        self._pending.setdefault(f"gradients/{name}/{key}", []).append(value)
        if found:
            self._pending.setdefault("gradients/overall/measurements", []).append(1)
        elif is_deepspeed_here() and state.global_step == 0:
            logger.warning("GradientStatistics sees no gradients: DeepSpeed keeps them in its own partitions")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # What was measured belongs into the checkpoint: a run resumed from it does not measure it again.
        if control.should_save and self._pending:
            control.should_log = True

    on_epoch_end = on_step_end

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._pending and state.log_history:
            state.log_history[-1].update(self._take())

    def _take(self) -> dict[str, float]:
        pending, self._pending = self._pending, {}
        return {key: REDUCTIONS.get(key.rsplit("/", 1)[1], statistics.fmean)(values) for key, values in pending.items()}


def _log_overall(
    on_log: Callable[..., Any],
    args: TrainingArguments,
    state: TrainerState,
    control: TrainerControl,
    logs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """What prints logs to the console, without the layers: six numbers each, of hundreds."""
    shown = {
        key: value
        for key, value in (logs or {}).items()
        if not key.startswith("gradients/") or key.startswith("gradients/overall/")
    }
    return on_log(args, state, control, logs=shown, **kwargs)


class SaveOptimizerState(TrainerCallback):
    """Write `optimizer.safetensors` and `optimizer.json` into each checkpoint, beside Trainer's own `optimizer.pt`.

    `agr_hf.integrations.optimizer_states.load_optimizer` reads them back without pickle, on any machine.

    Raises:
        RuntimeError: a hyperparameter search begins a trial. Its checkpoints go into a folder that a callback does not know,
            so trials would overwrite each other's state.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_hyper_param_search:
            raise RuntimeError(
                "SaveOptimizerState does not work in a hyperparameter search: a callback does not know the folder of its "
                "trial; call trainer.remove_callback(SaveOptimizerState) before hyperparameter_search. Each trial's "
                "checkpoints have Trainer's own optimizer.pt"
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = f"{args.output_dir}/checkpoint-{state.global_step}"
        save_optimizer(unwrapped(kwargs["optimizer"]), folder, write=state.is_world_process_zero)


class GradientScaleCheck(TrainerCallback):
    """Warn once, when training begins, where this model and these arguments scale gradients (transformers #47688).

    Some models' heads take `num_items_in_batch` and drop it; Trainer then neither divides by the accumulation steps nor
    corrects for the processes, and gradients come out that many times larger. Adam does not mind; AdaL, of degree 2, and
    clipping do.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # On every process: the forward of a sharded model is a collective.
        optimizer = unwrapped(kwargs["optimizer"])
        warning = gradient_scale_warning(kwargs["model"], args, optimizer, kwargs.get("train_dataloader"))
        if warning and state.is_world_process_zero:
            logger.warning(warning)
