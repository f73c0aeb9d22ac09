"""Two functions to minimize, as AdaL's paper does (section 3.1) after jettify/pytorch-optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy
import torch
from torch import Tensor

from agr_hf.optim.registry import create_optimizer

FARTHEST = 1e6  # what a run that left the numbers counts as: an infinite value would be a failed trial to Optuna


@dataclass(frozen=True)
class TestFunction:
    """A function of a point (2,), float64, with the start and the minimum of the experiment.

    Attributes:
        extent: of the plot, (left, right, bottom, top).
        logarithmic: whether contours are of the logarithm.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    start: tuple[float, float]
    minimum: tuple[float, float]
    extent: tuple[float, float, float, float]
    logarithmic: bool


def rastrigin(point: Tensor) -> Tensor:
    """2 A + sum(x^2 - A cos(2 pi x)) with A = 10: many local minima around the one at (0, 0). Points (..., 2)."""
    return 20 + (point.square() - 10 * torch.cos(2 * torch.pi * point)).sum(-1)


def rosenbrock(point: Tensor) -> Tensor:
    """(1 - x)^2 + 100 (y - x^2)^2: one minimum at (1, 1) in a flat curved valley. Points (..., 2)."""
    x, y = point.unbind(-1)
    return (1 - x).square() + 100 * (y - x.square()).square()


FUNCTIONS = {
    "rastrigin": TestFunction("rastrigin", rastrigin, (-2.0, 3.5), (0.0, 0.0), (-4.5, 4.5, -4.5, 4.5), False),
    "rosenbrock": TestFunction("rosenbrock", rosenbrock, (-2.0, 2.0), (1.0, 1.0), (-2.5, 2.0, -1.5, 3.0), True),
}


def moved(function: TestFunction, seed: int) -> TestFunction:
    """The function with its start moved by N(0, 0.1^2) in each coordinate, drawn with a seed."""
    shift = numpy.random.default_rng(seed).normal(0, 0.1, 2)
    x, y = function.start
    return replace(function, start=(float(x + shift[0]), float(y + shift[1])))


def trajectory(function: TestFunction, optimizer: str, lr: float, steps: int) -> Tensor:
    """Points that an optimizer visits from the function's start; (steps + 1, 2), float64.

    The gradient is clipped to norm 1 each step, as in the setup that the paper borrows. AGR applies to the point, though
    it is a vector (`min_ndim=0`): with two elements Psi takes a large part of the gradient, and where one of them is
    zero, all of it.

    Raises:
        ValueError: the optimizer is unknown, or the rate is negative.
    """
    point = torch.nn.Parameter(torch.tensor(function.start, dtype=torch.float64))
    options = {"min_ndim": 0} if optimizer.startswith("agr_") else {}
    made = create_optimizer(optimizer, [point], lr=lr, weight_decay=0.0, **options)
    points = [point.detach().clone()]
    for _ in range(steps):
        made.zero_grad()
        function.value(point).backward()
        torch.nn.utils.clip_grad_norm_([point], 1.0)
        made.step()
        points.append(point.detach().clone())
    return torch.stack(points)


def search_rate(
    function: TestFunction, optimizer: str, steps: int, trials: int, *, lowest: float = 1e-4, highest: float = 2.0,
    seed: int = 0,
) -> float:  # fmt: skip
    """The learning rate between two ends whose trajectory ends nearest to the minimum, by Optuna's TPE."""
    import optuna

    def objective(trial: optuna.Trial) -> float:
        lr = trial.suggest_float("lr", lowest, highest, log=True)
        return min(squared_distance(function, trajectory(function, optimizer, lr, steps)), FARTHEST)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, n_trials=trials)
    return float(study.best_params["lr"])


def sample_heights(function: TestFunction, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, y and the heights for contour lines on a grid of count x count points; logarithms where the function says so."""
    left, right, bottom, top = function.extent
    x, y = torch.meshgrid(torch.linspace(left, right, count), torch.linspace(bottom, top, count), indexing="xy")
    heights = function.value(torch.stack([x, y], dim=-1))
    return x, y, heights.add(1e-3).log() if function.logarithmic else heights


def squared_distance(function: TestFunction, points: Tensor) -> float:
    """From the last point to the minimum; infinite where the run left the numbers."""
    distance = (points[-1] - torch.tensor(function.minimum, dtype=torch.float64)).square().sum().item()
    return distance if distance == distance else float("inf")
