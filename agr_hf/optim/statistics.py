"""What AGR does to a gradient, measured: numbers by layer, computed on the device and read once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from agr_hf.optim.flags import agr_flags
from agr_hf.optim.flattened import layer_groups
from agr_hf.optim.norms import BLOCK
from agr_hf.optim.param_groups import by_layer_type
from agr_hf.optim.shards import local, reduced, widest


@dataclass(frozen=True)
class GradientSummary:
    """Statistics of one gradient, or of several together.

    Attributes:
        effect: ||Psi(g) - g|| / ||g||, the share of the gradient that AGR takes away; 0 for a zero gradient.
        largest_share: the largest alpha = |g| / sum|g|.
        l1_norm: sum|g|.
        zeros: fraction of elements that are exactly zero.
        log_mean, log_std: mean and standard deviation of ln|g| over the elements that are not zero (the AGR paper takes
            gradients to be lognormal); NaN where all are zero.
    """

    effect: float
    largest_share: float
    l1_norm: float
    zeros: float
    log_mean: float
    log_std: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def agr_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """Names and gradients of the parameters that AGR applies to: marked in the groups, and of enough dimensions.

    In groups that do not know AGR, those of the layers to which `agr_param_groups` would apply it: this is how a run of
    AdamW shows what AGR would do.
    """
    regularized, _ = by_layer_type(model)
    wanted = set()
    for group in layer_groups(optimizer):
        knows = "agr" in group or "agr_step" in group  # the latter alone where it is attached
        flags = agr_flags(group) if knows else [param in regularized for param in group["params"]]
        wanted |= {
            id(param)
            for param, flag in zip(group["params"], flags, strict=True)
            if flag and param.ndim >= group.get("min_ndim", 2)
        }
    return [(n, p.grad) for n, p in model.named_parameters() if id(p) in wanted and p.grad is not None]


@torch.no_grad()
def gradient_statistics(named_grads: Iterable[tuple[str, Tensor]]) -> dict[str, GradientSummary]:
    """Statistics of each gradient by name, and of all together under "overall".

    "overall" is of the gradients as AGR sees them, each with its own norm: its effect is the root of the summed squares
    of what Psi takes away, over that of the gradients; its largest share is the largest of any. Everything is summed on
    the gradients' devices, and read by the host once at the end.

    Args:
        named_grads: names and dense real tensors of any dtype; non-finite gradients give non-finite statistics.
            DTensors are gathered, one at a time.

    Returns:
        A dict in the given order with "overall" last; empty tensors are left out. Empty where there is no gradient.
    """
    names, sums = [], []
    for name, grad in named_grads:
        whole = reduced(grad.detach())
        whole = whole.full_tensor() if whole is not local(whole) else whole  # type: ignore[attr-defined]
        if whole.numel():
            names.append(name)
            sums.append(_sums(whole))
    if not sums:
        return {}
    device = sums[0].device
    rows = torch.stack([row.to(device) for row in sums]).tolist()
    statistics = {name: _statistics([row]) for name, row in zip(names, rows, strict=True)}
    statistics["overall"] = _statistics(rows)
    return statistics


def _sums(grad: Tensor) -> Tensor:
    """numel, l1 norm, largest magnitude, ||Psi(g) - g||^2, ||g||^2, number of nonzeros, sums of ln|g| and ln^2|g|.

    In float64 (see `widest`), summed over blocks that stay in the CPU's cache; on other devices one block is the whole.
    """
    numel = grad.numel()
    blocks = grad.flatten().split(BLOCK if grad.is_cpu else numel)
    dtype = torch.promote_types(grad.dtype, torch.float32)
    firsts = [(size.sum(), size.max()) for size in (block.abs().to(dtype) for block in blocks)]
    wide = widest(grad.device)
    l1 = torch.stack([total.to(wide) for total, _ in firsts]).sum()
    largest = torch.stack([most for _, most in firsts]).max().to(wide)
    # In units of the mean magnitude, so that fourth powers neither vanish nor overflow in float32, and logarithms lie
    # around zero, where the difference of their sums keeps its digits.
    mean = l1 / numel
    scale = torch.where(mean > 0, mean, 1.0)
    second, fourth, present, logs, log_squares = torch.stack(
        [_block_sums(block.to(dtype), scale) for block in blocks]
    ).sum(0)
    shift = scale.log()
    return torch.stack(
        [
            torch.full_like(l1, numel),
            l1,
            largest,
            # |Psi(g) - g| = |g|^2 / S = unit^2 mean / numel; one-element tensors pass through.
            fourth * (mean / numel).square() * (numel > 1),
            second * mean.square(),
            present,
            logs + present * shift,
            log_squares + 2 * shift * logs + present * shift.square(),
        ]
    )


def _block_sums(block: Tensor, scale: Tensor) -> Tensor:
    unit = block.abs().div_(scale.to(block.dtype))
    present = unit > 0
    logs = torch.where(present, unit, 1.0).log_()
    sums = [present.sum(), logs.sum(), logs.square_().sum()]
    squares = unit.square_()
    sums = [squares.sum(), squares.square().sum(), *sums]
    return torch.stack([total.to(widest(block.device)) for total in sums])


def _statistics(rows: list[list[float]]) -> GradientSummary:
    numel, l1, _, removed, square, present, logs, log_squares = (sum(column) for column in zip(*rows, strict=True))
    largest = max((row[2] / row[1] if row[1] else 0.0) for row in rows)
    mean = logs / present if present else float("nan")
    variance = max(log_squares / present - mean**2, 0.0) if present else float("nan")
    return GradientSummary(
        effect=(removed / square) ** 0.5 if square else 0.0,
        largest_share=largest,
        l1_norm=l1,
        zeros=1 - present / numel,
        log_mean=mean,
        log_std=variance**0.5,
    )
