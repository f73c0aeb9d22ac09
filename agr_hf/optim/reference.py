"""Both papers and the baselines, literally: a function a rule, in float64, for one tensor and one step.

No speed, no options, no guards but those of the definitions. This is the file to read; the others are the ones to run,
and the tests hold them to this one. Every rule is

    theta_t = rule(theta, g, state, t, **hyperparameters)

with theta and the gradient g float64 tensors of one shape, t counting from 1, and `state` a dict that starts empty and
that the rule keeps between steps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def psi(g: Tensor) -> Tensor:
    """AGR, eq. 1 and 2: Psi(g) = g - alpha g, alpha = |g| / sum|g|. One element, or a norm of 0: Psi(g) = g."""
    total = g.abs().sum()
    if g.numel() == 1 or total == 0 or not torch.isfinite(total):
        return g
    alpha = g.abs() / total
    return g - alpha * g


def _adam(theta, first, second, state, t, lr, b1, b2, eps, decay):
    m = state["m"] = b1 * state.get("m", 0) + (1 - b1) * first
    v = state["v"] = b2 * state.get("v", 0) + (1 - b2) * second**2
    m_hat = m / (1 - b1**t)
    v_hat = v / (1 - b2**t)
    return theta - lr * (m_hat / (v_hat.sqrt() + eps) + decay * theta)


def adam(theta, g, state, t, *, lr, betas, eps, weight_decay):
    """Adam with L2 decay."""
    g = g + weight_decay * theta
    return _adam(theta, g, g, state, t, lr, *betas, eps, decay=0)


def adamw(theta, g, state, t, *, lr, betas, eps, weight_decay):
    """AdamW: decoupled decay."""
    return _adam(theta, g, g, state, t, lr, *betas, eps, decay=weight_decay)


def agr_adamw(theta, g, state, t, *, lr, betas, eps, weight_decay, second_moment="raw"):
    """AGR paper, algorithm 2, in the decoupled of its two colours: m takes Psi(g), v the raw g ("raw").

    "regularized" is the authors' code: Psi(g) feeds both.
    """
    second = g if second_moment == "raw" else psi(g)
    return _adam(theta, psi(g), second, state, t, lr, *betas, eps, decay=weight_decay)


def agr_adam(theta, g, state, t, *, lr, betas, eps, weight_decay, second_moment="raw"):
    """AGR paper, algorithm 2, in the L2 colour: g_t = grad + lambda theta, then Psi(g_t)."""
    g = g + weight_decay * theta
    second = g if second_moment == "raw" else psi(g)
    return _adam(theta, psi(g), second, state, t, lr, *betas, eps, decay=0)


def adal(theta, g, state, t, *, lr, betas, eps, weight_decay, decoupled=False):
    """AdaL paper, algorithm 1: g^ = ||g||_1 g inside Adam; L2 decay is part of g before its norm is taken.

    As printed the step is alpha_t (v_hat^-1/2 + eps) m_hat, infinite where v_hat = 0 (see `adal_as_printed`); here it
    is m_hat / (v_hat^1/2 + eps).
    """
    if not decoupled:
        g = g + weight_decay * theta
    g_hat = g.abs().sum() * g
    return _adam(theta, g_hat, g_hat, state, t, lr, *betas, eps, decay=weight_decay if decoupled else 0)


def adal_as_printed(theta, g, state, t, *, alpha, betas, eps):
    """AdaL paper, algorithm 1, to the letter: eps added to v_hat^-1/2, and alpha_t = alpha / sqrt(t). No projection."""
    b1, b2 = betas
    g_hat = g.abs().sum() * g
    m = state["m"] = b1 * state.get("m", 0) + (1 - b1) * g_hat
    v = state["v"] = b2 * state.get("v", 0) + (1 - b2) * g_hat**2
    m_hat = m / (1 - b1**t)
    v_hat = v / (1 - b2**t)
    return theta - alpha / t**0.5 * (v_hat**-0.5 + eps) * m_hat


def _adan(theta, momentum_g, difference, g, state, t, lr, betas, eps, decay, proximal):
    b1, b2, b3 = betas
    d = g - state.get("g_previous", g)
    m = state["m"] = b1 * state.get("m", 0) + (1 - b1) * momentum_g
    v = state["v"] = b2 * state.get("v", 0) + (1 - b2) * difference
    n = state["n"] = b3 * state.get("n", 0) + (1 - b3) * (g + b2 * d) ** 2
    state["g_previous"] = g
    denominator = n.sqrt() / (1 - b3**t) ** 0.5 + eps
    step = lr * (m / (1 - b1**t) + b2 * v / (1 - b2**t)) / denominator
    if proximal:
        return (theta - step) / (1 + lr * decay)
    return theta * (1 - lr * decay) - step


def adan(theta, g, state, t, *, lr, betas, eps, weight_decay, proximal=True):
    """Adan as published in code; betas are 1 - the paper's."""
    difference = g - state.get("g_previous", g)
    return _adan(theta, g, difference, g, state, t, lr, betas, eps, weight_decay, proximal)


