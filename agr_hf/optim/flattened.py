"""Layers flattened into one tensor (FSDP1, DeepSpeed ZeRO): their own gradients are gone, and are refused."""

from __future__ import annotations

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


def check_not_flattened(name: str, groups: Sequence[dict[str, Any]], made_with: Sequence[tuple[int, set[int]]]) -> None:
    """Raise RuntimeError where DeepSpeed ZeRO swapped a group's parameters for one flat partition, after `name` was made.

    Args:
        name: of the optimizer, for the message.
        groups: as they are.
        made_with: `shape_of` each group as it was.
    """
    if len(groups) != len(made_with):
        return  # the user edited the groups
    for group, (matrices, vectors) in zip(groups, made_with, strict=True):
        params = group["params"]
        if matrices and len(params) == 1 and params[0].ndim == 1 and id(params[0]) not in vectors:
            raise RuntimeError(
                f"{name} was made for a group with {matrices} matrices and finds one flat tensor of {params[0].numel()} "
                "elements now: the layers were flattened (DeepSpeed ZeRO does so), and each layer's own gradient is needed; "
                "use FSDP2 or DDP, or ZeRO stage 0"
            )


def shape_of(group: dict[str, Any]) -> tuple[int, set[int]]:
    """How many matrices a group has, and which vectors."""
    params = group["params"]
    return sum(param.ndim > 1 for param in params), {id(param) for param in params if param.ndim < 2}
