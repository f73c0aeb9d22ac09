"""AdaL (arXiv 2107.01525): Adam on gradients multiplied by their layer's l1 norm."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from agr_hf.optim.agr_adam import adam_
from agr_hf.optim.backends import multi_tensor as mt
from agr_hf.optim.backends.lists import Batch
from agr_hf.optim.options import AdaLOptions
from agr_hf.optim.plan import Plan
from agr_hf.optim.shards import local
from agr_hf.optim.step import StepOptimizer

# The second moment keeps (norm * gradient)^2 in float32.
LARGEST_SCALED = torch.finfo(torch.float32).max ** 0.5


class AdaL(StepOptimizer):
    """Adam on l1-scaled gradients (arXiv 2107.01525, algorithm 1).

    `g^ = ||g||_1 g` for each tensor, biases too ("parameters in one layer share the same coefficient"), then Adam with
    bias correction. The step is `m^ / (sqrt(v^) + eps)`: the printed `v^-1/2 + eps` is infinite at v = 0. g^ is of
    degree 2 in the gradient, so loss scales must be taken out first (torch's GradScaler does). The moments are of another
    scale than Adam's and have keys of their own, `scaled_exp_avg` and `scaled_exp_avg_sq`: neither takes the other's state.

    Range: `(||g||_1 |g|)^2` must fit float32, so `||g||_1 |g|` may be 1.8e19 at most (20 elements of 9e8, a million of 4e6).
    Beyond it steps shrink to nothing or become NaN; a warning says so once, where the host knows the norms (not on a GPU).
    Where it falls below eps, 1e-8, steps shrink too.

    Args:
        params: parameters, or groups.
        lr: learning rate, a number or a tensor with one element. Default 1e-3. The paper's theory has lr / sqrt(t): use
            a scheduler for that.
        betas: decay rates of the two moments. Default (0.9, 0.999).
        eps: added to the root of the second moment. Default 1e-8.
        weight_decay: L2 penalty, part of the gradient before its norm is taken. Default 0.
        **options: `decoupled`: decay as AdamW does instead, default False. `max_grad_norm` (of the raw gradients),
            `foreach`, `fused`, `maximize`, `rounding`, `rounding_seed`, `state_dtype` and
            `capturable` as `AGRAdamW`.

    Raises:
        TypeError, ValueError: as `AGRAdamW`.
    """

    option_types = AdaLOptions
    state_keys = ("scaled_exp_avg", "scaled_exp_avg_sq")
    uses_norms = True
    _has_warned = False
    native_rule = "adam"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Unpack[AdaLOptions],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **options)

    def l2_decay(self, group: Mapping[str, Any]) -> bool:
        return not group["decoupled"]

    def update(self, batch: Batch) -> None:
        decay = 0.0 if self.l2_decay(batch.group) else batch.group["weight_decay"]
        scaled = list(mt.mul(batch.grads, batch.norms))
        adam_(batch, scaled, scaled, decay)

    def after_step(self, plan: Plan) -> None:
        """Warn once where a scaled gradient leaves the range of the second moment."""
        if self._has_warned:
            return
        for part in plan.parts:
            host = [0.0 if isinstance(norm, Tensor) else norm for norm in part.norms]
            if max(host, default=0.0) ** 2 <= LARGEST_SCALED:  # no element is larger than its norm
                continue
            for row, norm in zip(part.rows, host, strict=True):
                grad, scale = plan.params[row.index].grad, abs(float(part.scales[row.group_index]))
                is_wide = plan.params[row.index].dtype == torch.float64  # and so is its second moment
                if grad is None or is_wide or not LARGEST_SCALED < norm * norm < float("inf"):
                    continue
                scaled = norm * (1.0 if row.adds_decay else scale) * scale * float(local(grad).abs().max())
                if scaled > LARGEST_SCALED:
                    self._has_warned = True
                    warnings.warn(
                        f"AdaL: a gradient of shape {tuple(grad.shape)} has the l1 norm {norm:.3g}, and norm times gradient "
                        f"leaves the range of the second moment ({LARGEST_SCALED:.2g}): steps shrink to nothing or become "
                        "NaN; unscale the gradients of a scaled loss first, or divide the loss",
                        stacklevel=4,
                    )
                    return
