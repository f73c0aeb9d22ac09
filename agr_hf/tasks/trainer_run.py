"""A run of a script on Trainer, from the command line to the published record.

Scripts bring their model, data and metrics. This module alone of `tasks` stands above the hub, to which it pushes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, SchedulerType, Trainer, TrainerCallback, TrainingArguments, set_seed

from agr_hf.errors import UserError
from agr_hf.hub.push import push_finished, take_over_push
from agr_hf.integrations import register
from agr_hf.integrations.callbacks import GradientStatistics, SuspendAGR
from agr_hf.integrations.epochs import EpochData, EpochOf
from agr_hf.integrations.launch import check_launch
from agr_hf.integrations.recording import AutomaticRecord, TrainingTime
from agr_hf.integrations.resume import save_model, train
from agr_hf.integrations.trainer import OptimizerFactory, parse_optim_args, trainer_optimizer
from agr_hf.optim.registry import list_optimizers, optimizer_info
from agr_hf.tasks.arguments import ScriptParser
from agr_hf.tasks.recipes import refuse_data_parallel
from agr_hf.tasks.record import RunRecord, make_record
from agr_hf.tasks.runs import (
    evaluation_metrics,
    optimizer_groups,
    refuse_used,
    summarize_epochs,
    summarize_gradients,
)


@dataclass
class RunArguments:
    """Arguments of every script on Trainer, beside TrainingArguments."""

    recipe: str | None = field(default=None, metadata={"help": "defaults by name; the names are below"})
    lr_milestones: list[int] | None = field(default=None, metadata={"help": "epochs at which the rate is multiplied"})
    lr_gamma: float = field(default=0.1, metadata={"help": "by this"})
    suspend_agr_at_epoch: float | None = field(default=None, metadata={"help": "of the optimizers with AGR"})
    gradient_statistics_every: int = field(default=100, metadata={"help": "steps; 0 measures nothing"})
    push_training_state: bool = field(
        default=False, metadata={"help": "with --push_to_hub, so that others can resume", "repeatable": False}
    )


def trainer_parser(
    description: str | None, *kinds: type, recipes: Mapping[str, Mapping[str, Any]], **defaults: Any
) -> ScriptParser:
    """The parser of a script on Trainer.

    Args:
        description: for --help.
        *kinds: the script's own dataclasses of arguments.
        recipes: values by name.
        **defaults: of TrainingArguments, where the script's differ from those of all scripts.
    """
    register()
    common = {
        "optim": "agr_adamw", "learning_rate": 1e-3, "eval_strategy": "epoch", "logging_strategy": "epoch",
        "save_total_limit": 2, "report_to": "none",
    }  # fmt: skip
    kinds = (*kinds, RunArguments, TrainingArguments)
    return ScriptParser(*kinds, recipes=recipes, description=description, **{**common, **defaults})


def parse_run(parser: ScriptParser, argv: Sequence[str] | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`parser.parse`, in which milestones are the schedule: a schedule that was given wins over those of a recipe.

    Raises:
        UserError: milestones and another schedule were given.
        SystemExit: the command line is refused; the message says why.
    """
    parsed, given = parser.parse(argv)
    options, args = parsed[-2:]
    if options.lr_milestones:
        other = sorted(given.keys() & {"lr_scheduler_type", "warmup_steps"})
        if other and "lr_milestones" in given:
            raise UserError(f"lr_milestones are a schedule of their own; pass them, or {' and '.join(other)}")
        if other:
            options.lr_milestones = None
        else:
            args.lr_scheduler_type, args.warmup_steps = SchedulerType.CONSTANT, 0
    return parsed, given


