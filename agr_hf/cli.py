"""The command `agr-hf`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agr_hf.errors import UserError, describe_missing
from agr_hf.version import __version__


def count(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be a whole number >= 1")
    return int(text)


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations: `--seed 2` would be `--seeds 2`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="agr-hf", description="AGR and AdaL for the Hugging Face ecosystem.")
    top.add_argument("--version", action="version", version=f"agr-hf {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    env = commands.add_parser(
        "env", help="versions, device, and what computes a step here: for bug reports and slow steps"
    )
    env.add_argument("--json", action="store_true", help="as JSON")
    env.set_defaults(run=run_env)
    demo = commands.add_parser("demo", help="train AdamW, AdamW(AGR) and AdaL side by side on real digits (minutes)")
    demo.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the results (%(default)s)")
    demo.add_argument("--seeds", type=count, default=3, help="seeds for each optimizer (%(default)s)")
    demo.add_argument("--epochs", type=count, default=20, help="passes over the training images (%(default)s)")
    demo.set_defaults(run=run_demo)
    inspect = commands.add_parser("inspect", help="would AGR change anything for a model? its effect on every layer")
    inspect.add_argument("model", help="a local folder, a timm architecture, or a Hub id")
    inspect.add_argument("--dataset", help="a parquet, JSON, CSV or text file, a folder of images, or a Hub id")
    inspect.add_argument("--pretrained", action="store_true", help="pretrained weights for a timm architecture")
    inspect.add_argument("--batch-size", type=count, default=8, help="examples in a batch (%(default)s)")
    inspect.add_argument("--batches", type=count, default=8, help="batches to measure (%(default)s)")
    inspect.add_argument("--rows", type=count, default=20, help="layers in the printed table (%(default)s)")
    inspect.add_argument(
        "--output", type=Path, default=Path("inspect-output"), help="folder for the files (%(default)s)"
    )
    inspect.set_defaults(run=run_inspect)
    app = commands.add_parser("app", help="trajectories, a model's layers and reports of comparisons in a browser")
    app.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path("."),
        help="with models and comparisons; no other files are read (.)",
    )
    app.add_argument("--port", type=count, help="of the server (the first free one from 7860 on)")
    app.set_defaults(run=run_app)
    card = commands.add_parser("card", help="write a run's model card and curves")
    card.add_argument("run_dir", type=Path, help="the --output_dir of a training script, with its results.json")
    card.add_argument("--repo-id", default="user/model", help="where it will be published (%(default)s)")
    card.add_argument("--output", type=Path, help="folder for README.md and curves.png (that of the run)")
    card.set_defaults(run=run_card)
    push = commands.add_parser("push", help="publish a run on the Hub, in one commit")
    push.add_argument("run_dir", type=Path, help="the --output_dir of a training script")
    push.add_argument("--repo-id", required=True, help="name, user/name or organisation/name; made if it is not there")
    push.add_argument("--private", action="store_true", default=None, help="where the repository is made")
    push.add_argument("--revision", help="a branch, made if it is not there (main)")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead of writing to the branch")
    push.add_argument(
        "--with-training-state", action="store_true", help="the newest checkpoint too, so others can resume"
    )
    push.add_argument("--message", help="first line of the commit")
    push.set_defaults(run=run_push)
    for name, run, text in (
        ("resume", run_resume, "train on from a run published with its training state"),
        ("reproduce", run_reproduce, "run a published run's command again, and compare"),
    ):
        again = commands.add_parser(name, help=text, usage=f"agr-hf {name} SOURCE [options] [-- ARGUMENT ...]")
        local = {"reproduce": ", or a run's folder", "resume": "; with --script also a run's folder"}
        again.add_argument("source", help="a repository on the Hub" + local[name])
        again.add_argument("--revision", help="branch, tag or commit (main)")
        again.add_argument(
            "--output-dir", type=Path, required=name == "reproduce",
            help="folder for the run" + " (with --script that of a run here)" * (name == "resume"),
        )  # fmt: skip
        if name == "resume":
            again.add_argument(
                "--script", type=Path, help="your own, of a run that is of none of agr_hf's scripts; it gets the arguments "
                "behind -- and no others",
            )  # fmt: skip
        again.epilog = "Behind -- come arguments for the script, which win over the published ones."
        again.set_defaults(run=run)
    script = commands.add_parser(
        "run",
        help="run a script of yours or of others that then knows --optim agr_adamw",
        usage="agr-hf run SCRIPT [ARGUMENT ...]  or  agr-hf run -m MODULE [ARGUMENT ...]",
        description="Behind launchers: torchrun -m agr_hf run SCRIPT ..., accelerate launch -m agr_hf run SCRIPT ...",
    )
    script.add_argument("-m", dest="as_module", action="store_true", help="the target is a module")
    script.add_argument("target", help="path of a script, or name of a module behind -m; what follows is its own")
    script.set_defaults(run=run_script)
    versus = commands.add_parser(
        "compare",
        help="does an optimizer help? paired seeds, intervals and a verdict",
        usage="agr-hf compare TASK --optim NAME NAME ... --seeds N --output DIR [options] [-- ARGUMENT ...]",
        epilog="Behind -- come arguments for the script. A comparison that was stopped goes on where it was; several "
        "commands with one --output share its runs.",
    )
    versus.add_argument(
        "task",
        help="images, albert, ddpm, or the path of a script that takes --optim, --seed and --output_dir: one with a Trainer "
        'as it is, another if it writes results.json with {"metrics": {...}} there',
    )
    versus.add_argument(
        "--optim", nargs="+", required=True, metavar="NAME",
        help="name and options, as agr_adamw,second_moment=regularized, or MODULE:CLASS of any package",
    )  # fmt: skip
    versus.add_argument("--seeds", type=count, required=True, help="seeds for each optimizer, counted from 0")
    versus.add_argument("--output", type=Path, required=True, help="folder of the comparison")
    versus.add_argument("--baseline", metavar="NAME", help="that others are compared with (the first of --optim)")
    versus.add_argument(
        "--set", action="append", default=[], metavar="ARGUMENT=VALUE,...", help="the whole comparison for each value"
    )
    versus.add_argument(
        "--margin", type=float, default=0.2,
        help="a difference that does not matter: points of metrics in percent, percent of the mean of others (%(default)s)",
    )  # fmt: skip
    versus.add_argument(
        "--search", action="append", default=[], metavar="ARGUMENT=LOW..HIGH",
        help="tune each optimizer first, with seeds of its own (learning_rate=1e-4..1e-2)",
    )  # fmt: skip
    versus.add_argument("--metric", help="of the script, which a search goes by (accuracy of images, loss of others)")
    versus.add_argument("--trials", type=count, help="of the search, for each optimizer")
    versus.add_argument("--workers", type=count, default=1, help="runs at a time (%(default)s)")
    versus.add_argument(
        "--storage", metavar="URL", help="database for workers on several machines, such as "
        "postgresql+psycopg2://user@host/name (trials.db under --output)",
    )  # fmt: skip
    versus.set_defaults(run=run_compare)
    reports = commands.add_parser("report", help="comparisons as one HTML page and as Markdown")
    reports.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="the --output of agr-hf compare")
    reports.add_argument("--output", type=Path,
                      help="folder for the files (the first DIR); in that of a run, push publishes them")  # fmt: skip
    reports.set_defaults(run=run_report)
    claim = commands.add_parser("claim", help="what the papers claim, and what was found")
    kinds = claim.add_subparsers(dest="kind", required=True, metavar="list|run")
    listed = kinds.add_parser("list", help="all claims as a table, with the verdicts of measurements")
    listed.add_argument(
        "--results", type=Path, default=Path("docs/claims"), help="a folder of measurements (%(default)s of the repository)"
    )  # fmt: skip
    listed.set_defaults(run=run_claim_list)
    measured = kinds.add_parser(
        "run", help="measure one", usage="agr-hf claim run NAME --size SIZE --output DIR [options] [-- ARGUMENT ...]"
    )
    measured.add_argument("name", help="of agr-hf claim list")
    measured.add_argument(
        "--size", choices=("small", "gpu", "published"), default="small",
        help="minutes to an hour on 2 cores, an hour on a GPU, or the paper's setting (%(default)s)",
    )  # fmt: skip
    measured.add_argument("--output", type=Path, default=Path("claims"), help="folder (%(default)s)")
    measured.add_argument("--seeds", type=count, help="in the place of the claim's number")
    measured.add_argument("--workers", type=count, default=1, help="runs at a time (%(default)s)")
    measured.set_defaults(run=run_claim)
    board = commands.add_parser("leaderboard", help="one table over runs, by task and optimizer")
    board.add_argument("runs", nargs="+", help="run folders, folders of them, or repositories on the Hub")
    board.set_defaults(run=run_leaderboard)
    return top


def run_env(arguments: argparse.Namespace) -> None:
    import json

    from agr_hf.environment import describe_backends, describe_instructions, environment, explain_slow_steps

    found = {**environment(), "backends": describe_backends(), "notes": explain_slow_steps()}
    found["instructions"] = describe_instructions()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    for package, version in found["versions"].items():
        print(f"{package:18} {version}")
    print(f"{'device':18} {found['device']} ({found['devices']}), {found['system']}")
    print(f"{'CPU':18} {found['cpu_cores']} cores, torch uses {found['torch_threads']} threads")
    for name, backend in found["backends"].items():
        if backend is True:
            print(f"{name:18} available" + (f" ({found['instructions']})" if name == "native" else ""))
        else:
            print(f"{name:18} not available: {backend['why']}; {backend['what_to_do']}")
    for note in found["notes"]:
        print(f"note: {note}")


def run_card(arguments: argparse.Namespace) -> None:
    import tempfile

    from agr_hf.files import replaced_file
    from agr_hf.hub.push import prepare

    folder = arguments.output or arguments.run_dir
    with tempfile.TemporaryDirectory() as temporary:
        contents = prepare(arguments.run_dir, arguments.repo_id, Path(temporary), needs_model=False)
        for name in ("README.md", "curves.png"):
            content = contents.get(name)
            if content is not None:
                with replaced_file(folder / name) as path:
                    path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
                print(folder / name)


def run_push(arguments: argparse.Namespace) -> None:
    from agr_hf.hub.push import push_run

    url = push_run(
        arguments.run_dir,
        arguments.repo_id,
        private=arguments.private,
        revision=arguments.revision,
        create_pr=arguments.create_pr,
        with_training_state=arguments.with_training_state,
        message=arguments.message,
    )
    print(url)


def run_resume(arguments: argparse.Namespace) -> None:
    from agr_hf.experiments.rerun import resume

    resume(
        arguments.source, arguments.output_dir, arguments.extra, script=arguments.script, revision=arguments.revision
    )


def run_reproduce(arguments: argparse.Namespace) -> None:
    from agr_hf.experiments.rerun import reproduce

    reproduce(arguments.source, arguments.output_dir, arguments.extra, revision=arguments.revision)


def run_compare(arguments: argparse.Namespace) -> None:
    from agr_hf.experiments.compare import compare
    from agr_hf.experiments.comparison import plan_comparison

    comparison = plan_comparison(
        arguments.task,
        arguments.optim,
        arguments.seeds,
        arguments.set,
        arguments.margin,
        arguments.baseline,
        arguments.extra,
        arguments.search,
        arguments.trials,
        arguments.metric,
    )
    compare(comparison, arguments.output, workers=arguments.workers, storage=arguments.storage)
    print("\n" + (arguments.output / "report.md").read_text(encoding="utf-8"))
    print(f"Written to {arguments.output}: comparison.json, report.html, report.md, runs/")


def run_report(arguments: argparse.Namespace) -> None:
    from agr_hf.experiments.report import write_reports

    for path in write_reports(arguments.folders, arguments.output):
        print(path)


def run_claim_list(arguments: argparse.Namespace) -> None:
    from agr_hf.experiments.claims import claims_table, criteria, read_claims

    found = read_claims(arguments.results)
    print(claims_table(found))
    if not found:
        print(
            f"\nThere are no measurements in {arguments.results}; those of the repository are in docs/claims (--results)"
        )
    print(f"\n{criteria()}")


def run_claim(arguments: argparse.Namespace) -> None:
    from agr_hf.experiments.claims import run_claim

    found = run_claim(
        arguments.name,
        arguments.size,
        arguments.output,
        seeds=arguments.seeds,
        workers=arguments.workers,
        arguments=arguments.extra,
    )
    print(f"{found['claim']}: {found['verdict']}. {found['effect']} (n = {found['n']})")
    print(f"Written to {arguments.output / arguments.name}.json")


def run_script(arguments: argparse.Namespace) -> None:
    from agr_hf.integrations.run import run

    run(arguments.target, arguments.extra, as_module=arguments.as_module)


def run_leaderboard(arguments: argparse.Namespace) -> None:
    from agr_hf.experiments.leaderboard import collect, leaderboard

    print(leaderboard(collect(arguments.runs)))


def run_inspect(arguments: argparse.Namespace) -> None:
    from agr_hf.experiments.inspect import inspect

    inspect(
        arguments.model,
        arguments.output,
        dataset=arguments.dataset,
        pretrained=arguments.pretrained,
        batch_size=arguments.batch_size,
        batches=arguments.batches,
        rows=arguments.rows,
    )


def run_app(arguments: argparse.Namespace) -> None:
    from agr_hf.experiments.app import run_app

    run_app(arguments.folder, arguments.port)


def run_demo(arguments: argparse.Namespace) -> None:
    from agr_hf.experiments.demo import demo

    demo(arguments.output, seeds=arguments.seeds, epochs=arguments.epochs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 if it did what was asked, 1 with a sentence on stderr if it could not."""
    argv = list(sys.argv[1:] if argv is None else argv)
    again = argv[:1] in (["resume"], ["reproduce"], ["compare"], ["claim"])
    own, extra = argv, []
    if argv[:1] == ["run"]:
        # All behind the target is the script's, --help too.
        end = 3 if argv[1:2] == ["-m"] else 2
        own, extra = argv[:end], argv[end:]
    elif again and "--" in argv:
        # argparse itself would look for what is behind -- among the positional arguments before the options.
        own, extra = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    arguments, rest = parser().parse_known_args(own)
    arguments.extra = extra
    if rest:
        hint = "; arguments for the training script come behind --" if again else ""
        parser().error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    if arguments.command == "run":
        arguments.run(arguments)  # what the script raises is not ours to put into words
        return 0
    try:
        arguments.run(arguments)
    except ModuleNotFoundError as error:
        missing = describe_missing(error)
        if missing is None:
            raise
        print(f"agr-hf: {missing}", file=sys.stderr)
        return 1
    except (UserError, OSError, RuntimeError) as error:
        print(f"agr-hf: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("agr-hf: stopped", file=sys.stderr)
        return 130
    return 0
