"""ACProp (Zhuang et al. 2021): asynchronous update with a centred second moment; a baseline of the AGR paper."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from agr_hf.optim.backends import multi_tensor as mt
from agr_hf.optim.backends.lists import Batch
from agr_hf.optim.options import StepOptions
from agr_hf.optim.step import StepOptimizer


class ACProp(StepOptimizer):
    """Asynchronous-centering-Prop (Zhuang et al., NeurIPS 2021), as its CIFAR script runs it: no rectification.

    The denominator is that of the previous step: `p -= lr g_t / (sqrt(s_{t-1} + eps)/sqrt(1 - b2^(t-1)) + eps)`, then
    `s = b2 s + (1 - b2) (g_t - m_t)^2`. The published code adds eps into s itself, and so do we. The first step is
    `p -= lr g`. The centred second moment is kept as `exp_avg_var`: it is no `exp_avg_sq` of Adam's, whose state it
    must not be mistaken for.

    Args:
        params: parameters, or groups.
        lr: learning rate, a number or a tensor with one element. Default 1e-3.
        betas: decay rates of the mean that centres, and of the second moment. Default (0.9, 0.999).
        eps: added to the second moment, and to its root. Default 1e-8.
        weight_decay: L2 penalty, part of the gradient. Default 0 (the CIFAR script: 5e-4).
        **options: `max_grad_norm`, `foreach`, `fused` (there is no native step), `maximize`,
            `rounding`, `rounding_seed`, `state_dtype` and `capturable` as `AGRAdamW`.

    Raises:
        TypeError, ValueError: as `AGRAdamW`.
    """

    state_keys = ("exp_avg", "exp_avg_var")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **options)

    def update(self, batch: Batch) -> None:
        beta1, beta2 = batch.group["betas"]
        eps, lr = batch.group["eps"], batch.lr
        means, variances = batch.state["exp_avg"], batch.state["exp_avg_var"]
        if batch.is_first:
            if isinstance(lr, Tensor):
                mt.add_(batch.params, mt.mul(batch.grads, -lr))
            else:
                mt.add_(batch.params, batch.grads, alpha=-lr)
        else:
            mt.add_(variances, eps)
            denominators = mt.sqrt(variances)
            mt.div_(denominators, [(1 - beta2 ** (step - 1)) ** 0.5 for step in batch.steps])
            mt.add_(denominators, eps)
            mt.add_scaled_quotient_(batch.params, batch.grads, denominators, [-lr] * len(batch.params))
        mt.lerp_(means, batch.grads, 1 - beta1)
        residuals = mt.sub(batch.grads, means)
        mt.mul_(variances, beta2)
        mt.addcmul_(variances, residuals, residuals, value=1 - beta2)
