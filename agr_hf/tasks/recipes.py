"""The papers' settings by name, as defaults of a script's arguments: every one of them may be given otherwise."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from agr_hf.errors import UserError

if TYPE_CHECKING:
    from transformers import TrainingArguments

# total_batch_size is of all processes: the papers' batch, whatever a run is started on. Accumulation multiplies it.

# AGR paper, section 5.1 and 5.3: CIFAR-100 for 200 epochs on 2 GPUs with 64 each; "official default settings" of AdamW (lr
# 1e-3). Decay 5e-4, milestones 60/120/160 and factor 0.2 are those of the training code it builds on (weiaicunzai's
# pytorch-cifar100), which also flips and crops. Its rotations by up to 15 degrees and its first epoch of linear warmup are
# not in the paper, and left out.
_AGR_CIFAR = {
    "optim": "agr_adamw",
    "learning_rate": 1e-3,
    "weight_decay": 5e-4,
    "num_train_epochs": 200,
    "total_batch_size": 128,
    "lr_milestones": [60, 120, 160],
    "lr_gamma": 0.2,
    "augmentation": "flip-crop",
    "max_grad_norm": 0.0,
}
# AGR paper, section 5.3: 300 epochs, 2 GPUs with 128 each, the models' official settings. Of these, decay 0.05, cosine
# schedule with 20 epochs of warmup and RandAugment are Swin's and ConvNeXt's, clipping at 5 is Swin's and TinyViT's. Mixup,
# cutmix, label smoothing, random erasing and colour jitter are left out: compare with runs made here and not with theirs.
_AGR_TINY_IMAGENET = {
    "dataset_name": "tiny-imagenet",
    "optim": "agr_adamw",
    "learning_rate": 1e-3,
    "weight_decay": 0.05,
    "num_train_epochs": 300,
    "total_batch_size": 256,
    "max_grad_norm": 5.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.0667,
    "augmentation": "rand-augment",
}
# AdaL paper, section 3: 150 epochs, batch 128, lr searched in {0.01, 0.001, 0.0001}, x0.1 at epochs 50 and 100, decay 5e-4,
# betas 0.9 and 0.999 (Trainer's defaults).
_ADAL = {
    "optim": "adal",
    "learning_rate": 1e-3,
    "weight_decay": 5e-4,
    "num_train_epochs": 150,
    "total_batch_size": 128,
    "lr_milestones": [50, 100],
    "lr_gamma": 0.1,
    "augmentation": "flip-crop",
    "max_grad_norm": 0.0,
}
IMAGE_RECIPES: dict[str, dict[str, Any]] = {
    "agr-cifar10": {**_AGR_CIFAR, "dataset_name": "cifar10", "model_name": "resnet18"},
    "agr-cifar100": {**_AGR_CIFAR, "dataset_name": "cifar100", "model_name": "resnet18"},
    "agr-tiny-imagenet": {**_AGR_TINY_IMAGENET, "model_name": "swin-t"},
    # Table 7: AGR for 250 of the 300 epochs is the best of TinyViT-11M.
    "agr-tiny-imagenet-suspended": {**_AGR_TINY_IMAGENET, "model_name": "tinyvit-11m", "suspend_agr_at_epoch": 250.0},
    "adal-cifar10": {**_ADAL, "dataset_name": "cifar10", "model_name": "resnet34"},
    "adal-cifar100": {**_ADAL, "dataset_name": "cifar100", "model_name": "resnet34"},
    # AdaL paper, figure 1: gradient norms of an MLP on MNIST; batch and epochs are not given there.
    "adal-mnist": {
        "optim": "adal",
        "dataset_name": "mnist",
        "model_name": "mlp",
        "learning_rate": 1e-3,
        "num_train_epochs": 20,
        "total_batch_size": 128,
        "max_grad_norm": 0.0,
    },
}


# What the scripts call the batch of one process.
BATCH_ARGUMENTS = ("per_device_train_batch_size", "train_batch_size")


def apply_recipe(
    parser: argparse.ArgumentParser, recipes: Mapping[str, Mapping[str, Any]], argv: Sequence[str] | None = None
) -> None:
    """Make the recipe named by `--recipe` the defaults of a parser; what the command line says wins.

    A recipe's `total_batch_size` becomes the parser's batch of one process, by the launcher's WORLD_SIZE. The parser takes
    whole names only from here on: an abbreviated `--recipe` would be noted down and not applied.

    Raises:
        SystemExit: there is no such recipe, or its batch cannot be shared by so many processes; the message says what to do.
    """
    parser.allow_abbrev = False
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--recipe")
    name = peek.parse_known_args(sys.argv[1:] if argv is None else argv)[0].recipe
    if name is None:
        return
    if name not in recipes:
        parser.error(f"there is no recipe {name!r}; the names are {', '.join(recipes)}")
    values = dict(recipes[name])
    (batch,) = {action.dest for action in parser._actions} & set(BATCH_ARGUMENTS)
    total, processes = values.pop("total_batch_size"), int(os.environ.get("WORLD_SIZE", "1"))
    if total % processes and batch not in given_arguments(parser, argv):
        parser.error(
            f"the recipe {name!r} has batches of {total}, which {processes} processes cannot share; start another number of "
            f"processes, or pass --{batch}"
        )
    values[batch] = total // processes
    # A value replaces the requirement to give one.
    for action in parser._actions:
        if action.dest in values:
            action.required = False
    parser.set_defaults(**values)


class _Given(argparse.Namespace):
    """A namespace with None for every name: argparse sets defaults only where a name has no value yet, so none are set."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def given_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The arguments that a command line gives, by name and with their types: no defaults, of the parser or of a recipe.

    Args:
        parser: of the script.
        argv: None for the command line of this process.

    Raises:
        SystemExit: the parser refuses the command line.
    """
    return vars(parser.parse_args(argv, _Given()))


def check_counts(parser: argparse.ArgumentParser, args: Any, *names: str) -> None:
    """Exit where one of some arguments is less than 1, or AGR is to be suspended in an optimizer that has none."""
    for name in names:
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is not allowed; it must be at least 1")
    if getattr(args, "agr_steps", None) is not None and not args.optim.startswith("agr_"):
        parser.error(f"--agr_steps is for the optimizers with AGR, and --optim is {args.optim}")


def refuse_data_parallel(args: TrainingArguments) -> None:
    """Raise UserError where Trainer would train on several GPUs from one process, with so many times the batch.

    Neither a recipe's batch nor that of `results.json` would be the one of the run.
    """
    if args.n_gpu > 1:
        raise UserError(
            f"one process sees {args.n_gpu} GPUs and would train {args.n_gpu} batches as one; start the script with "
            f"torchrun --nproc_per_node {args.n_gpu}, or show it one (CUDA_VISIBLE_DEVICES=0)"
        )
