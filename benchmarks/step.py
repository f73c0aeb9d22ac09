"""What an optimizer's step costs: time, bandwidth, Python's part and memory, beside other packages' optimizers.

    python benchmarks/step.py [--quick] [--models NAME ...] [--contestants NAME ...] [--rounds N] [--threads N] [--out FILE]

Contestants and lists of parameters are in contestants.py, the measuring in measure.py, training runs in training.py.

Each contestant is timed in rounds of one step each together with torch's fused AdamW, and with a second rival where it
has one. Gradients are new tensors at other addresses in every step. The columns:

    ms        median of the rounds
    x fused   median over the rounds of the time, divided by that of torch's fused AdamW in the same round
    x rival   the same for the rival: `clip_grad_norm_` and torch's fused AdamW, or timm's Adan
    % pass    least bytes that the rule must read and write (contestants.py), divided by the time, as a share of the rate at
              which a large tensor is changed in place in the same run (the JSON has the rate of a copy too); what fits the
              cache can be above 100
    call ms   a step on as many tensors of two elements each: Python, dispatch and entry into the kernels
    extra MiB peak memory of the third step beyond what it found
    budget    the ratio to stay below, to the rival where there is one, and whether it does

All parameters are in one group, so AGR works on every tensor of two dimensions or more. Lists whose name is a number are
tensors of a million elements, for the curve of cost against size.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from contestants import CONTESTANTS, MODELS, QUICK_MODELS, REFERENCE, TRAINER_BUDGET, memory_budget, step_budget
from measure import LEAST_ROUNDS, compare, merge_reference
from picture import draw

from agr_hf.environment import environment
from agr_hf.files import write_text

PARTS = ("shares", "trainer")  # beside the models: parts of training.py
RESULTS = Path(__file__).parent / "results"
HEADER = f"{'':31} {'ms':>9} {'x fused':>8} {'x rival':>8} {'% pass':>7} {'call ms':>8} {'extra MiB':>10}  budget"


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*MODELS, *PARTS]
    parser.add_argument("--models", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)} (all)")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, metavar="NAME",
                        help=f"of {', '.join(CONTESTANTS)}; by default some run on a few models only")  # fmt: skip
    parser.add_argument("--rounds", type=int, help="of a comparison, at most (51; 25 with --quick)")
    parser.add_argument(
        "--seconds", type=float, help=f"of a comparison; {LEAST_ROUNDS} rounds are taken all the same (4; 2)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a subset, in about two minutes")
    parser.add_argument("--out", type=Path, help="the JSON; a picture is written beside it. By default a complete run goes "
                        "to benchmarks/results, and others are not written")  # fmt: skip
    arguments = parser.parse_args(argv)
    complete = not (arguments.quick or arguments.models or arguments.contestants)
    if complete and not arguments.out:
        threads = f"-{arguments.threads}-threads" if arguments.device == "cpu" else ""
        arguments.out = RESULTS / f"step-{arguments.device}{threads}.json"
    if not arguments.models:
        arguments.models = [*QUICK_MODELS, "trainer"] if arguments.quick else names
    arguments.rounds = arguments.rounds or (25 if arguments.quick else 51)
    arguments.seconds = arguments.seconds or (2.0 if arguments.quick else 4.0)
    return arguments


def choose_contestants(model, names, quick):
    """Those that run on a model: the named ones, or else those of its groups."""
    groups = set(model.groups) & {"core", "main"} if quick else model.groups
    return [c for c in CONTESTANTS.values() if (c.name in names if names else c.group in groups)]


def plan_comparisons(contestants):
    """Who is measured together: the reference, the rival where there is one, and a contestant."""
    rivals = {c.against for c in contestants}
    own = [c for c in contestants if c.name not in (REFERENCE, *rivals)] or [CONTESTANTS[REFERENCE]]
    together = [[REFERENCE, *([c.against] if c.against else []), c.name] for c in own]
    return [[CONTESTANTS[name] for name in dict.fromkeys(names)] for names in together]


def measure_model(model, contestants, arguments):
    """A row for each contestant, in the order of the contestants."""
    shapes = model.shapes()
    numel = sum(math.prod(shape) for shape in shapes)
    print(f"\n{model.name}: {numel:,} float32 parameters in {len(shapes)} tensors", flush=True)
    rows = [row for comparison in plan_comparisons(contestants) for row in compare(comparison, shapes, arguments)]
    reference_rows = [row for row in rows if row["contestant"] == REFERENCE]
    rows = [merge_reference(reference_rows), *(row for row in rows if row["contestant"] != REFERENCE)]
    for row in rows:
        row.update({"model": model.name, "parameters": numel, "tensors": len(shapes)})
        add_budgets(row, model, arguments.device)
    rows.sort(key=lambda row: list(CONTESTANTS).index(row["contestant"]))
    print_rows(rows)
    return rows


def add_budgets(row, model, device):
    if row["status"] != "measured":
        return
    contestant = CONTESTANTS[row["contestant"]]
    budget = step_budget(contestant.name, model, device)
    if contestant.against and row["against"] is None:
        budget = None  # the rival could not be measured
    if budget is not None:
        ratio = row["ratio_against"] if contestant.against else row["ratio"]
        row.update({"budget": budget, "within_budget": ratio <= budget})
    if contestant.ours and row["extra_memory_mib"] is not None:
        limit = memory_budget(row["parameters"]) / 2**20
        row.update({"memory_budget_mib": limit, "within_memory_budget": row["extra_memory_mib"] <= limit})


def print_rows(rows):
    for row in rows:
        if row["status"] == "measured":
            cells = [f"{row['milliseconds']:9.3f}", f"{row['ratio']:8.2f}", show(row["ratio_against"], 8, 2),
                     f"{100 * row['bandwidth_share']:7.0f}", show(row["call_milliseconds"], 8, 3),
                     show(row["extra_memory_mib"], 10, 1)]  # fmt: skip
            print(f"{row['contestant']:31} {' '.join(cells)}  {describe_budget(row)}".rstrip())
    for status in dict.fromkeys(row["status"] for row in rows if row["status"] != "measured"):
        print(f"  {status}: {', '.join(row['contestant'] for row in rows if row['status'] == status)}")
    sys.stdout.flush()


def show(value, width, digits):
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def describe_budget(row):
    words = [f"{row['budget']:.2f} {say_whether(row['within_budget'])}"] if "budget" in row else []
    if CONTESTANTS[row["contestant"]].compiles:
        words.append(f"first step {row['first_step_seconds']:.0f} s")
    if not row.get("within_memory_budget", True):
        words.append(f"memory {row['memory_budget_mib']:.0f} MiB missed")
    return ", ".join(words)


def say_whether(within):
    return "ok" if within else "missed"


def measure_training(arguments):
    """The results of training.py, which needs transformers and torchvision."""
    results = {"shares": [], "trainer": None}
    if not set(PARTS) & set(arguments.models):
        return results
    import training

    if "shares" in arguments.models:
        results["shares"] = training.measure_shares(min(arguments.rounds, 7), arguments.device)
        print(f"\n{'share of a training step':31} {'step ms':>9} {'all ms':>9} {'share %':>8}")
        for row in results["shares"]:
            if row["contestant"] == REFERENCE:
                print(row["workload"])
            print(f"{row['contestant']:31} {row['milliseconds']:9.1f} {row['milliseconds_of_all']:9.1f} "
                  f"{100 * row['share']:8.1f}")  # fmt: skip
    if "trainer" in arguments.models:
        runs, steps = (2, 4) if arguments.quick else (3, 8)
        row = results["trainer"] = training.measure_trainer(runs, steps, arguments.device)
        row.update({"budget": TRAINER_BUDGET, "within_budget": row["ratio"] <= TRAINER_BUDGET})
        print(f"\nclipping and step in Trainer ({row['workload']})")
        for name, milliseconds in row["milliseconds"].items():
            ratio = row["ratio"] if name != training.TRAINER_NAMES[0] else 1.0
            print(f"{name:31} {milliseconds:9.1f} {ratio:8.2f}")
        print(f"budget {row['budget']:.2f}: {say_whether(row['within_budget'])}")
    return results


def find_versions():
    """Of the contestants' packages that are installed."""
    packages = {c.package for c in CONTESTANTS.values() if c.package and c.is_installed()}
    return {package: version(package) for package in sorted(packages)}


