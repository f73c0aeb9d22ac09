"""Data that are drawn anew in every epoch, and the same in a run that was stopped and resumed."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from agr_hf.integrations import private
from agr_hf.integrations.random_states import kept_random_states, mixed_seed, seed_generators


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


class SeededDraws(EpochOf):
    """Lets what the transforms of a data set and the collator draw depend on the seed, the epoch and the batch alone.

    Trainer does not load the batches that a resumed run skips, and loads the next ones before it restores the random
    states: without this they would be masked, cropped or ordered otherwise than in a run never stopped. The generators
    of Python, numpy and torch are seeded for each batch, in the process that loads it, and left as they were. Generators
    that a collator or data set makes for itself are not reached.

    Args:
        seed: >= 0.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(EpochData())
        self.seed = seed
        self._generators: list[torch.Generator] = []

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_epoch_begin(args, state, control, **kwargs)
        for generator in self._generators:
            generator.manual_seed(mixed_seed(self.seed, self.data.epoch))

    def seed_loader(self, loader: Any) -> bool:
        """Seed the batches of a loader, prepared by accelerate or not; False where its batches cannot be identified."""
        base = getattr(loader, "base_dataloader", loader)
        if not isinstance(base, DataLoader) or isinstance(base.dataset, IterableDataset) or base.batch_sampler is None:
            return False
        data = _SeededBatches(base.dataset, base.collate_fn, self)
        private.set_loader_dataset(base, data)
        base.collate_fn = data.collate
        # One without a generator, such as transformers' LengthGroupedSampler, draws the order from the training's.
        batches = getattr(base.batch_sampler, "batch_sampler", base.batch_sampler)  # of one process, of all
        sampler = getattr(batches, "sampler", None)
        if sampler is not None and getattr(sampler, "generator", self) is None:
            sampler.generator = self._new_generator()
        if base.persistent_workers:
            # Else the training's: once in a run, and in a resumed one once more for the loader of its first epoch.
            base.generator = self._new_generator()
        return True

    def _new_generator(self) -> torch.Generator:
        self._generators.append(torch.Generator())
        return self._generators[-1]


@dataclass
class _Batch:
    """What `_SeededBatches.__getitems__` returns to the loader: collated."""

    value: Any


class _SeededBatches(Dataset[Any]):
    def __init__(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any], draws: SeededDraws) -> None:
        self.dataset, self._collate, self._seed, self._epochs = dataset, collate, draws.seed, draws.data

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: Sequence[Any]) -> _Batch:
        # Indices may be anything that a sampler yields.
        seed = mixed_seed(self._seed, self._epochs.epoch, zlib.crc32(repr(list(indices)).encode()))
        with kept_random_states():
            seed_generators(seed)
            fetch = getattr(self.dataset, "__getitems__", None)  # as torch's loader asks for a batch
            return _Batch(self._collate(fetch(indices) if fetch else [self.dataset[index] for index in indices]))

    def collate(self, rows: Any) -> Any:
        return rows.value if isinstance(rows, _Batch) else self._collate(rows)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" or name.startswith("__"):  # before it is there, as when it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)
