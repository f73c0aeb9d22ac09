"""Would AGR change anything for a model? Its effect on every layer's gradient, against the noise of the batches."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from agr_hf.environment import environment
from agr_hf.errors import UserError
from agr_hf.experiments.any_model import Batch, compute_loss, dataset_batches, load_model, random_batches
from agr_hf.files import replaced_file, write_text
from agr_hf.optim.param_groups import agr_param_groups
from agr_hf.optim.statistics import gradient_statistics

STEP_SIZE = 1e-3  # of the steps before the measurement, where layers have no gradient yet


@dataclass(frozen=True)
class Layer:
    """One layer that AGR applies to; medians over the batches.

    Attributes:
        name, numel: the parameter.
        effect: ||Psi(g) - g|| / ||g||.
        largest_share: the largest |g| / sum|g|.
        noise: root mean square distance of a batch's gradient from the mean of all, over the root mean square of its
            length: the difference between the gradients of two batches.
        zeros: fraction of elements that are exactly zero.
        log_std: standard deviation of ln|g| of the elements that are not; None where all are zero.
    """

    name: str
    numel: int
    effect: float
    largest_share: float
    noise: float
    zeros: float
    log_std: float | None

    @property
    def cells(self) -> list[str]:
        """Weights, effect, largest share, noise and zeros, as tables show them."""
        shares = [f"{self.effect:.1e}", f"{self.largest_share:.1e}", f"{self.noise:.2f}", f"{100 * self.zeros:.0f}%"]
        return [f"{self.numel:,}", *shares]


def measure(model: nn.Module, batches: Iterator[Batch], tick: Callable[[], object] = lambda: None) -> list[Layer]:
    """AGR's effect on each layer that `agr_param_groups` gives it, over some batches; the largest effect first.

    The mean gradient is kept in float32: memory for one more copy of these layers.

    Raises:
        ValueError: AGR applies to no layer, there is no batch, or no gradient arrives.
    """
    wanted = {p for group in agr_param_groups(model) if group["agr"] for p in group["params"]}
    named = {name: param for name, param in model.named_parameters() if param in wanted and param.requires_grad}
    if not named:
        raise UserError(f"{type(model).__name__} has no Linear or Conv layer that trains: AGR applies to nothing")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in named}
    means = {name: torch.zeros_like(param, dtype=torch.float32) for name, param in named.items()}
    squares = dict.fromkeys(named, 0.0)
    count = 0
    model.train()
    for batch in batches:
        model.zero_grad()
        compute_loss(model, batch).backward()
        count += 1
        grads = [(name, param.grad) for name, param in named.items() if param.grad is not None]
        for name, summary in gradient_statistics(grads).items():
            if name != "overall":
                found[name].append(summary.as_dict())
        for name, grad in grads:
            means[name] += grad
            squares[name] += float(grad.double().square().sum())
        tick()
    model.zero_grad()
    if not any(found.values()):
        raise UserError("no batch, or no layer got a gradient: there is nothing to measure")
    layers = []
    for name, rows in found.items():
        if rows:
            mean_square = squares[name] / count
            variance = max(mean_square - float((means[name] / count).double().square().sum()), 0.0)
            medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
            spreads = [row["log_std"] for row in rows if row["log_std"] == row["log_std"]]
            layers.append(
                Layer(
                    name=name,
                    numel=named[name].numel(),
                    noise=(variance / mean_square) ** 0.5 if mean_square else 0.0,
                    log_std=statistics.median(spreads) if spreads else None,
                    **{key: medians[key] for key in ("effect", "largest_share", "zeros")},
                )
            )
    return sorted(layers, key=lambda layer: -layer.effect)


def take_steps(model: nn.Module, batches: Iterator[Batch]) -> int:
    """Train on some batches, so that layers that stand behind a weight of zero get gradients. Returns the steps taken."""
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=STEP_SIZE)
    steps = 0
    for batch in batches:
        optimizer.zero_grad()
        compute_loss(model, batch).backward()
        optimizer.step()
        steps += 1
    return steps


def verdict(layers: list[Layer]) -> str:
    """The answer in two sentences, with the numbers that it rests on."""
    silent = [layer for layer in layers if layer.zeros == 1]
    layers = [layer for layer in layers if layer.zeros < 1]
    if not layers:
        return "Every layer's gradient is exactly zero: there is nothing for AGR to change."
    most, median = layers[0], statistics.median(layer.effect for layer in layers)
    ratios = [layer.effect / layer.noise for layer in layers if layer.noise]
    noticed = sum(layer.effect > 0.01 for layer in layers)
    text = (
        f"AGR takes {100 * median:.2g}% of the gradient's length in the median layer, at most {100 * most.effect:.2g}% "
        f"({most.name}, {most.numel:,} weights); {noticed} of {len(layers)} layers lose more than 1%."
    )
    if ratios:
        text += (
            f" In the median layer that is {statistics.median(ratios):.1e} of the difference between the gradients of two "
            "batches."
        )
    if silent:
        text += f" {len(silent)} more got a gradient of exactly zero, which AGR leaves alone; they are not counted."
    return text


def table(layers: list[Layer], rows: int) -> str:
    head = "| layer | weights | effect | largest share | batch noise | zeros | std of ln g |"
    lines = [head, "| --- " * 7 + "|"]
    for layer in layers[:rows]:
        spread = "" if layer.log_std is None else f"{layer.log_std:.2f}"
        lines.append(f"| {' | '.join([layer.name, *layer.cells, spread])} |")
    if len(layers) > rows:
        lines.append(f"| and {len(layers) - rows} more with less effect | | | | | | |")
    return "\n".join(lines)


def plot(layers: list[Layer], title: str, path: Path) -> None:
    """Effect and batch noise of each layer over its number of weights, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    numels = [layer.numel for layer in layers]
    shown = [layer for layer in layers if layer.effect > 0]
    axes.scatter(numels, [layer.noise for layer in layers], s=14, c="0.6", label="noise from batch to batch")
    axes.scatter([la.numel for la in shown], [la.effect for la in shown], s=18, label="AGR's effect, ‖Ψ(g) − g‖ / ‖g‖")
    axes.set(
        xscale="log", yscale="log", xlabel="weights of the layer", ylabel="share of the gradient's length", title=title
    )
    axes.legend()
    with replaced_file(path) as temporary:
        figure.savefig(temporary, dpi=120, metadata={"Software": "agr_hf"})


