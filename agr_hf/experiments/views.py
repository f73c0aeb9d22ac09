"""What `agr-hf app` shows, as HTML: trajectories, AGR's effect on a model's layers, and reports of comparisons.

What a visitor enters is a stranger's: models are loaded without remote code and from safetensors only, and files are read
below one folder only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from html import escape
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from agr_hf.errors import UserError
from agr_hf.experiments import charts
from agr_hf.experiments.any_model import Batch, load_model, random_batches
from agr_hf.experiments.inspect import measure, verdict
from agr_hf.experiments.report import html_report, read_comparison
from agr_hf.optim.registry import create_optimizer, optimizer_info
from agr_hf.tasks.functions import FUNCTIONS, TestFunction, sample_heights, squared_distance, trajectory

DEPTH = 3  # folders below the one that is given in which models and comparisons are looked for
ROWS = 4  # optimizers in a picture
MAX_STEPS = 1000
MAX_BATCHES, MAX_BATCH_SIZE = 16, 16
MAX_PARAMETERS = 200_000_000  # 2.4 GB for weights, gradients and their mean
SHOWN_LAYERS = 20
SECONDS = 5.0  # of the animation
DEMO_MODEL = "a small ViT on digits"
# A name of timm, or an id of the Hub.
MODEL_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


# ------------------------------------------------------------------------------------------------ trajectories


def show_trajectories(
    function_name: str, rows: Sequence[tuple[str | None, float | None]], steps: float, animated: bool = True
) -> str:
    """HTML: the trajectories of optimizers over a function's contour lines, and how near they end to the minimum.

    Args:
        function_name: one of `FUNCTIONS`.
        rows: names and learning rates of optimizers; rows without a name are left out.
        steps: of each optimizer, 1 to 1,000.
        animated: whether the lines appear step by step.

    Raises:
        UserError: an input is not allowed, or no optimizer is given.
    """
    if function_name not in FUNCTIONS:
        raise UserError(f"there is no function {function_name!r}; choose one of {', '.join(FUNCTIONS)}")
    if not 1 <= steps <= MAX_STEPS:
        raise UserError(f"{steps:g} steps are not allowed; choose 1 to {MAX_STEPS:,} steps")
    chosen = [(optimizer_info(name).title, name, rate) for name, rate in rows if name]
    if not chosen:
        raise UserError("no optimizer is chosen; choose one in at least one row")
    for title, _, rate in chosen:
        if rate is None or not 0 < rate <= 100:
            given = "no learning rate" if rate is None else f"the learning rate {rate:g}"
            raise UserError(f"{title} has {given}; give a number above 0 and at most 100")
    function = FUNCTIONS[function_name]
    drawn, lines = [], []
    for index, (title, name, rate) in enumerate(chosen):
        points = trajectory(function, name, float(rate or 0), int(steps))
        pairs: list[list[float]] = points.tolist()
        finite = [(x, y) for x, y in takewhile(lambda pair: all(map(math.isfinite, pair)), pairs)]
        distance = math.sqrt(squared_distance(function, points))
        drawn.append(charts.Trajectory(f"{title}, learning rate {rate:g}", finite))
        end = f"{distance:.2g}" if math.isfinite(distance) else "diverged"
        lines.append([f"{charts.draw_marker(index)} {escape(title)}", f"{rate:g}", end])
    picture = charts.draw_trajectories(
        _contour_lines(function), drawn, function.minimum, function.extent,
        f"{function_name}, {steps:g} steps", SECONDS if animated else 0.0,
    )  # fmt: skip
    caption = f"<caption>Distance to the minimum after {steps:g} steps</caption>"
    table = _draw_table(["optimizer", "learning rate", "distance"], lines, caption)
    note = (
        '<p class="soft">The cross is the minimum. The gradient is clipped to norm 1 in each step. AGR applies to the point '
        "itself here, which has two elements only: it takes a far larger share than from a weight matrix.</p>"
    )
    return f'<div class="agr-chart"><figure>{picture}</figure>{table}{note}</div>'


@lru_cache
def _contour_lines(function: TestFunction) -> list[list[tuple[float, float]]]:
    from contourpy import contour_generator

    x, y, heights = (values.numpy() for values in sample_heights(function, 150))
    generator: Any = contour_generator(x, y, heights)
    levels = numpy.quantile(heights, numpy.linspace(0.04, 0.96, 10))
    return [[(float(a), float(b)) for a, b in line] for level in levels for line in generator.lines(level)]


# ------------------------------------------------------------------------------------------------ layers


def find_models(root: Path) -> list[str]:
    """Folders below `root`, relative to it, in which `save_pretrained` has written safetensors."""
    return [name for name in _find(root, "config.json") if any((root / name).glob("*.safetensors"))]


def show_layers(
    root: Path, name: str, batches: float = 8, batch_size: float = 8, tick: Callable[[], object] = lambda: None
) -> str:
    """HTML: AGR's effect on each layer of a model, against the noise of the batches.

    Args:
        root: the folder below which models are read.
        name: `DEMO_MODEL`, one of `find_models(root)`, a timm architecture, or a Hub id.
        batches, batch_size: how much is measured.
        tick: is called after each batch.

    Raises:
        UserError: an input is not allowed, or the model could not be loaded or measured.
    """
    if not 2 <= batches <= MAX_BATCHES:
        raise UserError(f"{batches:g} batches are not allowed; choose 2 to {MAX_BATCHES}")
    if not 1 <= batch_size <= MAX_BATCH_SIZE:
        raise UserError(f"batches of {batch_size:g} are not allowed; choose 1 to {MAX_BATCH_SIZE} examples")
    count, size = int(batches), int(batch_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _trained_demo_model() if name == DEMO_MODEL else _load_model(root, name)
        torch.manual_seed(0)  # the same batches, whether the model was kept or not
        if name == DEMO_MODEL:
            source, what = _digit_batches(size, count), "batches of digits"
        else:
            source, what = random_batches(model, size, count), "random batches"
        layers = measure(model, source, tick)
    shown = [charts.Shares(f"{la.name} ({la.numel:,})", la.effect, la.noise) for la in layers[:SHOWN_LAYERS]]
    title = f"{count} {what} of {size}"
    parts = [
        f"<p>{escape(verdict(layers))}</p>",
        '<p class="soft">Dot: the share of the gradient that AGR takes away, ‖Ψ(g) − g‖ / ‖g‖. Bar: how much the gradient '
        f"of one batch differs from the mean of all. Medians of {title}"
        + (f"; the {SHOWN_LAYERS} layers with the largest effect." if len(layers) > SHOWN_LAYERS else ".")
        + "</p>",
        f"<figure>{charts.draw_shares(shown, title)}</figure>",
        _draw_table(
            ["layer", "weights", "effect", "largest share", "noise", "zeros"],
            [[f"<code>{escape(layer.name)}</code>", *layer.cells] for layer in layers],
        ),
    ]
    if name != DEMO_MODEL:
        parts.append(
            '<p class="soft">Random batches have random labels. For the gradients of training, run '
            "<code>agr-hf inspect MODEL --dataset FILE</code>.</p>"
        )
    return f'<div class="agr-chart">{"".join(parts)}</div>'


def _load_model(root: Path, name: str) -> nn.Module:
    """A model below `root` or one of timm or the Hub; no other local folder."""
    if name in find_models(root):
        name = str(_inside(root, name))
    elif not MODEL_NAME.fullmatch(name) or Path(name).exists():
        raise UserError(
            f"{name!r} is not allowed; choose a model from the list, or enter an architecture of timm or a Hub id"
        )
    return load_model(name, safetensors_only=True, max_parameters=MAX_PARAMETERS)


@lru_cache(maxsize=1)
def _trained_demo_model() -> nn.Module:
    """The demo's network after one pass over the digits: gradients of a new network say little."""
    from agr_hf.tasks.classifiers import classifier

    model = classifier("vit-micro", 8, 1, [str(digit) for digit in range(10)], (), ())
    optimizer = create_optimizer("agr_adamw", model, lr=2e-3)
    for batch in _digit_batches(64, 16):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model


