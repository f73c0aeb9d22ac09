"""Which layers get AGR, and which weights decay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from agr_hf.optim.options import is_at_least_zero

# "We applied the AGR method to the fully connected layers and convolutional layers" (arXiv 2407.16944, section 5.1).
REGULARIZED_LAYERS = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.MultiheadAttention,  # its projections are fully connected layers kept as bare parameters
)

# Lengths of rows that weight normalization keeps beside their directions, the old way and the new.
MAGNITUDES = ("weight_g", "weight.original0")


def agr_param_groups(model: nn.Module, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """Parameter groups by layer type: the weights of Linear, Conv and transformers' Conv1D layers get `agr=True`.

    Biases, norms, embeddings and bare parameters (position embeddings, class tokens, layer scales, and the experts and
    routers that transformers keeps so in its mixtures of experts) get `agr=False`.
    Biases, norms and every tensor of fewer than two dimensions do not decay. A weight that an embedding shares with a
    Linear layer (tied input and output embeddings) counts as an embedding. Frozen parameters are included, so that they
    train when they are unfrozen later; non-floating (quantized) ones are not.

    Args:
        model: any module; also one wrapped by DDP or FSDP2.
        weight_decay: of the tensors that decay. Default 0.01.

    Returns:
        Up to three groups with the keys `params`, `agr` and `weight_decay`, in the order: regularized weights, other
        decaying tensors, tensors that do not decay. Each parameter is in exactly one, in the model's order.

    Raises:
        TypeError: `model` is no module.
        ValueError: the model has no floating-point parameters, some are lazy, or `weight_decay` is negative.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"agr_param_groups takes a model, whose layers say where AGR applies, but {type(model).__name__} was given"
        )
    if not is_at_least_zero(weight_decay):
        raise ValueError(f"weight_decay={weight_decay!r} is not allowed; it must be a number >= 0")
    regularized, undecayed = by_layer_type(model)
    params = [param for param in model.parameters() if param.is_floating_point()]
    if not params:
        raise ValueError(f"{type(model).__name__} has no floating-point parameters to optimize")
    groups = [
        {"params": [p for p in params if p in regularized], "agr": True, "weight_decay": weight_decay},
        {
            "params": [p for p in params if p not in regularized and p not in undecayed],
            "agr": False,
            "weight_decay": weight_decay,
        },
        {"params": [p for p in params if p in undecayed], "agr": False, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def set_agr_flags(groups: Iterable[dict[str, Any]], model: nn.Module) -> None:
    """Give groups that somebody else made (Trainer, timm) the `agr` that `agr_param_groups` would.

    Each group's `agr` becomes True or False where all of its parameters agree, else a list with one for each. Groups
    keep their number, order and parameters, so states saved for the same groups still fit.
    """
    regularized, _ = by_layer_type(model)
    for group in groups:
        flags = [param in regularized for param in group["params"]]
        group["agr"] = any(flags) if len(set(flags)) < 2 else flags


def by_layer_type(model: nn.Module) -> tuple[set[Tensor], set[Tensor]]:
    """Parameters that AGR applies to, and parameters that do not decay."""
    regularized: set[Tensor] = set()
    embeddings: set[Tensor] = set()
    undecayed: set[Tensor] = set()
    for module in model.modules():
        full = isinstance(module, REGULARIZED_LAYERS) or _is_transformers_conv1d(module)
        norm = "norm" in type(module).__name__.lower() and not full  # a NormalizedLinear is a Linear
        for name, param in _own_parameters(module):
            if nn.parameter.is_lazy(param):
                raise ValueError(
                    f"{name} of a {type(module).__name__} has no shape yet, and shapes say which weights decay; run the "
                    "model on one batch before its parameters are grouped"
                )
            if param.ndim < 2 or norm or "bias" in name or name in MAGNITUDES:
                undecayed.add(param)
            elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                embeddings.add(param)
            elif full:
                regularized.add(param)
    return regularized - embeddings, undecayed


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's parameters, those behind a parametrization (weight_norm, spectral_norm) as if they were its own."""
    yield from module.named_parameters(recurse=False)
    for tensor_name, parametrization in getattr(module, "parametrizations", {}).items():
        for name, param in parametrization.named_parameters(recurse=False):
            yield f"{tensor_name}.{name}", param


def _is_transformers_conv1d(module: nn.Module) -> bool:
    # By name: GPT-2's Linear must not make `import agr_hf` import transformers.
    return any(cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.") for cls in type(module).__mro__)
