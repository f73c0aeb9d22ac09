"""Data that are drawn anew in every epoch, and the same in a run that was stopped and resumed."""

from __future__ import annotations

from typing import Any, Protocol

import numpy
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EpochData(Protocol):
    """Training data that differ from epoch to epoch."""

    def set_epoch(self, epoch: int) -> None: ...


class EpochOf(TrainerCallback):
    """Tell the training data which epoch it is.

    accelerate does so only where the sampler takes no epoch itself; in runs of several processes it does, and every epoch
    would have the draws of the first (`DataLoaderShard.set_epoch`, accelerate 1.15). The epoch does not reach workers that
    outlive it (`dataloader_persistent_workers`).
    """

    def __init__(self, data: EpochData) -> None:
        self.data = data

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A run resumed in the middle of epoch 3 says 3.5; sums of fractions may say 2.9999999.
        self.data.set_epoch(int((state.epoch or 0) + 1e-6))


def mixed_seed(*numbers: int) -> int:
    """One seed of 32 bits from several numbers >= 0: torch's generator on the CPU looks at no more bits."""
    return int(numpy.random.SeedSequence(numbers).generate_state(1, numpy.uint32)[0])
