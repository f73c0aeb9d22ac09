"""The record of a run on transformers' Trainer, and how long it trained."""

from __future__ import annotations

import logging
import time
from typing import Any, ClassVar

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class TrainingTime(TrainerCallback):
    """Seconds of training, of all parts of a run that was stopped and resumed.

    They are `.seconds` after the training, and in the entries of the log until then. What a part took after the last entry
    of its last checkpoint is not known.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._before, self._started, self._first_step = 0.0, 0.0, 0
        self._training = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._before = max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0)
        self._started, self._first_step = time.perf_counter(), state.global_step
        self._training = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._training and state.log_history:
            state.log_history[-1]["seconds"] = self._before + time.perf_counter() - self._started

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        made = state.global_step > self._first_step
        self.seconds = self._before + (time.perf_counter() - self._started if made else 0.0)
        self._training = False


class RecordRun(TrainingTime):
    """Leave the record of a run, `results.json`, in `output_dir`, for `agr-hf card`, `push`, `leaderboard` and `compare`.

        trainer = Trainer(..., callbacks=[RecordRun()])

    Under `agr-hf run` every Trainer has one. The main process writes the file when training ends, and again after each later
    `trainer.evaluate()` and `predict()`, whole or not at all. Until then there is none: that of an earlier training in this
    folder is removed when training begins, but for a finished run that is resumed and takes no step. With
    `load_best_model_at_end` the metrics are those of the best checkpoint.

    Tokens, paths outside of the working folder and arguments that are named like a secret are not recorded. A hyperparameter
    search is not recorded, for a callback does not know the folders of its trials.

    Args:
        dataset: name of the data in cards and tables. Default: what the `datasets` library knows.
    """

    def __init__(self, dataset: str | None = None) -> None:
        super().__init__()
        self.dataset = dataset
        self._train_data: Any = None
        self._further: dict[str, Any] = {}  # metrics of other prefixes than eval_
        self._state = "before"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._train_data = getattr(kwargs.get("train_dataloader"), "dataset", None)
        from agr_hf.tasks.own_run import has_own_record, remove_own_record

        folder = str(args.output_dir)
        self._further, self._state = {}, "search" if state.is_hyper_param_search else "training"
        if self._state == "training" and state.global_step >= state.max_steps and has_own_record(folder):
            # Resumed, with nothing left to do: no step is of this process, and its optimizer may be another one.
            self._state = "finished"
            logger.info("%s holds a finished run: its record is left as it is", folder)
        elif self._state == "training" and state.is_world_process_zero:
            remove_own_record(folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_end(args, state, control, **kwargs)
        if self._state == "training":
            self._state = "trained"
            best = state.best_global_step if args.load_best_model_at_end else None
            self._write(args, state, at_step=best, **kwargs)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._state in ("trained", "evaluated"):
            self._state = "evaluated"
            self._add_further(kwargs.get("metrics") or {})
            self._write(args, state, **kwargs)

    def on_predict(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        if self._state in ("trained", "evaluated"):
            self._add_further(metrics)
            best = state.best_global_step if args.load_best_model_at_end and self._state == "trained" else None
            self._write(args, state, at_step=best, **kwargs)

    def _add_further(self, metrics: dict[str, Any]) -> None:
        from agr_hf.tasks.runs import without_timings

        further = {key: value for key, value in metrics.items() if not key.startswith("eval_") and key != "epoch"}
        self._further |= without_timings(further)

    def _write(self, args: TrainingArguments, state: TrainerState, at_step: int | None = None, **kwargs: Any) -> bool:
        """Whether the record was written."""
        if not state.is_world_process_zero:
            return False
        from agr_hf.tasks.own_run import describe_own_dataset, loss_curve, write_own_record
        from agr_hf.tasks.runs import evaluation_metrics, summarize_epochs, summarize_gradients

        log = state.log_history
        evaluations = [entry for entry in log if any(key.startswith("eval_") for key in entry)]
        step = at_step if at_step is not None else evaluations[-1]["step"] if evaluations else None
        metrics: dict[str, Any] = {}
        for entry in evaluations:
            if entry["step"] == step:
                metrics |= evaluation_metrics(entry)
        if not metrics:
            metrics = {"train_loss": next((one["train_loss"] for one in reversed(log) if "train_loss" in one), None)}
        eval_data = getattr(kwargs.get("eval_dataloader"), "dataset", None)
        return write_own_record(
            str(args.output_dir),
            model=kwargs["model"],
            optimizer=kwargs["optimizer"],
            metrics={**metrics, **self._further},
            config=args.to_sanitized_dict(),
            device=args.device,
            epochs=summarize_epochs(log) or loss_curve(log),
            dataset=describe_own_dataset(self._train_data, eval_data, self.dataset),
            gradients=summarize_gradients(log),
            seed=args.seed,
            seconds=self.seconds,
        )


class AutomaticRecord(RecordRun):
    """What `agr-hf run` adds to every Trainer; a `RecordRun` of the script writes after it, and so wins."""

    folders: ClassVar[dict[str, None]] = {}  # that this process has written a record into

    def _write(self, args: TrainingArguments, *rest: Any, **kwargs: Any) -> bool:
        written = super()._write(args, *rest, **kwargs)
        if written:
            self.folders[str(args.output_dir)] = None
        return written
