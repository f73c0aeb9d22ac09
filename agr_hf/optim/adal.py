"""AdaL (arXiv 2107.01525): Adam on gradients multiplied by their layer's l1 norm."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from agr_hf.optim.adam import adam_, can_fuse, fused_adam_
from agr_hf.optim.backends import multi_tensor as mt
from agr_hf.optim.step import StepOptimizer
from agr_hf.optim.work import Batch


class AdaL(StepOptimizer):
    """Adam on l1-scaled gradients (arXiv 2107.01525, algorithm 1).

    `g^ = ||g||_1 g` for each tensor, biases too ("parameters in one layer share the same coefficient"), then Adam with
    bias correction. The step is `m^ / (sqrt(v^) + eps)`: the printed `v^-1/2 + eps` is infinite at v = 0. g^ is of
    degree 2 in the gradient, so loss scales must be taken out first (torch's GradScaler does). State keys are those of
    `torch.optim.Adam`, but the moments are of another scale: a state of Adam is refused, and AdaL's by the others.

    Args:
        params: parameters, or groups.
        lr: learning rate, a number or a tensor with one element. Default 1e-3. The paper's theory has lr / sqrt(t): use
            a scheduler for that.
        betas: decay rates of the two moments. Default (0.9, 0.999).
        eps: added to the root of the second moment. Default 1e-8. Scaled gradients can be tiny: where
            `||g||_1 |g|` falls below eps the steps shrink.
        weight_decay: L2 penalty, part of the gradient before its norm is taken. Default 0.
        decoupled: decay as AdamW does instead. Default False.
        max_grad_norm: clip the global l2 norm of the raw gradients first, without touching `.grad`. Default None.
        foreach, fused, maximize, capturable: as `AGRAdamW`.

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter is complex, quantized or a flattened shard.
    """

    uses_norms = True
    fused_devices = ("cpu",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled: bool = False,
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
            "decoupled": decoupled,
            "max_grad_norm": max_grad_norm,
            "foreach": foreach,
            "fused": fused,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def l2_decay(self, group: dict[str, Any]) -> bool:
        return not group["decoupled"]

    def update(self, batch: Batch) -> None:
        decay = 0.0 if self.l2_decay(batch.group) else batch.group["weight_decay"]
        scaled = list(mt.mul(batch.grads, batch.norms))
        if can_fuse(batch):
            fused_adam_(batch, scaled, decay)
        else:
            adam_(batch, scaled, scaled, decay)
