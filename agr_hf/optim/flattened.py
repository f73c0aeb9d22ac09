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
            "fsdp_version: 2 in the accelerate config, which `accelerate to-fsdp2 --config_file OLD --output_file NEW` "
            "writes), or FSDP1 with use_orig_params=True and ShardingStrategy.NO_SHARD"
        )


class GivenLayers:
    """The parameters of an optimizer's groups as they were given to it: DeepSpeed puts flat tensors in their place."""

    def __init__(self, groups: Sequence[dict[str, Any]] = ()) -> None:
        self.pairs = [(group, list(group["params"])) for group in groups]
        self.keep_options()

    def add(self, group: dict[str, Any]) -> None:
        self.pairs.append((group, list(group["params"])))
        self.keep_options()

    def keep_options(self) -> None:
        """Keep the options of each group that neither a schedule nor a count changes."""
        kept = ("weight_decay", "agr", "min_ndim", "betas", "eps")
        self.options = [{key: group[key] for key in kept if key in group} for group, _ in self.pairs]

    def pair(self, groups: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], list[Tensor]]]:
        """Each group and its layers. Loading replaces groups, which are known by their order then; DeepSpeed shows an
        optimizer one group at a time, which is known by itself."""
        if len(groups) == len(self.pairs):
            self.pairs = [(group, layers) for group, (_, layers) in zip(groups, self.pairs, strict=True)]
            return self.pairs
        known = {id(group): layers for group, layers in self.pairs}
        return [(group, known.get(id(group), group["params"])) for group in groups]


def layer_groups(optimizer: Any) -> list[dict[str, Any]]:
    """The groups of an optimizer, with the layers that it was given where DeepSpeed has put flat tensors in their place.

    Args:
        optimizer: any torch optimizer, also in the wrappers of accelerate and DeepSpeed.
    """
    inner = optimizer
    while getattr(inner, "optimizer", None) is not None:
        inner = inner.optimizer
    groups, given = list(inner.param_groups), getattr(inner, "_layers", None)
    if not is_deepspeed_here() or not isinstance(given, GivenLayers):
        return groups
    # Stages 1 and 2 leave one flat tensor in a group, stage 3 none between the steps.
    return [
        group if len(group["params"]) == len(layers) else {**group, "params": layers}
        for group, layers in given.pair(groups)
    ]


def is_deepspeed_here() -> bool:
    return "deepspeed" in sys.modules


def check_not_flattened(name: str, pairs: Sequence[tuple[dict[str, Any], Sequence[Tensor]]]) -> None:
    """Raise RuntimeError where DeepSpeed has put one flat tensor in the place of a group's parameters.

    Args:
        name: of the optimizer, for the message.
        pairs: groups and the layers that they were given.
    """
    for group, layers in pairs:
        params = group["params"]
        matrices = sum(layer.ndim > 1 for layer in layers)
        if matrices and len(params) == 1 and params[0].ndim == 1 and all(params[0] is not layer for layer in layers):
            raise RuntimeError(
                f"{name} was given a group with {matrices} matrices and finds one flat tensor of {params[0].numel()} "
                "elements now: DeepSpeed has flattened the layers, and each layer's own gradient is needed; take an "
                "optimizer of agr_hf under ZeRO stage 1, 2 or 3, or FSDP2, DDP or ZeRO stage 0"
            )
