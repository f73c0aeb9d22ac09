"""The package at home in Trainer, Accelerate and timm. Each module loads its library when it is used."""

from __future__ import annotations


def register() -> None:
    """Make the optimizers known by name to transformers' Trainer and, where it is installed, to timm.

    Afterwards `TrainingArguments(optim="agr_adamw")`, `--optim agr_adamw` in any script with HfArgumentParser, and
    `timm.optim.create_optimizer_v2(model, "agradamw")` work; timm lists names without underscores, and this function takes
    both. Call it in every process that parses such names, or that unpickles a `training_args.bin` of such a run. May be
    called again: nothing is added twice.

    Trainer's clipping moves into the step of these optimizers, where it is the same there (docs/integrations.md).

    Raises:
        RuntimeError: this version of transformers or timm has no place for it; the message names the public route.
    """
    from importlib.util import find_spec

    from agr_hf.integrations import trainer

    trainer.register()
    if find_spec("timm") is not None:
        from agr_hf.integrations import timm

        timm.register()
