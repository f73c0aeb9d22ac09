"""The CPU: blocks that stay in the cache, and torch's fused Adam kernel."""

import torch
from torch import Tensor

# Elements updated at a time. 1 MiB of float32 for each array in flight: the two or three pieces of scratch of a rule
# stay in the second-level cache, and the cost of calling into torch is spread over enough elements.
BLOCK = 262_144


@torch._disable_dynamo  # torch.compile cannot trace the kernel into its graph
def fused_adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """torch's one-pass AdamW over flat float32 or float64 pieces.

    All four lists hold 1-D tensors of equal lengths: the kernel walks memory and is silently wrong where a parameter
    and its gradient differ in strides. `steps` counts this step already.
    """
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
