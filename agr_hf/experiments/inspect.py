"""Would AGR change anything for a model? Its effect on every layer's gradient, against the noise of the batches."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agr_hf.environment import environment
from agr_hf.errors import UserError
from agr_hf.files import replaced_file, write_text
from agr_hf.optim.param_groups import agr_param_groups
from agr_hf.optim.statistics import gradient_statistics
from agr_hf.tasks.images import open_image

Batch = dict[str, Tensor]
TEXT_LENGTH = 64
STEP_SIZE = 1e-3  # of the steps before the measurement, where layers have no gradient yet


@dataclass(frozen=True)
class Layer:
    """One layer that AGR applies to; medians over the batches.

    Attributes:
        name, numel: the parameter.
        effect: ||Psi(g) - g|| / ||g||.
        largest_share: the largest |g| / sum|g|.
        noise: root mean square distance of a batch's gradient from the mean of all, over the root mean square of its
            length: what one batch's gradient differs from the next's by anyway.
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


def load_model(
    name: str, pretrained: bool = False, *, safetensors_only: bool = False, max_parameters: float = float("inf")
) -> nn.Module:
    """A model by the name of a local folder, of timm, or of the Hub (in this order). Remote code is never run.

    Args:
        name: a folder that `save_pretrained` wrote, a timm architecture, or a Hub id.
        pretrained: whether a timm architecture comes with its pretrained weights instead of its own initialisation.
        safetensors_only: whether weights in another format are refused.
        max_parameters: a model with more is refused before its weights are loaded.

    Raises:
        ValueError: there is no such model, it has too many parameters, or it could not be loaded without a network.
    """
    import transformers

    # A folder of transformers' own needs no timm.
    if find_spec("timm") is not None:
        import timm

        from agr_hf.tasks.classifiers import register_small_image_models

        register_small_image_models()
        if not Path(name).is_dir() and timm.is_model(name):
            _check_size(name, lambda: timm.create_model(name), max_parameters)
            model: nn.Module = timm.create_model(name, pretrained=pretrained)
            return model
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        cls: Any = getattr(transformers, (config.architectures or [""])[0], None)
        if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
            cls = transformers.AutoModel
        _check_size(name, lambda: getattr(cls, "from_config", cls)(config), max_parameters)
        loaded: nn.Module = cls.from_pretrained(
            name, trust_remote_code=False, use_safetensors=True if safetensors_only else None
        )
    except UserError:
        raise
    except (OSError, ValueError, ImportError) as error:
        of_timm = "no architecture of timm" if find_spec("timm") else "timm is not installed (pip install timm)"
        raise UserError(
            f"{name!r} is no local folder with a model, {of_timm}, and it could not be loaded from the Hub "
            f"({str(error).splitlines()[0]})"
        ) from error
    return loaded


def _check_size(name: str, build: Callable[[], nn.Module], max_parameters: float) -> None:
    """Refuse a model that is too large, which is built without memory for its weights."""
    if max_parameters == float("inf"):
        return
    with torch.device("meta"):
        count = sum(param.numel() for param in build().parameters())
    if count > max_parameters:
        raise UserError(
            f"{name!r} has {count:,} parameters, and at most {max_parameters:,.0f} are allowed here; run agr-hf inspect"
        )


def random_batches(model: Any, batch_size: int, count: int) -> Iterator[Batch]:
    """Standard normal images or uniform tokens with uniform labels, of the shapes that the model's configuration names.

    Raises:
        ValueError: the model takes neither images nor tokens.
    """
    config = getattr(model, "config", None)
    for _ in range(count):
        if config is None:  # timm
            height_and_width = model.pretrained_cfg["input_size"]
            images = torch.randn(batch_size, *height_and_width)
            yield {"x": images, "labels": torch.randint(model.num_classes, (batch_size,))}
        elif getattr(model, "main_input_name", None) == "pixel_values":
            size = getattr(config, "image_size", 224)
            height, width = size if isinstance(size, (tuple, list)) else (size, size)
            shape = (getattr(config, "num_channels", 3), height, width)
            shape = (getattr(config, "pretrained_cfg", None) or {}).get("input_size", shape)  # timm's in transformers
            images = torch.randn(batch_size, *shape)
            yield {"pixel_values": images, "labels": torch.randint(config.num_labels, (batch_size,))}
        elif hasattr(config, "vocab_size"):
            length = min(TEXT_LENGTH, getattr(config, "max_position_embeddings", TEXT_LENGTH))
            yield {"input_ids": torch.randint(config.vocab_size, (batch_size, length))}
        else:
            raise UserError(
                f"{type(model).__name__} takes neither images nor tokens: no random batch can be made for it"
            )


