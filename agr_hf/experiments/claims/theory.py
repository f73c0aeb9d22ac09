"""Claims that a calculation answers: theorem 4.1 of AGR, and the regret and the test functions of AdaL."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

from agr_hf.experiments.claims.claim import Claim, Finding, Setting, interval
from agr_hf.optim.adal import AdaL
from agr_hf.optim.psi import agr
from agr_hf.optim.registry import optimizer_info
from agr_hf.tasks.functions import FUNCTIONS, moved, search_rate, squared_distance, trajectory

# ----------------------------------------------------------------------------------------------- theorem 4.1


def one_large(n: int, draws: torch.Generator) -> Tensor:
    """Half of the l1 norm in one element, the other half in all others together."""
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.full((n - 1,), 1 / (n - 1), dtype=torch.float64)])


LAWS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "normal": lambda n, draws: torch.randn(n, generator=draws, dtype=torch.float64),
    "lognormal": lambda n, draws: torch.randn(n, generator=draws, dtype=torch.float64).mul(3).exp(),
    "Cauchy": lambda n, draws: torch.empty(n, dtype=torch.float64).cauchy_(generator=draws),
    "one large": one_large,
}


def psi_jacobian(grad: Tensor) -> Tensor:
    """The derivative of Psi at a gradient (n,): diag(1 - 2a) + (sign(g) a^2) sign(g)', with a = |g| / sum|g|; (n, n)."""
    share, sign = grad.abs() / grad.abs().sum(), grad.sign()
    return torch.diag(1 - 2 * share) + torch.outer(sign * share.square(), sign)


def measure_norm(setting: Setting) -> dict[str, Any]:
    """The largest ‖Psi(g)‖ / ‖g‖ over gradients of several laws and sizes."""
    draws = torch.Generator().manual_seed(0)
    worst = {}
    for law, draw in LAWS.items():
        ratios = []
        for _ in range(setting.options["draws"]):
            grad = draw(int(torch.randint(2, 1000, (), generator=draws)), draws)[None]
            ratios.append(float(agr(grad).norm() / grad.norm()))
        worst[law] = max(ratios)
    return {"draws_of_each_law": setting.options["draws"], "largest_ratio": worst}


def judge_norm(found: Mapping[str, Any]) -> Finding:
    worst = max(found["largest_ratio"].values())
    effect = f"‖Ψ(g)‖ / ‖g‖ is at most {worst:.6f}; every |1 - a| is at most 1, so it cannot be otherwise"
    verdict = "confirmed" if worst <= 1 + 1e-12 else "contradicted"
    return Finding(verdict, effect, n=len(LAWS) * found["draws_of_each_law"])


def measure_jacobian(setting: Setting) -> dict[str, Any]:
    """The loss |w|^2 / 2, whose Hessian is the identity: the norm of Psi's derivative where one gradient is large."""
    rows = []
    for n in setting.options["sizes"]:
        grad = LAWS["one large"](n, torch.Generator())
        jacobian = psi_jacobian(grad)
        rows.append({
            "elements": n,
            "spectral": float(torch.linalg.matrix_norm(jacobian, 2)),
            "spectral_by_differences": _spectral_by_differences(grad) if n <= 256 else None,
            "frobenius": float(jacobian.norm()),
            "hessian_spectral": 1.0,
            "hessian_frobenius": math.sqrt(n),
        })  # fmt: skip
    # And how often that happens with gradients of the usual laws.
    draws, larger = torch.Generator().manual_seed(0), {}
    for law in ("normal", "lognormal", "Cauchy"):
        norms = [float(torch.linalg.matrix_norm(psi_jacobian(LAWS[law](100, draws)), 2)) for _ in range(200)]
        larger[law] = sum(norm > 1 for norm in norms) / len(norms)
    return {"gradient": "one element holds half of the l1 norm, the others share the rest", "rows": rows,
            "share_above_one_of_100_elements": larger}  # fmt: skip


def _spectral_by_differences(grad: Tensor, step: float = 1e-6) -> float:
    """The norm of Psi's derivative from `agr` itself: the formula is not to be trusted on its own word."""
    moves = step * torch.eye(len(grad), dtype=torch.float64)
    columns = [(agr((grad + move)[None]) - agr((grad - move)[None]))[0] / (2 * step) for move in moves]
    return float(torch.linalg.matrix_norm(torch.stack(columns, dim=1), 2))