class TrainerRun:
    """One run of a script. Made, it has parsed the command line, seeded, and refused what cannot be run here.

    Args:
        script: the script's file.
        parser: from `trainer_parser`.
        argv: None for the command line of this process.

    Attributes:
        own: the script's own arguments, an instance for each of its dataclasses.
        options, args: the other arguments.
        data_seed: of the order and augmentation of the data.

    Raises:
        UserError: the arguments contradict each other, the folder holds a run, or this process would train alone.
        SystemExit: the command line is refused.
    """

    trainer: Trainer

    def __init__(self, script: str, parser: ScriptParser, argv: Sequence[str] | None = None) -> None:
        self._script = script
        (*self.own, self.options, self.args), self._given = parse_run(parser, argv)
        set_seed(self.args.seed)
        check_launch(self.args)
        refuse_data_parallel(self.args)
        if self.args.process_index == 0:
            refuse_used(self.args.output_dir, self.args.resume_from_checkpoint)
        self._push = take_over_push(self.args, self.options.push_training_state)
        self.data_seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._clock = TrainingTime()

    def train(
        self,
        model: PreTrainedModel,
        train_data: Any,
        eval_data: Any,
        compute_metrics: Callable[[Any], Mapping[str, float]],
        *,
        callbacks: Sequence[TrainerCallback] = (),
        without: Sequence[type[TrainerCallback]] = (),
        **options: Any,
    ) -> dict[str, Any]:
        """Train from the start or a checkpoint; returns the metrics on `eval_data`.

        Args:
            model: to train.
            train_data, eval_data: as Trainer takes them; the first learns the current epoch where it is an `EpochData`.
            compute_metrics: as Trainer takes it.
            callbacks: of the script.
            without: callbacks of Trainer's own that are taken out.
            **options: further arguments of Trainer.

        Raises:
            UserError: the optimizer has no such option or schedule, or the checkpoint is not complete.
        """
        self._parameters = sum(param.numel() for param in model.parameters())
        own: list[Any] = [EpochOf(train_data)] if isinstance(train_data, EpochData) else []
        if self.options.suspend_agr_at_epoch is not None:
            own.append(SuspendAGR(at_epoch=self.options.suspend_agr_at_epoch))
        self.trainer = Trainer(
            model, self.args, train_dataset=train_data, eval_dataset=eval_data, compute_metrics=compute_metrics,  # type: ignore[arg-type]
            callbacks=[*own, *callbacks, self._clock], **self._optimizer(model, len(train_data)), **options,
        )  # fmt: skip
        for callback in (*without, AutomaticRecord):  # this run writes its own record
            self.trainer.remove_callback(callback)
        if self.options.gradient_statistics_every:
            GradientStatistics(every=self.options.gradient_statistics_every).attach(self.trainer)
        train(self.trainer, self.args.resume_from_checkpoint)
        return evaluation_metrics(self.trainer.evaluate())

    def _optimizer(self, model: PreTrainedModel, examples: int) -> dict[str, Any]:
        """Arguments for Trainer: an optimizer by name; with milestones its schedule too, which Trainer has no name for."""
        args, options = self.args, self.options
        name = str(args.optim.value)
        if name not in list_optimizers():
            if options.lr_milestones:
                raise UserError(
                    f"lr_milestones need an optimizer of agr_hf.list_optimizers(), but optim={name!r} was given"
                )
            return {}
        factory, kwargs = trainer_optimizer(name, args, **parse_optim_args(optimizer_info(name), args.optim_args))
        if not options.lr_milestones:
            return {"optimizer_cls_and_kwargs": (factory, kwargs)}
        optimizer = OptimizerFactory()(model, **kwargs)
        batch = args.train_batch_size * args.world_size
        batches = examples // batch if args.dataloader_drop_last else -(-examples // batch)
        steps_per_epoch = -(-batches // args.gradient_accumulation_steps)
        # LambdaLR, as the AGR paper says.
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: options.lr_gamma ** sum(step >= m * steps_per_epoch for m in options.lr_milestones)
        )
        return {"optimizers": (optimizer, schedule)}

    def record(self, task: str, metrics: Mapping[str, Any], dataset: Mapping[str, Any], **facts: Any) -> RunRecord:
        """The record of the run, after `train`.

        Args:
            task: see `RunRecord`.
            metrics: at the end.
            dataset: what `describe_dataset` says.
            **facts: for the record's `config`, beside the arguments and the number of parameters.
        """
        arguments = {key: value for own in (*self.own, self.options) for key, value in asdict(own).items()}
        log = self.trainer.state.log_history
        return make_record(
            script=self._script,
            arguments=self._given,
            task=task,
            optimizer=str(self.args.optim.value),
            metrics=metrics,
            config={**arguments, **self.args.to_sanitized_dict(), "parameters": self._parameters, **facts},
            epochs=summarize_epochs(log),
            dataset=dataset,
            optimizer_groups=optimizer_groups(self.trainer.optimizer),  # type: ignore[arg-type]
            gradients=summarize_gradients(log),
            seed=self.args.seed,
            seconds=self._clock.seconds,
            device=self.args.device,
        )

    def finish(self, task: str, metrics: Mapping[str, Any], dataset: Mapping[str, Any], **facts: Any) -> None:
        """Save the model, write the record and publish both, where that was asked for; arguments as of `record`.

        Every process calls it.
        """
        save_model(self.trainer)
        if self.trainer.is_world_process_zero():
            self.record(task, metrics, dataset, **facts).write(self.args.output_dir)
            if self._push:
                push_finished(self.args.output_dir, **self._push)
