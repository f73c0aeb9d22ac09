"""Adam's update of a batch, shared by AGRAdamW, AGRAdam and AdaL, which differ in what feeds the two moments."""

from __future__ import annotations

from torch import Tensor

from agr_hf.optim.backends import multi_tensor as mt
from agr_hf.optim.backends.cpu import fused_adamw_
from agr_hf.optim.work import Batch

# The fold in `fold_psi_into_momentum` divides by beta1 and the norm. Norms below 1e-30 could overflow float32; below a
# beta1 of 0.1 the kernel's cancellation begins to cost digits of Psi (all of them at 1e-8).
LARGEST_FOLD = 1e30
SMALLEST_BETA = 0.1


def adam_(batch: Batch, first: list[Tensor], second: list[Tensor], decay: float) -> None:
    """Kingma and Ba's update with decoupled decay, in torch's order of operations.

    m = b1 m + (1 - b1) first;  v = b2 v + (1 - b2) second^2
    p = p (1 - lr decay) - lr m/(1 - b1^t) / (sqrt(v/(1 - b2^t)) + eps)
    """
    beta1, beta2 = batch.group["betas"]
    lr, eps = batch.lr, batch.group["eps"]
    exp_avgs, exp_avg_sqs = batch.state["exp_avg"], batch.state["exp_avg_sq"]
    if decay:
        mt.mul_(batch.params, 1 - lr * decay)
    mt.lerp_(exp_avgs, first, 1 - beta1)
    mt.mul_(exp_avg_sqs, beta2)
    mt.addcmul_(exp_avg_sqs, second, second, value=1 - beta2)
    denominators = mt.sqrt(exp_avg_sqs)
    mt.div_(denominators, [(1 - beta2**step) ** 0.5 for step in batch.steps])
    mt.add_(denominators, eps)
    step_sizes = [-(lr / (1 - beta1**step)) for step in batch.steps]
    mt.add_scaled_quotient_(batch.params, exp_avgs, denominators, step_sizes)


def fused_adam_(batch: Batch, grads: list[Tensor], decay: float) -> None:
    """The same through torch's one-pass kernel, where one gradient feeds both moments."""
    fused_adamw_(
        batch.params,
        grads,
        batch.state["exp_avg"],
        batch.state["exp_avg_sq"],
        batch.step_tensors,
        lr=float(batch.lr),
        betas=batch.group["betas"],
        eps=batch.group["eps"],
        weight_decay=decay,
    )


def can_fuse(batch: Batch) -> bool:
    return batch.on_host and batch.group["fused"] is not False and batch.group["foreach"] is None


def fold_psi_into_momentum(batch: Batch) -> bool:
    """Let a kernel that feeds the raw gradient to both moments compute AGR's, which wants Psi(g) in the first.

    Psi(g) = g - g|g|/S, so b1 m + (1 - b1) Psi(g) = b1 (m - (1 - b1)/b1 g|g|/S) + (1 - b1) g: taking the bracket
    before the kernel runs leaves it the rest.

    Returns:
        False, with nothing changed, where float32 cannot hold the bracket well enough.
    """
    beta1 = batch.group["betas"][0]
    norms = batch.norms
    if beta1 < SMALLEST_BETA or any((1 - beta1) > LARGEST_FOLD * beta1 * norm for norm in norms):
        return False
    factors = [-(1 - beta1) / (beta1 * norm) for norm in norms]
    mt.addcmul_(batch.state["exp_avg"], mt.magnitude(batch.grads), batch.grads, factors)
    return True
