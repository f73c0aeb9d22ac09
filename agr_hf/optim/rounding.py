"""How what is computed in float32 is kept in bfloat16: to nearest, at random without bias, or with the rest beside it.

bfloat16 has 8 significant bits. Rounded to nearest, an update of less than 1/512 of a weight is lost, and so is most of a
training run at a small learning rate, AGR's effect first. Stochastic rounding keeps it in the mean; Kahan's compensation
(arXiv 2010.06192) in 8 more bits, so that only updates of less than 1/131,072 of a weight are lost.

The random bits are a function of a seed, the tensor, the step and the element, and of nothing else: a run that is resumed
draws the same, on any backend, and a shard of the rows of a tensor draws what the whole tensor draws.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from agr_hf.optim.shards import place_of_shard

if TYPE_CHECKING:
    from agr_hf.optim.part import Row

COMPENSATION = "kahan_comp"  # what rounding took from a parameter; the state key of torch-optimi, too
_MASK = 0xFFFFFFFF


def mix(x: Any) -> Any:
    """A hash of whole numbers below 2^32, or of an int64 tensor of them; its constants are from Wellons's hash prospector
    (bias 0.17 of a bit). native.c has it too."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


class RandomBits:
    """Of the tensors of some rows: where each begins in the sequence of random numbers that its step draws."""

    def __init__(self, rows: list[Row], params: list[Tensor], device: torch.device, first_index: int) -> None:
        prefixes, offsets = [], []
        for row, param in zip(rows, params, strict=True):
            offset, place = place_of_shard(param)
            prefixes.append(mix(mix(mix(row.group["rounding_seed"] & _MASK) ^ (first_index + row.index)) ^ place))
            offsets.append(offset & _MASK)
        self.prefixes = torch.tensor(prefixes, dtype=torch.int64, device="cpu").to(device)
        self.offsets = torch.tensor(offsets, dtype=torch.int64, device="cpu").to(device)

    def first(self, steps: Tensor) -> Tensor:
        """The number of the first element of each row, int64, after so many steps."""
        return (mix(self.prefixes ^ steps.to(torch.int64)) + self.offsets) & _MASK


def draw(first: int | Tensor, count: int, device: torch.device) -> Tensor:
    """32 random bits for each of `count` elements from number `first` on, as int64."""
    return mix((torch.arange(count, dtype=torch.int64, device=device) + first) & _MASK)


def round_at_random(wide: Tensor, bits: Tensor) -> Tensor:
    """float32 to bfloat16: up with the probability of the distance from below, by 16 random bits an element."""
    rounded = ((wide.view(torch.int32) + bits.to(torch.int32)) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(wide.isnan(), wide.to(torch.bfloat16), rounded)
