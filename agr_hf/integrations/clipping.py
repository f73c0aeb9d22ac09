"""Clipping inside the optimizer's step, for Trainer and Accelerate loops.

`clip_grad_norm_` reads every gradient once for the norm, and reads and writes it once more for the factor. The optimizers
of the package read them for their own sums anyway, and apply the factor where they read a gradient for its update.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor

from agr_hf.integrations import private
from agr_hf.optim.shards import is_dtensor
from agr_hf.optim.step import StepOptimizer

if TYPE_CHECKING:
    from accelerate import Accelerator

# In these, every process has the averaged gradients; FSDP2 has them as DTensors, whose norm the optimizer knows.
WHOLE_GRADIENTS = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def clip_in_step(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], max_norm: float
) -> Tensor | None:
    """Have the optimizer clip in its next step, where that is the same as clipping before it.

    Args:
        accelerator: the one that prepared `optimizer`.
        optimizer: prepared or not.
        parameters: what `accelerator.clip_grad_norm_` would be given.
        max_norm: > 0; math.inf measures only.

    Returns:
        The norm, NaN until the step; None where the gradients have to be clipped before the step, and nothing was done.
    """
    inner = optimizer
    while isinstance(inner, AcceleratedOptimizer):
        inner = inner.optimizer
    if not isinstance(inner, StepOptimizer) or not _clips_the_same(accelerator, inner, parameters):
        return None
    scaler = accelerator.scaler
    if scaler is not None and not private.knows_overflow(scaler):
        return None
    accelerator.unscale_gradients(optimizer)
    if scaler is not None and private.overflowed(scaler, inner):
        # The scaler will skip this step. A request would wait for the next one, whose gradients it does not mean.
        return torch.tensor(math.inf)
    return inner.clip_next_step(max_norm)


def _clips_the_same(accelerator: Accelerator, optimizer: StepOptimizer, parameters: Iterable[Tensor]) -> bool:
    """Whether the step sees the gradients that clipping before it would change. The same answer on all processes."""
    fsdp2 = accelerator.distributed_type == DistributedType.FSDP and accelerator.is_fsdp2
    if not fsdp2 and accelerator.distributed_type not in WHOLE_GRADIENTS:
        return False
    if private.has_step_pre_hooks(optimizer):
        return False  # they expect clipped gradients, and may change them: attach_agr does
    with_gradient = {id(param): param.grad for param in parameters if param.grad is not None}
    grouped = {id(param) for group in optimizer.param_groups for param in group["params"] if param.grad is not None}
    return with_gradient.keys() == grouped and all(map(_is_on_all_ranks, with_gradient.values()))


def _is_on_all_ranks(grad: Tensor) -> bool:
    """Whether each rank takes part in the gradient's norm. A smaller mesh may lack this rank, or another one."""
    return type(grad) is Tensor or not is_dtensor(grad) or grad.device_mesh.size() == torch.distributed.get_world_size()  # type: ignore[attr-defined]