def _digit_batches(batch_size: int, count: int) -> Iterator[Batch]:
    from agr_hf.tasks.digits import load_digits

    data = load_digits()["train"]
    for rows in torch.randperm(len(data))[: batch_size * count].split(batch_size):
        yield {"pixel_values": data.pixel_values[rows], "labels": data.labels[rows]}


# ------------------------------------------------------------------------------------------------ reports


def find_comparisons(root: Path) -> list[str]:
    """Folders below `root`, relative to it, with a `comparison.json` of `agr-hf compare`."""
    return _find(root, "comparison.json")


def show_report(root: Path, name: str | None) -> str:
    """HTML: the report of a comparison, in a frame that runs no script.

    Args:
        root: the folder below which comparisons are read.
        name: one of `find_comparisons(root)`.

    Raises:
        UserError: there is no such comparison, or it is not complete.
    """
    if name not in find_comparisons(root):
        raise UserError(f"there is no comparison {name!r} below the folder of the app; choose one from the list")
    folder = _inside(root, name)
    for path in folder.rglob("*"):
        if path.is_symlink():
            _inside(root, str(path.relative_to(root.resolve())))
    page = html_report([read_comparison(folder)])
    frame = f'<iframe sandbox="" title="report of {escape(name)}" srcdoc="{escape(page)}"></iframe>'
    return f'<div class="agr-chart">{frame}</div>'


# ------------------------------------------------------------------------------------------------ tables and files


def _draw_table(heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table of HTML cells: the first of a row is its name, the others are numbers."""
    columns = "".join(f'<th scope="col" class="number">{head}</th>' for head in heads[1:])
    lines = [
        f'<tr><th scope="row">{name}</th>' + "".join(f'<td class="number">{cell}</td>' for cell in cells) + "</tr>"
        for name, *cells in rows
    ]
    return (
        f'<div class="scroll"><table>{caption}<thead><tr><th scope="col">{heads[0]}</th>{columns}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _find(root: Path, file: str) -> list[str]:
    """Folders at most `DEPTH` below `root` that hold a file and are not hidden; "." is `root` itself."""
    found = []
    for depth in range(DEPTH + 1):
        for path in sorted(root.glob("/".join(["*"] * depth + [file]))):
            name = path.parent.relative_to(root)
            inside = path.resolve().is_relative_to(root.resolve())
            if inside and not any(part.startswith(".") for part in name.parts):
                found.append(name.as_posix())
    return found


def _inside(root: Path, name: str) -> Path:
    """The path of a name below `root`; a UserError for one that leads out of it."""
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise UserError(f"{name!r} leads out of the folder of the app; only files below that folder are read")
    return path
