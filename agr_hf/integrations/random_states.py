"""Random numbers that are drawn apart from the training's."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy
import torch


@contextmanager
def kept_random_states(devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Leave the generators of Python, numpy and torch as they were, those of the accelerators among `devices` too.

    Of one kind of accelerator; Apple's, whose generator torch cannot fork, is left out.
    """
    accelerators = [device for device in devices if device.type not in ("cpu", "meta", "mps")]
    kind = accelerators[0].type if accelerators else "cuda"
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(accelerators, device_type=kind):
            yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)


def seed_generators(seed: int) -> None:
    """Seed the generators of Python, numpy and torch on the CPU; those of accelerators stay as they are."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def mixed_seed(*numbers: int) -> int:
    """One seed of 32 bits from several numbers >= 0: torch's generator on the CPU looks at no more bits."""
    return int(numpy.random.SeedSequence(numbers).generate_state(1, numpy.uint32)[0])
