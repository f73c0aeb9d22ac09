"""Runs `agr_hf.optim.reference` beside an optimizer, over the same gradients."""

import inspect

import torch

from agr_hf.optim import reference
from agr_hf.optim.registry import OPTIMIZERS

OURS = [name for name, info in OPTIMIZERS.items() if info.ours]
WITH_AGR = [name for name in OURS if "agr" in inspect.signature(OPTIMIZERS[name].cls).parameters]
# What a rule is where AGR does not apply.
PLAIN = {"agr_adamw": "adamw", "agr_adam": "adam", "agr_adan": "adan"}
HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay", "second_moment", "proximal", "decoupled", "gamma")


def shapes():
    """Weights of two convolutions (one 1x1) and a Linear; a bias, a scalar, a one-element matrix, an empty one."""
    return [(8, 4, 3, 3), (6, 8, 1, 1), (33, 17), (17,), (), (1, 1), (0, 5)]


def initial(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes()]


def gradients(steps, seed=1):
    """Heavy-tailed gradients, so that shares of the norm differ much; scales differ by tensor, and change in time."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        yield [
            (1 + step % 7) * torch.randn(shape, generator=generator, dtype=torch.float64) ** 3 / (i + 1)
            for i, shape in enumerate(shapes())
        ]


def run_reference(name, thetas, gradients_by_step, *, min_ndim=2, agr_steps=None, max_grad_norm=None, maximize=False,
                  agr=True, rounded=lambda theta: theta, **hyperparameters):  # fmt: skip
    """Parameters after all steps, in float64; `rounded` is applied to each after every step."""
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(OPTIMIZERS[name].cls).parameters.items()
        if key in HYPERPARAMETERS
    }
    defaults.update(hyperparameters)
    thetas, states = list(thetas), [{} for _ in thetas]
    for t, grads in enumerate(gradients_by_step, start=1):
        grads = [-g if maximize else g for g in grads]
        if max_grad_norm is not None:
            grads = reference.clipped(grads, max_grad_norm)
        for i, (theta, g) in enumerate(zip(thetas, grads, strict=True)):
            applies = agr and theta.ndim >= min_ndim and (agr_steps is None or t <= agr_steps)
            rule = reference.RULES[name if applies else PLAIN.get(name, name)]
            accepted = inspect.signature(rule).parameters
            options = {key: value for key, value in defaults.items() if key in accepted}
            thetas[i] = rounded(rule(theta, g, states[i], t, **options))
    return thetas


def run_optimizer(optimizer, params, gradients_by_step, layout=lambda g: g):
    for grads in gradients_by_step:
        for param, grad in zip(params, grads, strict=True):
            param.grad = layout(grad.to(param.dtype))
        optimizer.step()


def as_parameters(thetas, dtype=torch.float64, memory_format=torch.contiguous_format):
    # `clone` first: `.to` of the same dtype would share memory with the test's own copy.
    return [
        torch.nn.Parameter(
            theta.clone().to(dtype=dtype, memory_format=memory_format if theta.ndim == 4 else torch.preserve_format)
        )
        for theta in thetas
    ]
