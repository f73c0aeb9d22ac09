"""Layers flattened into one tensor (FSDP1, DeepSpeed ZeRO): their own gradients are gone, and are refused."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def check_not_flat(name: str, param: Tensor) -> None:
    """Raise ValueError for a flat parameter of FSDP1."""
    if getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False):
        raise ValueError(
            f"{name} needs each layer's own gradient, but FSDP1 has flattened the layers of this model into one "
            f"parameter of {param.numel()} elements; use FSDP2 (torch.distributed.fsdp.fully_shard, or "
            "fsdp_version: 2 in the accelerate config), or FSDP1 with use_orig_params=True and ShardingStrategy."
            "NO_SHARD"
        )


def describe_params(group: dict[str, Any]) -> tuple[int, set[int]]:
    """How many matrices a group has, and the ids of its vectors (torch swaps no tensors that have weak references)."""
    params = group["params"]
    return sum(param.ndim > 1 for param in params), {id(param) for param in params if param.ndim < 2}


def check_not_flattened(name: str, groups: Sequence[dict[str, Any]], given: Sequence[tuple[int, set[int]]]) -> None:
    """Raise RuntimeError where DeepSpeed ZeRO has put one flat partition in the place of a group's parameters.

    Args:
        name: of the optimizer, for the message.
        groups: as they are.
        given: `describe_params` of each group as it was. Without DeepSpeed, it is the user who replaced the parameters.
    """
    if "deepspeed" not in sys.modules:
        return
    for group, (matrices, vectors) in zip(groups, given, strict=False):
        params = group["params"]
        if matrices and len(params) == 1 and params[0].ndim == 1 and id(params[0]) not in vectors:
            raise RuntimeError(
                f"{name} was given a group with {matrices} matrices and finds one flat tensor of {params[0].numel()} "
                "elements now: DeepSpeed ZeRO has flattened the layers, and each layer's own gradient is needed; use FSDP2 "
                "or DDP, or ZeRO stage 0"
            )