def judge_jacobian(found: Mapping[str, Any]) -> Finding:
    worst = max(found["rows"], key=lambda row: row["spectral"])
    checked = [row for row in found["rows"] if row["spectral_by_differences"] is not None]
    agree = all(math.isclose(row["spectral"], row["spectral_by_differences"], rel_tol=1e-4) for row in checked)
    counter = bool(checked) and agree and worst["spectral"] > 1 and worst["frobenius"] > worst["hessian_frobenius"]
    effect = (
        f"counter-example: loss ‖w‖²/2, {worst['elements']} weights, one with half of the l1 norm: "
        f"‖∇Ψ‖₂ = {worst['spectral']:.2f} > ‖∇²L‖₂ = 1, "
        f"Frobenius {worst['frobenius']:.2f} > {worst['hessian_frobenius']:.2f}"
    )
    return Finding("contradicted" if counter else "cannot tell", effect, n=len(found["rows"]))


# ----------------------------------------------------------------------------------------------- regret of AdaL


def measure_regret(setting: Setting) -> dict[str, Any]:
    """Regret of AdaL with a_t = a / sqrt(t): a logistic regression on real digits, and Reddi et al.'s linear losses."""
    horizons = setting.options["horizons"]
    logistic = [logistic_regret(horizons, seed) for seed in range(setting.seeds)]
    slopes = [slope(horizons, regrets) for regrets in logistic]
    return {
        "horizons": horizons,
        "logistic": logistic,
        "logistic_slopes": slopes,
        "reddi": {"C": 3.0, "regret": reddi_regret(horizons, 3.0)},
    }


def slope(horizons: list[int], regrets: list[float]) -> float:
    """d log R / d log T over the longer half of the horizons: 0.5 for sqrt(T), 1 for T."""
    half = len(horizons) // 2
    return float(numpy.polyfit(numpy.log(horizons[half:]), numpy.log(numpy.maximum(regrets[half:], 1e-12)), 1)[0])


def logistic_regret(horizons: list[int], seed: int) -> list[float]:
    """Sum of the losses on examples one after the other, less that of the best weights in the ball of radius 5."""
    from agr_hf.tasks.digits import load_digits

    data = load_digits()["train"]
    draws = torch.Generator().manual_seed(seed)
    order = torch.randint(len(data), (horizons[-1],), generator=draws)
    pixels = data.pixel_values.flatten(1).double() / 8
    inputs, targets = pixels[order], (data.labels[order] >= 5).double() * 2 - 1
    weight = torch.nn.Parameter(torch.zeros(inputs.shape[1], dtype=torch.float64))
    optimizer, rate, radius = AdaL([weight], lr=0.1), 0.1, 5.0
    losses = []
    for t, (x, y) in enumerate(zip(inputs, targets, strict=True), 1):
        margin = y * (x @ weight.detach())
        losses.append(float(torch.nn.functional.softplus(-margin)))
        weight.grad = -y * torch.sigmoid(-margin) * x
        optimizer.param_groups[0]["lr"] = rate / math.sqrt(t)
        optimizer.step()
        with torch.no_grad():
            weight.mul_(min(1.0, radius / float(weight.norm().clamp(min=1e-12))))
    total = numpy.cumsum(losses)
    return [float(total[n - 1]) - _best_loss(inputs[:n], targets[:n], radius) for n in horizons]


def _best_loss(inputs: Tensor, targets: Tensor, radius: float) -> float:
    """The smallest sum of logistic losses of any weights in a ball around 0."""
    from scipy.optimize import minimize

    x, y = inputs.numpy(), targets.numpy()

    def loss(weight: numpy.ndarray) -> tuple[float, numpy.ndarray]:
        margin = y * (x @ weight)
        return float(numpy.logaddexp(0, -margin).sum()), -(x.T @ (y / (1 + numpy.exp(margin))))

    ball = {"type": "ineq", "fun": lambda w: radius**2 - w @ w, "jac": lambda w: -2 * w}
    found = minimize(
        loss, numpy.zeros(x.shape[1]), jac=True, method="SLSQP", constraints=[ball], options={"maxiter": 500}
    )
    return float(found.fun)


def reddi_regret(horizons: list[int], c: float) -> list[float]:
    """Regret on [-1, 1] with f_t(x) = c x for t = 1, 4, 7, ... and -x else (Reddi et al. 2018, theorem 1), beta1 = 0.

    The best point is -1. AdaL sees the gradients c^2 and -1, so that its beta2 is 1 / (1 + c^4).
    """
    point = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = AdaL([point], lr=0.1, betas=(0.0, 1 / (1 + c**4)), eps=1e-12)
    regret, found = 0.0, []
    for t in range(1, horizons[-1] + 1):
        factor = c if t % 3 == 1 else -1.0
        regret += factor * float(point.detach()) + factor
        point.grad = torch.full((1,), factor, dtype=torch.float64)
        optimizer.param_groups[0]["lr"] = 0.1 / math.sqrt(t)
        optimizer.step()
        with torch.no_grad():
            point.clamp_(-1, 1)
        if t in horizons:
            found.append(regret)
    return found


