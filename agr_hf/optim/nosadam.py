"""NosAdam (Huang, Wang and Dong, IJCAI 2019): Adam that weighs past gradients more; a baseline of the AdaL paper."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from agr_hf.optim.backends import multi_tensor as mt
from agr_hf.optim.step import StepOptimizer
from agr_hf.optim.work import Batch, Work


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
        gamma: exponent of the weights; 0 is the plain mean over all steps, larger looks further back. Default 0.1.
        max_grad_norm, foreach, fused, maximize, capturable: as `AGRAdamW`; there is no fused kernel.

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter is complex, quantized or a flattened shard.
    """

    scalar_state = {"weight_sum": 0.0}  # B_{t-1}
    required_state = ("weight_sum",)  # Adam's second moment is no such mean

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        gamma: float = 0.1,
        max_grad_norm: float | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "gamma": gamma,
            "max_grad_norm": max_grad_norm,
            "foreach": foreach,
            "fused": fused,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def update(self, batch: Batch) -> None:
        beta1, _ = batch.group["betas"]
        lr = batch.lr
        means, squares = batch.state["exp_avg"], batch.state["exp_avg_sq"]
        mt.lerp_(means, batch.grads, 1 - beta1)
        news = [step ** -batch.group["gamma"] for step in batch.steps]
        olds = batch.scalars_of("weight_sum")
        mt.mul_(squares, [old / (old + new) for old, new in zip(olds, news, strict=True)])
        squared = mt.mul(batch.grads, batch.grads)
        mt.mul_(squared, [new / (old + new) for old, new in zip(olds, news, strict=True)])
        mt.add_(squares, squared)
        denominators = mt.sqrt(squares)
        mt.add_(denominators, batch.group["eps"])
        step_sizes = [-(lr / (1 - beta1**step)) for step in batch.steps]
        mt.add_scaled_quotient_(batch.params, means, denominators, step_sizes)

    def finish(self, works: list[Work]) -> None:
        for work in works:
            work.scalars["weight_sum"] += work.step ** -work.group["gamma"]
