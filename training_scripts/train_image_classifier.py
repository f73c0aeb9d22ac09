"""Train an image classifier with any of the package's optimizers, through Trainer.

    python training_scripts/train_image_classifier.py --model_name vit-tiny --num_train_epochs 25 --output_dir runs/digits
    python training_scripts/train_image_classifier.py --recipe agr-cifar100 --output_dir runs/cifar100
    torchrun --nproc_per_node 2 training_scripts/train_image_classifier.py --recipe adal-cifar10 --output_dir runs/adal

A recipe's batch is that of all processes together; --per_device_train_batch_size is of one.
`--optim` takes agr_hf.list_optimizers() and Trainer's own names. The default data need no network.
"""

import logging
from dataclasses import asdict, dataclass, field

import torch
from transformers import HfArgumentParser, SchedulerType, Trainer, TrainingArguments, set_seed

import agr_hf
from agr_hf.hub.push import push_finished, take_over_push
from agr_hf.integrations.callbacks import GradientScaleCheck, GradientStatistics, SuspendAGR, TrainingTime
from agr_hf.integrations.epochs import EpochOf
from agr_hf.integrations.launch import check_launch
from agr_hf.integrations.trainer import OptimizerFactory, parse_optim_args, save_model, train, trainer_optimizer
from agr_hf.optim.registry import optimizer_info
from agr_hf.tasks.classifiers import classifier, parameter_count
from agr_hf.tasks.images import classification_metrics, hub_source, load_images
from agr_hf.tasks.recipes import IMAGE_RECIPES, apply_recipe, given, refuse_data_parallel
from agr_hf.tasks.runs import (
    dataset_of,
    epochs_of,
    evaluation_of,
    gradients_of,
    optimizer_groups,
    refuse_used,
    run_main,
    write_results,
)

logger = logging.getLogger("train_image_classifier")


@dataclass
class ModelArguments:
    model_name: str = field(default="vit-tiny", metadata={"help": "resnet18, vit-tiny, swin-t, ... or any timm name"})


@dataclass
class DataArguments:
    dataset_name: str = field(default="digits", metadata={"help": "digits, cifar10, cifar100, tiny-imagenet, "
                              "fashion-mnist, mnist, a folder of images, or a Hub id"})  # fmt: skip
    train_file: str | None = field(default=None, metadata={"help": "parquet file in the place of the Hub"})
    test_file: str | None = field(default=None, metadata={"help": "parquet file in the place of the Hub"})
    image_size: int | None = field(default=None, metadata={"help": "height and width; default: the data set's own"})
    augmentation: str = field(default="none", metadata={"help": "none, flip-crop or rand-augment"})
    max_train_samples: int | None = None
    max_eval_samples: int | None = None


@dataclass
class RunArguments:
    recipe: str | None = field(default=None, metadata={"help": f"defaults of a paper: {', '.join(IMAGE_RECIPES)}"})
    lr_milestones: list[int] | None = field(default=None, metadata={"help": "epochs at which the rate is multiplied"})
    lr_gamma: float = field(default=0.1, metadata={"help": "by this"})
    suspend_agr_at_epoch: float | None = None
    gradient_statistics_every: int = field(default=100, metadata={"help": "steps; 0 measures nothing"})
    push_training_state: bool = field(default=False, metadata={"help": "with --push_to_hub, so that others can resume"})


def parse_args(argv=None):
    agr_hf.register()
    parser = HfArgumentParser((ModelArguments, DataArguments, RunArguments, TrainingArguments))
    parser.set_defaults(
        optim="agr_adamw", learning_rate=1e-3, per_device_train_batch_size=64, eval_strategy="epoch",
        logging_strategy="epoch", save_strategy="epoch", save_total_limit=2, report_to="none",
    )  # fmt: skip
    apply_recipe(parser, IMAGE_RECIPES, argv)
    model_args, data_args, run_args, args = parser.parse_args_into_dataclasses(argv)
    if run_args.lr_milestones:
        told = given(argv)
        other = told & {"lr_scheduler_type", "warmup_steps"}
        if other and "lr_milestones" in told:
            raise ValueError(f"lr_milestones are a schedule of their own; pass them, or {' and '.join(sorted(other))}")
        if other:
            run_args.lr_milestones = None  # a recipe's
        else:
            args.lr_scheduler_type, args.warmup_steps = SchedulerType.CONSTANT, 0  # the milestones are all there is
    return model_args, data_args, run_args, args


