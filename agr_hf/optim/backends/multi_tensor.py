"""torch's operations over lists of tensors, under one name each, so that a rule reads like its equation.

In CUDA each call is a few kernel launches for the whole list; on the CPU it is a loop in C++.
A scalar is a Python number, a 0-dim tensor, or a list with one of these for each tensor: numbers where the host
knows them, 0-dim tensors where reading them would make the host wait for the device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from agr_hf.optim.shards import Scalar

Tensors = Sequence[Tensor]
# The overloads of these functions are more than a checker can pick from.
Operation = Callable[..., Any]

abs: Operation = torch._foreach_abs
add: Operation = torch._foreach_add
add_: Operation = torch._foreach_add_
addcdiv_: Operation = torch._foreach_addcdiv_
addcmul: Operation = torch._foreach_addcmul
addcmul_: Operation = torch._foreach_addcmul_
clamp_max_: Operation = torch._foreach_clamp_max_
div: Operation = torch._foreach_div
div_: Operation = torch._foreach_div_
lerp_: Operation = torch._foreach_lerp_
mul: Operation = torch._foreach_mul
mul_: Operation = torch._foreach_mul_
neg_: Operation = torch._foreach_neg_
norm: Operation = torch._foreach_norm
sqrt: Operation = torch._foreach_sqrt
sub: Operation = torch._foreach_sub
zero_: Operation = torch._foreach_zero_


def add_scaled_quotient_(xs: Tensors, numerators: Tensors, denominators: Tensors, scales: Sequence[Scalar]) -> None:
    """x += scale * numerator / denominator."""
    if any(isinstance(scale, Tensor) for scale in scales):
        # `addcdiv_` wants its factors on the host; a tensor here stays on the device.
        quotients = div(numerators, denominators)
        mul_(quotients, list(scales))
        add_(xs, quotients)
    else:
        addcdiv_(xs, numerators, denominators, scales)


def l1(xs: Tensors) -> list[Tensor]:
    """sum|x| of each tensor as a 0-dim tensor of at least float32, one pass over the list (CUDA and its likes)."""
    return list(norm(xs, 1, dtype=torch.promote_types(xs[0].dtype, torch.float32)))


def l2(xs: Tensors) -> list[Tensor]:
    """sqrt(sum x^2) of each tensor, likewise."""
    return list(norm(xs, 2, dtype=torch.promote_types(xs[0].dtype, torch.float32)))
