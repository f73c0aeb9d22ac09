"""The papers' settings by name, as defaults of a script's arguments: every one of them may be given otherwise."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

# AGR paper, section 5.1 and 5.3: CIFAR-100 for 200 epochs on 2 GPUs with 64 each; "official default settings" of AdamW (lr
# 1e-3). Decay 5e-4, milestones 60/120/160 and factor 0.2 are those of the training code it builds on (weiaicunzai's
# pytorch-cifar100), which also flips and crops.
_AGR_CIFAR = {
    "optim": "agr_adamw",
    "learning_rate": 1e-3,
    "weight_decay": 5e-4,
    "num_train_epochs": 200,
    "per_device_train_batch_size": 64,
    "lr_milestones": [60, 120, 160],
    "lr_gamma": 0.2,
    "augmentation": "flip-crop",
    "max_grad_norm": 0.0,
}
# AGR paper, section 5.3: 300 epochs, 2 GPUs with 128 each, the models' official settings. Of these, decay 0.05, cosine
# schedule with 20 epochs of warmup and RandAugment are Swin's and ConvNeXt's; mixup and cutmix are left out.
_AGR_TINY_IMAGENET = {
    "dataset_name": "tiny-imagenet",
    "optim": "agr_adamw",
    "learning_rate": 1e-3,
    "weight_decay": 0.05,
    "num_train_epochs": 300,
    "per_device_train_batch_size": 128,
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
    "per_device_train_batch_size": 128,
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
        "per_device_train_batch_size": 128,
        "max_grad_norm": 0.0,
    },
}


def apply_recipe(
    parser: argparse.ArgumentParser, recipes: Mapping[str, Mapping[str, Any]], argv: Sequence[str] | None = None
) -> None:
    """Make the recipe named by `--recipe` the defaults of a parser; what the command line says wins.

    Raises:
        SystemExit: there is no such recipe; the message lists the names.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--recipe")
    name = peek.parse_known_args(sys.argv[1:] if argv is None else argv)[0].recipe
    if name is None:
        return
    if name not in recipes:
        parser.error(f"there is no recipe {name!r}; the names are {', '.join(recipes)}")
    # A value replaces the requirement to give one.
    for action in parser._actions:
        if action.dest in recipes[name]:
            action.required = False
    parser.set_defaults(**recipes[name])
