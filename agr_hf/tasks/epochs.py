"""Data that are drawn anew in every epoch, and the same in a run that was stopped and resumed."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EpochData:
    """Training data that differ from epoch to epoch; a loader's workers see the epoch, also those that outlive one."""

    def __init__(self) -> None:
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Other draws from now on."""
        self._epoch.fill_(epoch)


class EpochOf(TrainerCallback):
    """Tell the training data which epoch it is.

    accelerate does so only where the sampler takes no epoch itself; in runs of several processes it does, and every epoch
    would have the draws of the first (`DataLoaderShard.set_epoch`, accelerate 1.15).
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
