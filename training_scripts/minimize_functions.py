"""Rastrigin and Rosenbrock for every optimizer: search the learning rate, draw the way, measure how near it ends.

    python training_scripts/minimize_functions.py --output_dir runs/functions
    python training_scripts/minimize_functions.py --optim adal --seed 3 --output_dir runs/adal

The set-up of the AdaL paper (section 3.1), which borrows it from jettify/pytorch-optimizer: learning rates by Optuna's TPE,
200 trials, for the squared distance to the minimum after 100 steps; plots of 500 steps. A --seed above 0 moves the start by
N(0, 0.1^2) and seeds the search.
"""

import argparse
import logging
import math
import time
from pathlib import Path

import torch

from agr_hf import list_optimizers
from agr_hf.files import replaced_file, write_text
from agr_hf.tasks.functions import FUNCTIONS, moved, sample_heights, search_rate, squared_distance, trajectory
from agr_hf.tasks.recipes import check_counts, given_arguments
from agr_hf.tasks.record import make_record
from agr_hf.tasks.runs import run_main

logger = logging.getLogger("minimize_functions")


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--optim", nargs="+", choices=list_optimizers(), default=list_optimizers())
    parser.add_argument("--functions", nargs="+", choices=FUNCTIONS, default=list(FUNCTIONS))
    parser.add_argument("--trials", type=int, default=200, help="of the search (%(default)s)")
    parser.add_argument("--search_steps", type=int, default=100, help="steps of a trial (%(default)s)")
    parser.add_argument("--steps", type=int, default=500, help="steps of the plot (%(default)s)")
    parser.add_argument("--lowest_lr", type=float, default=1e-4)
    parser.add_argument("--highest_lr", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0, help="of start and search (%(default)s)")
    return parser


def parse_args(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    check_counts(parser, args, "trials", "search_steps", "steps")
    if not 0 < args.lowest_lr < args.highest_lr:
        parser.error(f"--lowest_lr {args.lowest_lr:g} must be above 0 and below --highest_lr {args.highest_lr:g}")
    return args, given_arguments(parser, argv)


def plot(function, ways, path):
    """Each optimizer's way over the function's contours."""
    from matplotlib.figure import Figure

    left, right, bottom, top = function.extent
    x, y, height = sample_heights(function, 250)
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
    args, given = parse_args(argv)
    torch.set_num_threads(1)  # two numbers at a time
    started = time.perf_counter()
    found, lines = [], [f"| function | optimizer | lr | distance after {args.search_steps} steps | after {args.steps} |",
                        "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for function in (FUNCTIONS[name] for name in args.functions):
        function, ways = moved(function, args.seed) if args.seed > 0 else function, {}
        for name in args.optim:
            lr = search_rate(
                function, name, args.search_steps, args.trials, lowest=args.lowest_lr, highest=args.highest_lr,
                seed=args.seed,
            )  # fmt: skip
            ways[name] = trajectory(function, name, lr, args.steps)
            near, last = (
                math.sqrt(squared_distance(function, ways[name][: n + 1])) for n in (args.search_steps, args.steps)
            )
            found.append({"function": function.name, "optimizer": name, "lr": lr, "distance_searched": near,
                          "distance": last, "last_point": ways[name][-1].tolist()})  # fmt: skip
            lines.append(f"| {function.name} | {name} | {lr:.3g} | {near:.2e} | {last:.2e} |")
            logger.info("%s, %s: lr %.3g, distance %.2e", function.name, name, lr, near)
        plot(function, ways, args.output_dir / f"{function.name}.png")
    record = make_record(
        script=__file__,
        arguments=given,
        task="functions",
        optimizer=", ".join(args.optim),
        metrics=compute_metrics(found) if len(args.optim) == 1 else {},
        config=vars(args),
        epochs=[],
        details=found,
        seed=args.seed,
        seconds=time.perf_counter() - started,
        device=torch.device("cpu"),
    )
    record.write(args.output_dir)
    write_text(args.output_dir / "table.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


def compute_metrics(found):
    """Distances at the end of one optimizer's ways: of each function, and their geometric mean."""
    distances = [row["distance"] for row in found]
    return {"distance": math.prod(distances) ** (1 / len(distances)),
            **{f"{row['function']}_distance": row["distance"] for row in found}}  # fmt: skip


if __name__ == "__main__":
    run_main(main)
