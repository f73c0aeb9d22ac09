"""A model of anyone's, by name, with batches that it takes and the loss that it trains by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agr_hf.errors import UserError
from agr_hf.tasks.pictures import encoded_image, find_image_column, find_label_column, open_image

Batch = dict[str, Tensor]
TEXT_LENGTH = 64


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
            return timm.create_model(name, pretrained=pretrained)
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        cls: Any = getattr(transformers, (config.architectures or [""])[0], None)
        if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
            cls = transformers.AutoModel
        _check_size(name, lambda: getattr(cls, "from_config", cls)(config), max_parameters)
        return cls.from_pretrained(name, trust_remote_code=False, use_safetensors=True if safetensors_only else None)
    except UserError:
        raise
    except (OSError, ValueError, ImportError) as error:
        of_timm = "no architecture of timm" if find_spec("timm") else "timm is not installed (pip install timm)"
        raise UserError(
            f"{name!r} is no local folder with a model, {of_timm}, and it could not be loaded from the Hub "
            f"({str(error).splitlines()[0]})"
        ) from error


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


def dataset_batches(model: Any, source: str, name: str, batch_size: int, count: int) -> Iterator[Batch]:
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
    image, label = find_image_column(rows), find_label_column(rows)
    images = not hasattr(model, "config") or getattr(model, "main_input_name", None) == "pixel_values"
    if not (image and label if images else "text" in rows.column_names):
        raise UserError(
            f"the dataset {source!r} has the columns {', '.join(rows.column_names)}; this model takes "
            + ("image and label" if images else "text: rename the column that holds the texts")
        )
    key, transform = _image_input(model, name) if images else ("", None)
    for batch in rows.iter(batch_size):
        if transform is None:
            yield _text_batch(model, batch["text"], name)
            continue
        labels = torch.tensor(batch[label])
        classes = model.num_classes if key == "x" else model.config.num_labels
        if int(labels.max()) >= classes:
            raise UserError(f"the dataset has a label {int(labels.max())}, but the model has {classes} classes")
        # Parquet files of images keep the encoded bytes.
        pictures = [
            open_image(encoded_image(value)) if isinstance(value, (bytes, Mapping)) else value for value in batch[image]
        ]
        yield {key: torch.stack(list(map(transform, pictures))), "labels": labels}


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


def _image_input(model: Any, name: str) -> tuple[str, Callable[[Any], Tensor]]:
    """Name of a model's input, and what makes it of a picture."""
    from torchvision.transforms import v2

    (example,) = random_batches(model, 1, 1)
    key = "x" if "x" in example else "pixel_values"
    channels, height, width = example[key].shape[1:]
    return key, v2.Compose(
        [
            v2.ToImage(),
            v2.Grayscale(channels) if channels == 1 else v2.RGB(),
            v2.Resize((height, width), antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(*_normalization(model, name)),
        ]
    )


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
    if "x" in batch:
        return nn.functional.cross_entropy(model(batch["x"]), batch["labels"])
    name = type(model).__name__
    extra: dict[str, Tensor] = {}
    if "input_ids" in batch:
        tokens = batch["input_ids"]
        if name.endswith("ForSequenceClassification"):
            extra["labels"] = torch.randint(model.config.num_labels, (len(tokens),))
        elif name.endswith(("LM", "LMHeadModel", "ForPreTraining")):  # others are bare encoders
            mask = batch.get("attention_mask", torch.ones_like(tokens))
            extra["labels"] = tokens.masked_fill(mask == 0, -100)
        if name == "AlbertForPreTraining":
            extra["sentence_order_label"] = torch.randint(2, (len(tokens),))
    output = model(**batch, **extra)
    loss: Tensor | None = getattr(output, "loss", None)
    return output[0].float().square().mean() if loss is None else loss