def agr_adan(theta, g, state, t, *, lr, betas, eps, weight_decay, proximal=True, second_moment="raw"):
    """AGR paper, algorithm 1: m from Psi(g_t), v from Psi(g_t) - Psi(g_{t-1}), n from the raw gradients ("raw").

    "regularized" is the authors' code: Adan on Psi(g).
    """
    if second_moment == "regularized":
        return adan(theta, psi(g), state, t, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, proximal=proximal)
    difference = psi(g) - psi(state.get("g_previous", g))
    return _adan(theta, psi(g), difference, g, state, t, lr, betas, eps, weight_decay, proximal)


def acprop(theta, g, state, t, *, lr, betas, eps, weight_decay):
    """ACProp: the denominator of the step before, centred on the running mean; eps is added into s itself."""
    b1, b2 = betas
    g = g + weight_decay * theta
    m = state["m"] = b1 * state.get("m", 0) + (1 - b1) * g
    if t == 1:
        theta = theta - lr * g
        s = torch.zeros_like(g)
    else:
        s = state["s"] + eps
        theta = theta - lr * g / (s.sqrt() / (1 - b2 ** (t - 1)) ** 0.5 + eps)
    state["s"] = b2 * s + (1 - b2) * (g - m) ** 2
    return theta


def nosadam(theta, g, state, t, *, lr, betas, eps, weight_decay, gamma=0.1):
    """NosAdam: b2_t = B_{t-1}/B_t with B_t = sum_{k<=t} k^-gamma; m is bias-corrected, v is not."""
    b1, _ = betas
    g = g + weight_decay * theta
    b_before = sum(k**-gamma for k in range(1, t))
    b2 = b_before / (b_before + t**-gamma)
    m = state["m"] = b1 * state.get("m", 0) + (1 - b1) * g
    v = state["v"] = b2 * state.get("v", 0) + (1 - b2) * g**2
    return theta - lr * m / (1 - b1**t) / (v.sqrt() + eps)


def clipped(grads: list[Tensor], max_norm: float) -> list[Tensor]:
    """Global-norm clipping as `torch.nn.utils.clip_grad_norm_` does it, on copies."""
    total = sum((g**2).sum() for g in grads) ** 0.5
    factor = min(1.0, float(max_norm / (total + 1e-6)))
    return [g * factor for g in grads]


def stochastic_bfloat16(x: Tensor, u: Tensor) -> Tensor:
    """Normal numbers in bfloat16's 8 significant bits: up, away from 0, with the probability of the distance from below.

    u is uniform in [0, 1), one number for each element.
    """
    spacing = 2.0 ** (torch.floor(torch.log2(x.abs())) - 7)
    below = torch.floor(x.abs() / spacing)
    up = x.abs() / spacing - below + u >= 1
    return x.sign() * (below + up) * spacing


def kahan_bfloat16(x: Tensor) -> tuple[Tensor, Tensor]:
    """A parameter as two bfloat16 numbers: itself to nearest, and the rest, which is added before the next update."""
    kept = x.to(torch.bfloat16).double()
    return kept, (x - kept).to(torch.bfloat16).double()


RULES = {
    "agr_adamw": agr_adamw,
    "agr_adam": agr_adam,
    "agr_adan": agr_adan,
    "adal": adal,
    "adan": adan,
    "acprop": acprop,
    "nosadam": nosadam,
    "adam": adam,
    "adamw": adamw,
}
