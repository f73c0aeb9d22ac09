"""Adan (arXiv 2208.06677), and Adan with adaptive gradient regularization (arXiv 2407.16944, algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from agr_hf.optim.backends import multi_tensor as mt
from agr_hf.optim.backends.lists import Batch, Item
from agr_hf.optim.options import AdanOptions, AGRAdanOptions
from agr_hf.optim.psi import psi, shrink_all
from agr_hf.optim.step import StepOptimizer


class _Adan(StepOptimizer):
    # The previous gradient is kept with its sign changed, as timm does: adding to it gives the difference in place.
    state_keys = ("exp_avg", "exp_avg_sq", "exp_avg_diff", "neg_pre_grad")
    betas_count = 3
    native_rule = "adan"

    def l2_decay(self, group: Mapping[str, Any]) -> bool:
        return False

    def adan_(self, batch: Batch, grads: list[Tensor], momentum_grads: list[Tensor], diffs: list[Tensor]) -> None:
        """Adan's update in timm's order of operations; `neg_pre_grad` becomes -grads.

        m = b1 m + (1 - b1) momentum_grad;  v = b2 v + (1 - b2) diff;  n = b3 n + (1 - b3) (g + b2 (g - g_prev))^2
        p -= lr (m/(1 - b1^t) + b2 v/(1 - b2^t)) / (sqrt(n)/sqrt(1 - b3^t) + eps), and weight decay
        """
        group, state = batch.group, batch.state
        beta1, beta2, beta3 = group["betas"]
        lr, decay = batch.lr, group["weight_decay"]
        mt.lerp_(state["exp_avg"], momentum_grads, 1 - beta1)
        mt.mul_(state["exp_avg_diff"], beta2)
        mt.add_(state["exp_avg_diff"], diffs, alpha=1 - beta2)
        nesterov_grads = state["neg_pre_grad"]  # holds g - g_prev here; its memory is free until the end
        mt.mul_(nesterov_grads, beta2)
        mt.add_(nesterov_grads, grads)
        mt.mul_(state["exp_avg_sq"], beta3)
        mt.addcmul_(state["exp_avg_sq"], nesterov_grads, nesterov_grads, value=1 - beta3)
        denominators = mt.sqrt(state["exp_avg_sq"])
        mt.div_(denominators, [(1 - beta3**step) ** 0.5 for step in batch.steps])
        mt.add_(denominators, group["eps"])
        if decay and not group["proximal"]:
            mt.mul_(batch.params, 1 - lr * decay)
        step_sizes = [-(lr / (1 - beta1**step)) for step in batch.steps]
        diff_step_sizes = [-(lr * beta2 / (1 - beta2**step)) for step in batch.steps]
        mt.add_scaled_quotient_(batch.params, state["exp_avg"], denominators, step_sizes)
        mt.add_scaled_quotient_(batch.params, state["exp_avg_diff"], denominators, diff_step_sizes)
        if decay and group["proximal"]:
            mt.div_(batch.params, 1 + lr * decay)
        mt.zero_(state["neg_pre_grad"])
        mt.add_(state["neg_pre_grad"], grads, alpha=-1.0)

    @staticmethod
    def difference_(batch: Batch, grads: list[Tensor]) -> list[Tensor]:
        """g - g_prev in the memory of `neg_pre_grad`; 0 in the first step."""
        if not batch.is_first:
            mt.add_(batch.state["neg_pre_grad"], grads)
        return batch.state["neg_pre_grad"]


class Adan(_Adan):
    """Adaptive Nesterov momentum (arXiv 2208.06677), as its published code computes it; no restarts.

    Args:
        params: parameters, or groups.
        lr: learning rate, a number or a tensor with one element. Default 1e-3.
        betas: decay rates of the gradient, of its difference and of the second moment, those of the published code
            (1 - the paper's). Default (0.98, 0.92, 0.99).
        eps: added to the root of the second moment. Default 1e-8.
        weight_decay: decay outside the gradient. Default 0.
        **options: `proximal`: decay as `p /= 1 + lr * weight_decay` after the update, False as `p *= 1 - lr * weight_decay`
            before it, default True. `max_grad_norm`, `foreach`, `fused`, `maximize`, `rounding`,
            `rounding_seed`, `state_dtype` and `capturable` as `AGRAdamW`.

    Raises:
        TypeError, ValueError: as `AGRAdamW`.
    """

    option_types = AdanOptions

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Unpack[AdanOptions],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **options)

    def update(self, batch: Batch) -> None:
        self.adan_(batch, batch.grads, batch.grads, self.difference_(batch, batch.grads))


class AGRAdan(_Adan):
    """Adan with adaptive gradient regularization (arXiv 2407.16944, algorithm 1).

    With `second_moment="raw"` the momentum takes Psi(g_t), the difference momentum Psi(g_t) - Psi(g_{t-1}), and the
    second moment the raw `g_t + b2 (g_t - g_{t-1})`, squared: our reading of "we only apply the AGR to the gradients
    and the first-order momentum instead of the second-order momentum" (the listing itself is a
    picture). With "regularized", Psi(g) takes the place of g everywhere, as the authors' code does.

    Args:
        params, lr, betas, eps, weight_decay: as `Adan`.
        **options: `proximal` as `Adan`; the others as `AGRAdamW`.

    Raises:
        TypeError, ValueError: as `AGRAdamW`.
    """

    # The l1 norm that the previous gradient was regularized with, infinite where it was not: what turns the raw
    # previous gradient into Psi of it without keeping both.
    scalar_state = {"pre_l1_norm": float("inf")}
    option_types = AGRAdanOptions

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Unpack[AGRAdanOptions],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **options)

    def update(self, batch: Batch) -> None:
        if batch.group["second_moment"] == "regularized":
            grads = psi(batch)
            self.adan_(batch, grads, grads, self.difference_(batch, grads))
            return
        if not batch.needs_norm:  # AGR does not apply, or no longer: Adan as it is
            self.adan_(batch, batch.grads, batch.grads, self.difference_(batch, batch.grads))
            return
        regularized = psi(batch)
        if batch.is_first:
            diffs = batch.state["neg_pre_grad"]  # zero
        else:
            norms, last = batch.read_scalars("pre_l1_norm"), batch.group["agr_steps"]
            if last is not None and not batch.on_host:  # a recorded step, which ends AGR by itself
                norms = [
                    torch.where(step <= last, norm, math.inf) for step, norm in zip(batch.steps, norms, strict=True)
                ]
            # Psi is odd, so Psi(-g_prev) = -Psi(g_prev).
            diffs = list(mt.add(regularized, shrink_all(batch.state["neg_pre_grad"], norms)))
        self.difference_(batch, batch.grads)
        self.adan_(batch, batch.grads, regularized, diffs)

    def finish(self, items: list[Item]) -> None:
        for item in items:
            norm = item.norm if item.psi and item.group["second_moment"] == "raw" else None
            item.scalars["pre_l1_norm"].fill_(float("inf") if norm is None else norm)
