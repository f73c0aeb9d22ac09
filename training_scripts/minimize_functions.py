"""Rastrigin and Rosenbrock for every optimizer: search the learning rate, draw the way, measure how near it ends.

    python training_scripts/minimize_functions.py --output_dir runs/functions

The set-up of the AdaL paper (section 3.1), which borrows it from jettify/pytorch-optimizer: learning rates by Optuna's TPE,
200 trials, for the squared distance to the minimum after 100 steps; plots of 500 steps.
"""

import argparse
import json
import logging
import math
from pathlib import Path

import optuna
import torch

from agr_hf import list_optimizers
from agr_hf.environment import environment
from agr_hf.files import replaced_file, write_text
from agr_hf.tasks.functions import FUNCTIONS, squared_distance, trajectory
from agr_hf.tasks.runs import command, plain

logger = logging.getLogger("minimize_functions")
FARTHEST = 1e6  # what a run that left the numbers counts as: an infinite value would be a failed trial to Optuna


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--optim", nargs="+", choices=list_optimizers(), default=list_optimizers())
    parser.add_argument("--functions", nargs="+", choices=FUNCTIONS, default=list(FUNCTIONS))
    parser.add_argument("--trials", type=int, default=200, help="of the search (%(default)s)")
    parser.add_argument("--search_steps", type=int, default=100, help="steps of a trial (%(default)s)")
    parser.add_argument("--steps", type=int, default=500, help="steps of the plot (%(default)s)")
    parser.add_argument("--lowest_lr", type=float, default=1e-4)
    parser.add_argument("--highest_lr", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name in ("trials", "search_steps", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is not allowed; it must be at least 1")
    if not 0 < args.lowest_lr < args.highest_lr:
        parser.error(f"--lowest_lr {args.lowest_lr:g} must be above 0 and below --highest_lr {args.highest_lr:g}")
    return args


def search(function, optimizer, args):
    """The learning rate whose run ends nearest to the minimum."""

    def objective(trial):
        lr = trial.suggest_float("lr", args.lowest_lr, args.highest_lr, log=True)
        return min(squared_distance(function, trajectory(function, optimizer, lr, args.search_steps)), FARTHEST)

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=args.seed))
    study.optimize(objective, n_trials=args.trials)
    return study.best_params["lr"]


def plot(function, ways, path):
    """Each optimizer's way over the function's contours."""
    from matplotlib.figure import Figure

    left, right, bottom, top = function.extent
    x, y = torch.meshgrid(torch.linspace(left, right, 250), torch.linspace(bottom, top, 250), indexing="xy")
    height = function.value(torch.stack([x, y], dim=-1))
    if function.logarithmic:
        height = height.add(1e-3).log()
    columns = min(4, len(ways))
    rows = -(-len(ways) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.3 * rows), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(rows, columns, squeeze=False).flat, ways.items(), strict=False):
        axes.contour(x, y, height, levels=20, cmap="Greys", linewidths=0.6)
        axes.plot(points[:, 0], points[:, 1], color="tab:red", linewidth=1)
        axes.plot(*points[-1], "o", color="tab:red", markersize=4)
        axes.plot(*function.minimum, "*", color="tab:green", markersize=10)
        axes.set(xlim=(left, right), ylim=(bottom, top), title=name, xticks=[], yticks=[])
    with replaced_file(path) as temporary:
        figure.savefig(temporary, dpi=110, metadata={"Software": "agr_hf"})


def main(argv=None):
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)  # two numbers at a time
    args.output_dir.mkdir(parents=True, exist_ok=True)
    found, lines = [], [f"| function | optimizer | lr | distance after {args.search_steps} steps | after {args.steps} |",
                        "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for function in (FUNCTIONS[name] for name in args.functions):
        ways = {}
        for name in args.optim:
            lr = search(function, name, args)
            ways[name] = trajectory(function, name, lr, args.steps)
            near, last = (
                math.sqrt(squared_distance(function, ways[name][: n + 1])) for n in (args.search_steps, args.steps)
            )
            found.append({"function": function.name, "optimizer": name, "lr": lr, "distance_searched": near,
                          "distance": last, "last_point": ways[name][-1].tolist()})  # fmt: skip
            lines.append(f"| {function.name} | {name} | {lr:.3g} | {near:.2e} | {last:.2e} |")
            logger.info("%s, %s: lr %.3g, distance %.2e", function.name, name, lr, near)
        plot(function, ways, args.output_dir / f"{function.name}.png")
    config = {key: value for key, value in vars(args).items() if key != "output_dir"}
    results = plain(
        {"task": "functions", "runs": found, "command": command(__file__, argv), "config": config, **environment()}
    )
    write_text(args.output_dir / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
    write_text(args.output_dir / "table.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
