"""Psi, adaptive gradient regularization (arXiv 2407.16944, eq. 1 and 2): of a tensor, and of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from agr_hf.optim.backends import multi_tensor as mt
from agr_hf.optim.norms import l1_norms
from agr_hf.optim.shards import Scalar, as_dtensor, is_dtensor, local, reduced

if TYPE_CHECKING:
    from agr_hf.optim.backends.lists import Batch


def agr(grad: Tensor) -> Tensor:
    """Psi(g) = g (1 - |g| / sum|g|), each element shrunk by its share of the tensor's l1 norm (eq. 1 and 2).

    Args:
        grad: a dense real tensor of any shape and dtype; a DTensor gives the same answer as the full tensor.

    Returns:
        A new tensor with the shape, dtype, device and sharding of `grad`, computed in at least float32. All-zero and
        one-element tensors, and those whose norm is infinite or NaN, come back unchanged. In bfloat16 the result equals
        `grad` for tensors over about 4,000 elements: their shares are below its precision.

    Raises:
        TypeError: `grad` is complex, sparse or not a tensor.
    """
    (norm,) = l1_norms([grad])
    grad = reduced(grad.detach())
    shrunk = shrink(local(grad), norm, grad.numel())
    return as_dtensor(shrunk, grad) if is_dtensor(grad) else shrunk


def shrink(grad: Tensor, norm: Tensor, numel: int) -> Tensor:
    """Psi of a local tensor whose whole has `numel` elements and this l1 norm (0-dim); nothing is read by the host."""
    if numel <= 1 or grad.numel() == 0:
        return grad.clone()
    usable = (norm > 0) & (norm < float("inf"))
    return shrink_all([grad.to(norm.dtype)], [torch.where(usable, norm, float("inf"))])[0].to(grad.dtype)


def psi(batch: Batch) -> list[Tensor]:
    """Psi of every gradient of a batch, or the gradients themselves where AGR does not apply."""
    if not batch.psi:
        return batch.grads
    if batch.on_host:  # where every norm is known to be usable
        shares = mt.abs(batch.grads)
        mt.div_(shares, batch.norms)
        return list(mt.addcmul(batch.grads, batch.grads, shares, value=-1))
    return shrink_all(batch.grads, batch.norms)


def shrink_all(grads: list[Tensor], norms: list[Scalar]) -> list[Tensor]:
    """Psi of each local tensor with the l1 norm of its whole, infinite where Psi does not apply.

    In this form such tensors pass through exactly, infinite elements included: g * (1 - max/inf) = g, where
    g - g * (inf/inf) would be NaN.
    """
    shares = mt.abs(grads)
    mt.clamp_max_(shares, torch.finfo(shares[0].dtype).max)
    mt.div_(shares, norms)
    mt.add_(shares, -1.0)
    mt.mul_(shares, grads)
    mt.neg_(shares)
    return list(shares)