def main(argv=None):
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # for what brings an OpenMP library of its own
    os.environ.setdefault("DS_ACCELERATOR", arguments.device)  # DeepSpeed warns on stdout where it has to guess
    conditions = environment(torch.device(arguments.device))
    conditions["versions"].update(find_versions())
    versions = conditions["versions"]
    print(f"{arguments.device}: {conditions['device']}, {arguments.threads} threads, torch {versions['torch']}, "
          f"at most {arguments.rounds} rounds or {arguments.seconds:g} s a comparison")  # fmt: skip
    print(HEADER)
    rows = []
    for name in arguments.models:
        if name in MODELS:
            contestants = choose_contestants(MODELS[name], arguments.contestants, arguments.quick)
            rows += measure_model(MODELS[name], contestants, arguments)
    results = {
        **conditions,
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "bytes_per_element": {c.name: c.bytes for c in CONTESTANTS.values()},
        "rows": rows,
        **measure_training(arguments),
    }
    missed = sum(not row.get(key, True) for row in rows for key in ("within_budget", "within_memory_budget"))
    missed += results["trainer"] is not None and not results["trainer"]["within_budget"]
    print(f"\nbudgets missed: {missed}")
    if arguments.out:
        write_text(arguments.out, json.dumps(results, indent=2) + "\n")
        picture = arguments.out.with_suffix(".png")
        draw(results, picture)
        print(f"written to {arguments.out} and {picture}")


if __name__ == "__main__":
    main()