def dataset_batches(model: nn.Module, source: str, name: str, batch_size: int, count: int) -> Iterator[Batch]:
    """Batches of a dataset: a parquet, JSON or text file, a folder of images, or a Hub id; its train split.

    Images need columns `image` and `label` (or `img`, `fine_label`), texts a column `text` and the model's tokenizer.

    Raises:
        ValueError: the dataset could not be loaded, or has none of these columns.
    """
    import datasets

    kinds = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".txt": "text", ".csv": "csv"}
    path = Path(source)
    if path.suffix in kinds and not path.exists():
        raise UserError(f"there is no file {source!r}")
    try:
        if path.is_file():
            rows = datasets.load_dataset(kinds.get(path.suffix, "text"), data_files=str(path), split="train")
        elif path.is_dir():
            rows = datasets.load_dataset("imagefolder", data_dir=str(path), split="train")
        else:
            rows = datasets.load_dataset(source, split="train")
    except Exception as error:
        raise UserError(f"the dataset {source!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    rows = rows.shuffle(seed=0).select(range(min(len(rows), batch_size * count)))
    image = next((column for column in ("image", "img") if column in rows.column_names), None)
    label = next((column for column in ("label", "labels", "fine_label") if column in rows.column_names), None)
    images = not hasattr(model, "config") or getattr(model, "main_input_name", None) == "pixel_values"
    if not (image and label if images else "text" in rows.column_names):
        raise UserError(
            f"the dataset {source!r} has the columns {', '.join(rows.column_names)}; this model takes "
            + ("image and label" if images else "text")
        )
    normalization = _normalization(model, name) if images else None
    for batch in rows.iter(batch_size):
        if normalization:
            # Parquet files of images keep the encoded bytes.
            pictures = [open_image(value["bytes"]) if isinstance(value, Mapping) else value for value in batch[image]]
            yield _image_batch(model, pictures, torch.tensor(batch[label]), *normalization)
        else:
            yield _text_batch(model, batch["text"], name)


def _normalization(model: Any, name: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of the channels that the model was trained with, where it says so."""
    from transformers import AutoImageProcessor

    try:
        if hasattr(model, "config"):
            processor: Any = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
            said = getattr(processor, "data_config", None) or {"mean": processor.image_mean, "std": processor.image_std}
        else:
            from timm.data import resolve_model_data_config

            said = resolve_model_data_config(model)
    except (OSError, ValueError, AttributeError, ImportError):
        said = {}
    mean, std = said.get("mean"), said.get("std")
    (example,) = random_batches(model, 1, 1)
    channels = example["x" if "x" in example else "pixel_values"].shape[1]
    if mean is None or std is None or not len(mean) == len(std) == channels:
        return [0.5] * channels, [0.25] * channels
    return mean, std


def _image_batch(model: Any, images: list[Any], labels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Batch:
    from torchvision.transforms import v2

    (example,) = random_batches(model, 1, 1)
    key = "x" if "x" in example else "pixel_values"
    channels, height, width = example[key].shape[1:]
    classes = model.num_classes if key == "x" else model.config.num_labels
    if int(labels.max()) >= classes:
        raise UserError(f"the dataset has a label {int(labels.max())}, but the model has {classes} classes")
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.Grayscale(channels) if channels == 1 else v2.RGB(),
            v2.Resize((height, width), antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
        ]
    )
    return {key: torch.stack([transform(image) for image in images]), "labels": labels}


def _text_batch(model: nn.Module, texts: list[str], name: str) -> Batch:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    encoded = tokenizer(
        [text for text in texts if text.strip()] or [" "],
        padding=True,
        truncation=True,
        max_length=TEXT_LENGTH,
        return_tensors="pt",
    )
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def compute_loss(model: Any, batch: Batch) -> Tensor:
    """The model's own loss; without one, cross-entropy of logits, or of tokens against themselves."""
    labels = batch.get("labels")
    if "x" in batch:
        return nn.functional.cross_entropy(model(batch["x"]), batch["labels"])
    if "input_ids" not in batch:
        output = model(**batch)
    else:
        classifies = type(model).__name__.endswith("ForSequenceClassification")
        if classifies:
            classes = model.config.num_labels
            labels = torch.randint(classes, (len(batch["input_ids"]),))
        else:
            labels = batch["input_ids"]
            if "attention_mask" in batch:
                labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
        extra = {"labels": labels}
        if type(model).__name__ == "AlbertForPreTraining":
            extra["sentence_order_label"] = torch.randint(2, (len(labels),))
        elif not type(model).__name__.endswith(("LM", "LMHeadModel", "ForPreTraining")) and not classifies:
            extra = {}  # a bare encoder
        output = model(**batch, **extra)
    loss: Tensor | None = getattr(output, "loss", None)
    return output[0].float().square().mean() if loss is None else loss


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
            f" Against what one batch's gradient differs from the next's by, that is {statistics.median(ratios):.1e} in the "
            "median layer."
        )
    if silent:
        text += f" {len(silent)} more got a gradient of exactly zero, which AGR leaves alone; they are not counted."
    return text


def table(layers: list[Layer], rows: int) -> str:
    head = "| layer | weights | effect | largest share | batch noise | zeros | std of ln g |"
    lines = [head, "| --- " * 7 + "|"]
    for layer in layers[:rows]:
        spread = "" if layer.log_std is None else f"{layer.log_std:.2f}"
        lines.append(
            f"| {layer.name} | {layer.numel:,} | {layer.effect:.1e} | {layer.largest_share:.1e} | {layer.noise:.2f} "
            f"| {100 * layer.zeros:.0f}% | {spread} |"
        )
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
    say: Callable[[str], None] = print,
) -> None:
    """Measure, print the verdict and the table, and write `inspect.md`, `inspect.json` and `inspect.png`.

    Args:
        name: see `load_model`.
        output: folder for the files.
        dataset: see `dataset_batches`; None takes random batches.
        pretrained: pretrained weights for a timm architecture.
        batch_size, batches: how much is measured. At least 2 batches for a noise.
        rows: layers in the printed table, those with the largest effect first; the JSON has all.
        say: takes the lines for the user.
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
    say("\n" + text)
    say("Written to:")
    for file in written:
        say(f"  {output / file}")
    if len(written) == 2:
        say("There is no picture without matplotlib: pip install matplotlib")
