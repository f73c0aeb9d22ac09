"""The reduction of a step: every norm that rules and clipping ask for, sharded or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from agr_hf.optim.backends.multi_tensor import Scalar
from agr_hf.optim.norms import add_over_shards, by_device_and_dtype, is_dtensor, sums_of_pieces
from agr_hf.optim.work import Work, batches


def reduce_norms(
    works: Sequence[Work], groups: Sequence[dict[str, Any]], request: tuple[float, Tensor] | None = None
) -> dict[int, Scalar]:
    """Fill in `norm` and `square` of every tensor that needs them, and the tensor of a `request` of `clip_next_step`.

    Sums of magnitudes and of squares travel in one vector: one collective a mesh (see `add_over_shards`). Only L2 decay with
    clipping takes a second: its norm is of a gradient that the first has to clip.

    Returns:
        What the gradients of each group, by its id, are multiplied by: -1 to maximize, times the clipping factor.
    """
    clipped = request is not None or any(group["max_grad_norm"] is not None for group in groups)
    raw = [work for work in works if work.needs_norm and not work.coupled]
    summed = works if clipped else raw
    if clipped and any(is_dtensor(work.whole) and work.whole.device_mesh.get_coordinate() is None for work in works):  # type: ignore[attr-defined]
        raise RuntimeError(
            "max_grad_norm needs every gradient's norm on every rank, but some parameters live on a mesh that this rank is "
            "not part of; clip outside of the optimizer, and leave max_grad_norm=None"
        )
    if summed:
        rows = [_local_sums(summed, 1), _local_sums(summed, 2)] if clipped else [_local_sums(summed, 1)]
        rows = add_over_shards(rows, [work.whole for work in summed])
        for i, work in enumerate(summed):
            work.norm, work.square = rows[0][i], rows[-1][i]
    total = _total_norm(works) if clipped else None
    if request is not None and total is not None:
        request[1].copy_(total)
    limit = math.inf if request is None else request[0]
    scales = {id(group): _scale(group, works, total, limit) for group in groups}
    for work in raw:
        scale = scales[id(work.group)]
        if isinstance(scale, Tensor):
            work.norm = work.norm * scale.abs()
        elif abs(scale) != 1.0:
            work.norm = work.norm * abs(scale)
    _reduce_coupled([work for work in works if work.needs_norm and work.coupled], groups, scales)
    _guard([work for work in works if work.psi])
    return scales


def _local_sums(works: Sequence[Work], power: int) -> list[Tensor]:
    sums = [work.norm for work in works]
    for indices in by_device_and_dtype([work.grad for work in works]):
        for i, total in zip(indices, sums_of_pieces([works[i].grad for i in indices], power), strict=True):
            sums[i] = total
    return sums


def _reduce_coupled(works: Sequence[Work], groups: Sequence[dict[str, Any]], scales: dict[int, Scalar]) -> None:
    """The norm of scale * grad + weight_decay * param, summed over the same batches that the pass will see."""
    if not works:
        return
    for work in works:
        work.norm = torch.zeros((), dtype=work.dtype, device=work.grad.device)
    for group in groups:
        for batch, _ in batches([work for work in works if work.group is group], scales[id(group)]):
            for work, total in zip(batch.works, sums_of_pieces(batch.grads, 1), strict=True):
                work.norm += total
    (norms,) = add_over_shards([[work.norm for work in works]], [work.whole for work in works])
    for work, norm in zip(works, norms, strict=True):
        work.norm = norm


def _total_norm(works: Sequence[Work]) -> Tensor:
    """The l2 norm of all gradients of the optimizer."""
    device = works[0].grad.device
    return torch.stack([work.square.to(device) for work in works]).sum().sqrt()


def _scale(group: dict[str, Any], works: Sequence[Work], total: Tensor | None, limit: float) -> Scalar:
    """The factor of `torch.nn.utils.clip_grad_norm_` over all gradients of the optimizer, with the sign of the step."""
    sign = -1.0 if group["maximize"] else 1.0
    if group["max_grad_norm"] is not None:
        limit = min(limit, group["max_grad_norm"])
    if total is None or math.isinf(limit):
        return sign
    # clamp, not min: like torch's, a NaN norm makes every gradient NaN.
    factor = (limit / (total + 1e-6)).clamp(max=1.0)
    return sign * (factor.item() if all(work.on_host for work in works) else factor)


def _guard(works: Sequence[Work]) -> None:
    """Psi(g) = g where the norm is zero, infinite or NaN: on the host by not asking, on a device by dividing by inf."""
    on_device = [work for work in works if not work.on_host]
    for work in works:
        if work.on_host:
            work.psi = 0.0 < work.norm.item() < float("inf")
    for indices in by_device_and_dtype([work.norm for work in on_device]):
        stacked = torch.stack([on_device[i].norm for i in indices])
        usable = (stacked > 0) & (stacked < float("inf"))
        for i, norm in zip(indices, torch.where(usable, stacked, float("inf")).unbind(), strict=True):
            on_device[i].norm = norm
