"""Adam and AdamW with adaptive gradient regularization (arXiv 2407.16944, algorithm 2), and Adam's update of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from torch import Tensor

from agr_hf.optim.backends import multi_tensor as mt
from agr_hf.optim.backends.lists import Batch
from agr_hf.optim.options import AGROptions
from agr_hf.optim.psi import psi
from agr_hf.optim.step import StepOptimizer


def adam_(batch: Batch, first: list[Tensor], second: list[Tensor], decay: float) -> None:
    """Kingma and Ba's update with decoupled decay, in torch's order of operations; AdaL's too.

    m = b1 m + (1 - b1) first;  v = b2 v + (1 - b2) second^2
    p = p (1 - lr decay) - lr m/(1 - b1^t) / (sqrt(v/(1 - b2^t)) + eps)
    """
    beta1, beta2 = batch.group["betas"]
    lr, eps = batch.lr, batch.group["eps"]
    exp_avgs, exp_avg_sqs = batch.state.values()
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


class _AGRAdam(StepOptimizer):
    option_types = AGROptions
    native_rule = "adam"

    def update(self, batch: Batch) -> None:
        decay = 0.0 if self.l2_decay(batch.group) else batch.group["weight_decay"]
        regularized = psi(batch)
        adam_(batch, regularized, batch.grads if batch.group["second_moment"] == "raw" else regularized, decay)


class AGRAdamW(_AGRAdam):
    """AdamW with adaptive gradient regularization (arXiv 2407.16944, algorithm 2).

    `g~ = Psi(g);  m = b1 m + (1 - b1) g~;  v = b2 v + (1 - b2) g^2`, then AdamW's update with decoupled decay. State
    keys are those of `torch.optim.AdamW`, and either loads the other's state_dict.

    Args:
        params: parameters, or groups; `agr_param_groups(model)` makes groups by layer type as the paper applies AGR.
        lr: learning rate, a number or a tensor with one element. Default 1e-3.
        betas: decay rates of the two moments. Default (0.9, 0.999).
        eps: added to the root of the second moment. Default 1e-8.
        weight_decay: decoupled decay, `p -= lr * weight_decay * p`. Default 1e-2.
        agr: apply Psi to this group; or a list with True or False for each of its parameters. Default True.
        agr_steps: stop applying Psi after that many steps of the group (the paper's suspension, table 7). The count
            `agr_step` is part of the state_dict; it is of all steps in which the group has a gradient, with AGR or without.
            Default None, never.
        min_ndim: tensors of fewer dimensions are left alone. Default 2: weights, not biases. The authors' code does 0.
        second_moment: "raw" feeds g^2 to the second moment (the paper, default), "regularized" Psi(g)^2 (the authors'
            code).
        max_grad_norm: clip the global l2 norm of all gradients of this optimizer to it before anything else, as
            `torch.nn.utils.clip_grad_norm_` does, without touching `.grad` and at the cost of one more sum in a reading
            that happens anyway. Under ZeroRedundancyOptimizer that is each process's share of them: clip outside there.
            Default None.
        foreach: None takes the fastest step of the device: on the CPU the native one for float32 and bfloat16, else lists of
            tensors in batches. True works on lists of all tensors at once, False on one tensor at a time. Default None.
        fused: True insists on the native step, False forbids it. Default None.
        maximize: ascend instead. Default False.
        rounding: how bfloat16 parameters are rounded after an update that is computed in float32. "nearest", the default,
            loses updates of less than 1/512 of a weight; "stochastic" keeps them in the mean, at no memory; "kahan" keeps
            what was lost in a bfloat16 tensor beside each parameter (state `kahan_comp`, 2 bytes an element), down to
            1/131,072 of a weight. float32 parameters are not touched by it.
        rounding_seed: of the random numbers of "stochastic". They depend on the seed, the place of the parameter, its step
            and the element, so that a resumed run draws the same. Default 0.
        state_dtype: torch.bfloat16 keeps the first moment in 2 bytes an element instead of 4, rounded to nearest, or with
            "stochastic" at random. The second moment stays in float32. Default None, float32.
        capturable: keep the step count on the device, for CUDA graphs. `agr_steps` then goes by the steps of each tensor.
            Default False.

    Raises:
        TypeError: there is no such option.
        ValueError: a hyperparameter is out of range, or a parameter is complex, quantized, a flattened shard, or shares
            memory with another one.

    Example:
        >>> optimizer = AGRAdamW(agr_param_groups(model, weight_decay=0.01), lr=1e-3)
        >>> Trainer(model=model, args=args, train_dataset=data, optimizers=(optimizer, None))
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[AGROptions],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **options)

    def l2_decay(self, group: Mapping[str, Any]) -> bool:
        return False


class AGRAdam(_AGRAdam):
    """Adam with adaptive gradient regularization and L2 decay (arXiv 2407.16944, algorithm 2, its L2 term).

    As `AGRAdamW`, but decay is part of the gradient: Psi and its norm are those of `g + weight_decay * p`.

    Args:
        params, lr, betas, eps: as `AGRAdamW`.
        weight_decay: L2 penalty added to the gradient. Default 0.
        **options: `agr`, `agr_steps`, `min_ndim`, `second_moment`, `max_grad_norm`, `foreach`, `fused`, `maximize`,
            `rounding`, `rounding_seed`, `state_dtype` and `capturable`, as `AGRAdamW`.

    Raises:
        TypeError, ValueError: as `AGRAdamW`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Unpack[AGROptions],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **options)
