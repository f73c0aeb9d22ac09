"""NosAdam (Huang, Wang and Dong, IJCAI 2019): Adam that weighs past gradients more; a baseline of the AdaL paper."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from agr_hf.optim.backends import multi_tensor as mt
from agr_hf.optim.backends.lists import Batch, Item
from agr_hf.optim.options import NosAdamOptions
from agr_hf.optim.step import StepOptimizer


class NosAdam(StepOptimizer):
    """Nostalgic Adam (Huang, Wang and Dong, IJCAI 2019) with its hyperharmonic weights.

    `B_t = sum_{k<=t} k^-gamma` and the second moment decays by `b2_t = B_{t-1}/B_t`. The first moment is
    bias-corrected; the second, a weighted mean from its first step, is not.

    Args:
        params: parameters, or groups.
        lr: learning rate, a number or a tensor with one element. Default 1e-3.
        betas: decay rate of the first moment; the second is unused, its decay follows gamma. Default (0.9, 0.999).
        eps: added to the root of the second moment. Default 1e-8.
        weight_decay: L2 penalty, part of the gradient. Default 0.
        **options: `gamma`: exponent of the weights, 0 is the plain mean over all steps, larger looks further back, default
            0.1. `max_grad_norm`, `foreach`, `fused` (there is no native step), `maximize`,
            `rounding`, `rounding_seed`, `state_dtype` and `capturable` as `AGRAdamW`.

    Raises:
        TypeError, ValueError: as `AGRAdamW`.
    """

    # The second moment is a weighted mean, no decaying one: under Adam's key, Adam would go on from it without a word.
    state_keys = ("exp_avg", "weighted_avg_sq")
    option_types = NosAdamOptions
    scalar_state = {"weight_sum": 0.0}  # B_{t-1}
    required_state = ("weight_sum",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Unpack[NosAdamOptions],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **options)

    def update(self, batch: Batch) -> None:
        beta1, _ = batch.group["betas"]
        lr = batch.lr
        means, squares = batch.state["exp_avg"], batch.state["weighted_avg_sq"]
        mt.lerp_(means, batch.grads, 1 - beta1)
        weights = [step ** -batch.group["gamma"] for step in batch.steps]
        weight_sums = batch.read_scalars("weight_sum")
        mt.mul_(squares, [total / (total + weight) for total, weight in zip(weight_sums, weights, strict=True)])
        squared = mt.mul(batch.grads, batch.grads)
        mt.mul_(squared, [weight / (total + weight) for total, weight in zip(weight_sums, weights, strict=True)])
        mt.add_(squares, squared)
        denominators = mt.sqrt(squares)
        mt.add_(denominators, batch.group["eps"])
        step_sizes = [-(lr / (1 - beta1**step)) for step in batch.steps]
        mt.add_scaled_quotient_(batch.params, means, denominators, step_sizes)

    def finish(self, items: list[Item]) -> None:
        for item in items:
            item.scalars["weight_sum"] += item.step ** -item.group["gamma"]