def inspect(
    name: str,
    output: Path,
    dataset: str | None = None,
    pretrained: bool = False,
    batch_size: int = 8,
    batches: int = 8,
    rows: int = 20,
) -> None:
    """Measure, print the verdict and the table, and write `inspect.md`, `inspect.json` and `inspect.png`.

    Args:
        name: see `load_model`.
        output: folder for the files.
        dataset: see `dataset_batches`; None takes random batches.
        pretrained: pretrained weights for a timm architecture.
        batch_size, batches: how much is measured. At least 2 batches for a noise.
        rows: layers in the printed table, those with the largest effect first; the JSON has all.
    """
    from tqdm.auto import tqdm

    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = load_model(name, pretrained)
    if dataset is None:
        draw, what = partial(random_batches, model, batch_size, batches), "random batches"
    else:
        draw = partial(dataset_batches, model, dataset, name, batch_size, batches)
        what = f"batches of {Path(dataset).name}"
    steps = 0
    with tqdm(total=batches, unit="batch", desc="inspect") as bar:
        layers = measure(model, draw(), bar.update)
        if any(layer.zeros == 1 for layer in layers):
            steps = take_steps(model, draw())
            bar.reset()
            layers = measure(model, draw(), bar.update)
    title = f"{Path(name).name}: {batches} {what} of {batch_size}"
    text = f"{title}\n\n{verdict(layers)}\n\n{table(layers, rows)}\n"
    if steps:
        text += (
            f"\nSome layers of the given weights got a gradient of exactly zero, as in new residual networks. Measured "
            f"after {steps} steps of AdamW.\n"
        )
    if dataset is None:
        text += "\nRandom batches have random labels; give a dataset for the gradients that training would see.\n"
    results = {"model": Path(name).name, "batches": what, "batch_size": batch_size, "count": batches, "steps_before": steps,
               "layers": [asdict(layer) for layer in layers], **environment()}  # fmt: skip
    write_text(output / "inspect.md", text)
    write_text(output / "inspect.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
    written = ["inspect.md", "inspect.json"]
    if find_spec("matplotlib") is not None:
        plot(layers, title, output / "inspect.png")
        written.append("inspect.png")
    print("\n" + text)
    print("Written to:")
    for file in written:
        print(f"  {output / file}")
    if len(written) == 2:
        print("There is no picture without matplotlib: pip install matplotlib")
