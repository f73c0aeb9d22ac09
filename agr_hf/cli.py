"""The command `agr-hf`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from agr_hf.version import __version__


def count(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be a whole number >= 1")
    return int(text)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="agr-hf", description="AGR and AdaL for the Hugging Face ecosystem.")
    top.add_argument("--version", action="version", version=f"agr-hf {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
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
    return top


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


def run_demo(arguments: argparse.Namespace) -> None:
    from agr_hf.experiments.demo import demo

    demo(arguments.output, seeds=arguments.seeds, epochs=arguments.epochs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 if it did what was asked, 1 with a sentence on stderr if it could not."""
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except ModuleNotFoundError as error:
        print(f"agr-hf: {error.name} is not installed; install it with: pip install 'agr-hf[train]'", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"agr-hf: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("agr-hf: stopped", file=sys.stderr)
        return 130
    return 0
