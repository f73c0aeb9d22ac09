"""Layers flattened into one tensor (FSDP1, DeepSpeed ZeRO): their own gradients are gone, and are refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import ref

from torch import Tensor

# What DeepSpeed's ZeRO stages 1 and 2, and 3, leave on the parameters that it takes out of an optimizer's groups.
ZERO_MARKS = ("_hp_mapping", "ds_id")


def check_not_flat(name: str, param: Tensor) -> None:
    """Raise ValueError for a flat parameter of FSDP1."""
    if getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False):
        raise ValueError(
            f"{name} needs each layer's own gradient, but FSDP1 has flattened the layers of this model into one "
            f"parameter of {param.numel()} elements; use FSDP2 (torch.distributed.fsdp.fully_shard, or "
            "fsdp_version: 2 in the accelerate config), or FSDP1 with use_orig_params=True and ShardingStrategy."
            "NO_SHARD"
        )


def remember_params(group: dict[str, Any]) -> list[Any]:
    """Weak references to the parameters of a group as it was given."""
    return [ref(param) for param in group["params"]]


def check_not_flattened(name: str, groups: Sequence[dict[str, Any]], given: Sequence[list[Any]]) -> None:
    """Raise RuntimeError where DeepSpeed ZeRO has put one flat partition in the place of a group's parameters.

    Args:
        name: of the optimizer, for the message.
        groups: as they are.
        given: `remember_params` of each group as it was. Parameters that the user replaced are no reason to refuse.
    """
    for group, references in zip(groups, given, strict=False):
        params = group["params"]
        if len(params) != 1 or params[0].ndim != 1 or (references and params[0] is references[0]()):
            continue
        before = [reference() for reference in references]
        if any(hasattr(param, mark) for param in before for mark in ZERO_MARKS):
            raise RuntimeError(
                f"{name} was given {len(references)} parameters in a group and finds one flat tensor of "
                f"{params[0].numel()} elements now: DeepSpeed ZeRO has flattened the layers, and each layer's own gradient "
                "is needed; use FSDP2 or DDP, or ZeRO stage 0"
            )