def main(argv=None):
    model_args, data_args, run_args, args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    set_seed(args.seed)
    check_launch(args)
    refuse_data_parallel(args)
    if args.process_index == 0:
        refuse_used(args.output_dir, args.resume_from_checkpoint)
    push = take_over_push(args, run_args.push_training_state)

    data = load_images(data_args.dataset_name, data_args.train_file, data_args.test_file, data_args.augmentation,
                       data_args.max_train_samples, data_args.max_eval_samples, data_args.image_size,
                       args.seed if args.data_seed is None else args.data_seed)  # fmt: skip
    logger.info("%s training and %s test images of %d x %d, %d classes", f"{len(data.train):,}", f"{len(data.test):,}",
                data.size, data.size, len(data.labels))  # fmt: skip
    model = classifier(model_args.model_name, data.size, data.channels, data.labels, data.mean, data.std)
    logger.info("%s: %s parameters", model_args.model_name, f"{parameter_count(model):,}")

    clock = TrainingTime()
    callbacks = [EpochOf(data.train), GradientScaleCheck(), clock]
    if run_args.suspend_agr_at_epoch is not None:
        callbacks.append(SuspendAGR(at_epoch=run_args.suspend_agr_at_epoch))
    trainer = Trainer(model, args, train_dataset=data.train, eval_dataset=data.test,
                      compute_metrics=classification_metrics, callbacks=callbacks,
                      **optimizer_of(model, args, run_args, len(data.train)))  # fmt: skip
    if run_args.gradient_statistics_every:
        GradientStatistics(every=run_args.gradient_statistics_every).attach(trainer)

    train(trainer, args.resume_from_checkpoint)
    metrics = evaluation_of(trainer.evaluate())
    logger.info("test accuracy %.2f%%, test loss %.4f", 100 * metrics["accuracy"], metrics["loss"])

    save_model(trainer)
    if trainer.is_world_process_zero():
        config = {**asdict(model_args), **asdict(data_args), **asdict(run_args), **args.to_sanitized_dict()}
        files = (data_args.train_file, data_args.test_file)
        write_results(
            args.output_dir,
            script=__file__,
            argv=argv,
            task="image-classification",
            optimizer=str(args.optim.value),
            groups=optimizer_groups(trainer.optimizer),
            seed=args.seed,
            config={**config, "parameters": parameter_count(model), "channels": data.channels},
            dataset=dataset_of(
                data_args.dataset_name,
                len(data.train),
                files,
                hub_source(data_args.dataset_name),
                split=data.test_split,
                evaluated=len(data.test),
                complete=len(data.test) == data.test_rows,
            ),
            epochs=epochs_of(trainer.state.log_history),
            metrics=metrics,
            seconds=clock.seconds,
            device=args.device,
            gradients=gradients_of(trainer.state.log_history),
        )
        if push:
            push_finished(args.output_dir, **push)
    return metrics


def optimizer_of(model, args, run_args, examples):
    """Arguments for Trainer: an optimizer by name; with milestones, its schedule too, which Trainer has no name for."""
    name = str(args.optim.value)
    if name not in agr_hf.list_optimizers():
        if run_args.lr_milestones:
            raise ValueError(
                f"lr_milestones need an optimizer of agr_hf.list_optimizers(), but optim={name!r} was given"
            )
        return {}
    factory, kwargs = trainer_optimizer(name, args, **parse_optim_args(optimizer_info(name), args.optim_args))
    if not run_args.lr_milestones:
        return {"optimizer_cls_and_kwargs": (factory, kwargs)}
    optimizer = OptimizerFactory()(model, **kwargs)
    batch = args.train_batch_size * args.world_size
    batches = examples // batch if args.dataloader_drop_last else -(-examples // batch)
    steps_per_epoch = -(-batches // args.gradient_accumulation_steps)
    # LambdaLR, as the AGR paper says.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: run_args.lr_gamma ** sum(step >= m * steps_per_epoch for m in run_args.lr_milestones)
    )
    return {"optimizers": (optimizer, schedule)}


if __name__ == "__main__":
    run_main(main)