def judge_regret(found: Mapping[str, Any]) -> Finding:
    mean, low, high = interval(found["logistic_slopes"])
    linear = slope(found["horizons"], found["reddi"]["regret"])
    effect = (
        f"logistic regression on digits: R grows as T^{mean:.2f} ({low:.2f} to {high:.2f}); on three linear losses in turn "
        f"(Reddi et al. 2018) as T^{linear:.2f}, so the theorem does not hold for every convex problem"
    )
    verdict = "contradicted" if linear > 0.9 else "confirmed" if high <= 0.5 else "cannot tell"
    return Finding(verdict, effect, n=len(found["logistic_slopes"]))


# ----------------------------------------------------------------------------------------------- test functions


def measure_functions(setting: Setting) -> dict[str, Any]:
    """Distance to the minimum after 100 steps, at the rate that a search found for the paper's start: from there and from
    starts around it."""
    torch.set_num_threads(1)  # two numbers at a time
    names, steps = setting.options["optimizers"], 100
    rates: dict[str, dict[str, float]] = {}
    distances: dict[str, dict[str, list[float]]] = {}
    own_start: dict[str, dict[str, float]] = {}
    for name, function in FUNCTIONS.items():
        for optimizer in names:
            rate = search_rate(function, optimizer, steps, setting.options["trials"])
            rates.setdefault(name, {})[optimizer] = rate
            own, *others = (
                math.sqrt(min(squared_distance(of, trajectory(of, optimizer, rate, steps)), 1e12))
                for of in (function, *(moved(function, seed) for seed in range(1, setting.seeds + 1)))
            )
            own_start.setdefault(name, {})[optimizer] = own
            distances.setdefault(name, {})[optimizer] = others
            print(f"{name}, {optimizer}: rate {rate:.3g}")
    return {"steps": steps, "trials": setting.options["trials"], "rates": rates, "own_start": own_start,
            "distances": distances}  # fmt: skip


def judge_functions(found: Mapping[str, Any]) -> Finding:
    """Converges: nearer than 0.5 to the minimum from nine starts in ten. Better than most: a smaller median distance."""
    words, good = [], []
    for name, by_optimizer in found["distances"].items():
        medians = {optimizer: float(numpy.median(values)) for optimizer, values in by_optimizer.items()}
        rank = sorted(medians, key=medians.__getitem__).index("adal") + 1
        near = float(numpy.mean(numpy.asarray(by_optimizer["adal"]) < 0.5))
        best, own = min(medians, key=medians.__getitem__), found["own_start"][name]
        words.append(
            f"{name}: {own['adal']:.2g} from the paper's start, rank {sorted(own, key=own.__getitem__).index('adal') + 1}; "
            f"around it median distance {medians['adal']:.2g}, {near:.0%} of the starts within 0.5, rank {rank} of "
            f"{len(medians)} (best {optimizer_info(best).title} {medians[best]:.2g})"
        )
        good.append((near >= 0.9, rank <= len(medians) / 2))
    verdict = "confirmed" if all(map(all, good)) else "in part" if any(map(any, good)) else "contradicted"
    return Finding(verdict, "; ".join(words), n=len(next(iter(found["distances"]["rastrigin"].values()))))


CLAIMS = [
    Claim(
        "agr-norm", "AGR", "theorem 4.1, first inequality", "‖Ψ(g)‖₂ is at most ‖g‖₂",
        "no gradient drawn from four distributions has a larger norm after Ψ", "one has", measure_norm, judge_norm,
        {"small": Setting(options={"draws": 10_000})},
    ),
    Claim(
        "agr-jacobian", "AGR", "theorem 4.1, second inequality", "‖∇Ψ(∇L)‖₂ is at most ‖∇²L‖₂: a smoother landscape",
        "no gradient is found with a larger norm of the derivative", "one is",
        measure_jacobian, judge_jacobian, {"small": Setting(options={"sizes": [4, 16, 64, 256, 1024]})},
    ),
    Claim(
        "adal-regret", "AdaL", "theorem 1", "regret of O(√T) in a convex problem",
        "R grows no faster than √T in every convex problem tried", "R grows as T in one",
        measure_regret, judge_regret,
        {"small": Setting(seeds=8, options={"horizons": [250, 500, 1000, 2000, 4000, 8000, 16000]})},
    ),
    Claim(
        "adal-functions", "AdaL", "section 3.1, figure 4",
        "converges on Rastrigin and on Rosenbrock, better than most optimizers",
        "within 0.5 of the minimum from 9 of 10 starts, and a median distance in the better half", "neither, on both",
        measure_functions, judge_functions,
        {"small": Setting(seeds=32, options={"trials": 200, "optimizers": [
            "sgd", "adam", "adamw", "amsgrad", "rmsprop", "nosadam", "acprop", "adan", "adal", "agr_adam"]})},
    ),
]  # fmt: skip
