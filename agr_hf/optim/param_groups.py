"""Which layers get AGR, and which weights decay."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

# "We applied the AGR method to the fully connected layers and convolutional layers" (arXiv 2407.16944, section 5.1).
REGULARIZED_LAYERS = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.MultiheadAttention,  # its projections are fully connected layers kept as bare parameters
)


def agr_param_groups(model: nn.Module, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """Parameter groups by layer type: the weights of Linear, Conv and transformers' Conv1D layers get `agr=True`.

    Biases, norms, embeddings and bare parameters (position embeddings, class tokens, layer scales) get `agr=False`.
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
        ValueError: the model has no floating-point parameters, or `weight_decay` is negative.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay={weight_decay!r} is not allowed; it must be a number >= 0")
    regularized: set[Tensor] = set()
    embeddings: set[Tensor] = set()
    undecayed: set[Tensor] = set()
    for module in model.modules():
        norm = "norm" in type(module).__name__.lower()
        for name, param in module.named_parameters(recurse=False):
            if param.ndim < 2 or norm or name.endswith("bias"):
                undecayed.add(param)
            elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                embeddings.add(param)
            elif isinstance(module, REGULARIZED_LAYERS) or _is_transformers_conv1d(module):
                regularized.add(param)
    regularized -= embeddings
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


def _is_transformers_conv1d(module: nn.Module) -> bool:
    # By name: GPT-2's Linear must not make `import agr_hf` import transformers.
    return any(cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.") for cls in type(module).__mro__)
