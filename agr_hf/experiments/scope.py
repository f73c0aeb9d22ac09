"""An experiment: Psi over a part of a tensor instead of the whole. Measured by `agr-hf claim run scope`.

AGR's share |g| / sum|g| is about one over the number of elements, so it hardly changes a large tensor. Over an output
channel or a block the sums are smaller and the shares larger. This is no option of the optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from agr_hf.optim.flags import agr_flags


class ScopedAGRAdamW(torch.optim.Optimizer):
    """AdamW(AGR), with Psi over rows or blocks: the first moment of Psi(g), the second of g.

    Args:
        params, lr, betas, eps, weight_decay: those of `AGRAdamW`.
        scope: "channel", the elements that share the first index, or a number of elements in their order of memory (what is
            left over at the end is a block too).
        agr: whether Psi is applied in a group; tensors of one dimension are left alone.

    Raises:
        ValueError: `scope` is neither.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        scope: str = "channel",
        agr: bool = True,
    ) -> None:
        if scope != "channel" and not (scope.isdecimal() and int(scope) > 0):
            raise ValueError(f'scope={scope!r} is not allowed; it must be "channel" or a number of elements >= 1')
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "scope": scope, "agr": agr}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param, flag in zip(group["params"], agr_flags(group), strict=True):
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param))
                state["step"] += 1
                grad = param.grad
                used = scoped_psi(grad, group["scope"]) if flag and grad.ndim >= 2 else grad
                state["exp_avg"].lerp_(used, 1 - beta1)
                state["exp_avg_sq"].lerp_(grad.square(), 1 - beta2)
                param.mul_(1 - group["lr"] * group["weight_decay"])
                root = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
                param.addcdiv_(state["exp_avg"], root, value=-group["lr"] / (1 - beta1 ** state["step"]))
        return loss


def scoped_psi(grad: Tensor, scope: str) -> Tensor:
    """Psi of each part of a gradient of two dimensions or more; of its shape."""
    rows = grad.flatten(1) if scope == "channel" else None
    if rows is None:
        flat, block = grad.flatten(), int(scope)
        padded = torch.nn.functional.pad(flat, (0, -len(flat) % block))
        rows = padded.view(-1, block)
    sums = rows.abs().sum(1, keepdim=True)
    # A part that is zero, or has one element that is not, passes as it is: as a tensor does.
    alone = (rows != 0).sum(1, keepdim=True) <= 1
    found = torch.where(alone, rows, rows - rows * rows.abs() / sums.clamp(min=torch.finfo(rows.dtype).tiny))
    return found.flatten()[: grad.numel()].view_as(grad)
