"""Images without labels, for models that draw them: from files, folders, parquet, the Hub, or scikit-learn's digits."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agr_hf.errors import UserError
from agr_hf.tasks.digits import load_digits
from agr_hf.tasks.images import hub_source
from agr_hf.tasks.pictures import find_image_column, open_image, read_encoded, warn_of_broken

logger = logging.getLogger(__name__)

IMAGE_FILES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def load_unlabelled_images(
    source: str | os.PathLike[str],
    *,
    size: int | None = None,
    channels: int | None = None,
    revision: str | None = None,
    max_images: int | None = None,
) -> Tensor:
    """Images without labels, decoded once into memory (CIFAR-10: 154 MB).

    Args:
        source: "digits" (scikit-learn's 1,797, no network), a .parquet file with a column of encoded images (`image`,
            `img`, or the first one of bytes), a folder with images at any depth, a name in `agr_hf.tasks.images.SOURCES`
            ("cifar10": uoft-cs/cifar10, pinned to a revision), or any other Hub id, of which the training split is taken.
        size: height and width; other images are cut to their central square and resized. Default: that of the first
            image, whose height and width must then be equal.
        channels: 1 (grey) or 3 (RGB). Default: that of the first image.
        revision: of a Hub id. Default: the pinned one of a name in SOURCES, or the newest.
        max_images: take the first ones only.

    Returns:
        (n, channels, size, size), uint8. Files that are no images are left out, counted and named in a warning.

    Raises:
        UserError: nothing is there, nothing can be decoded, there is no network; the message says what to pass.
    """
    if channels not in (None, 1, 3):
        raise UserError(
            f"channels={channels!r} is not allowed; it must be 1 (grey) or 3 (RGB), or None for the images' own"
        )
    if size is not None and size < 1:
        raise UserError(f"size={size} is not allowed; it must be at least 1, or None for the images' own")
    if max_images is not None and max_images < 1:
        raise UserError(f"max_images={max_images} is not allowed; it must be at least 1, or None for all")
    source = os.fspath(source)
    images: list[Tensor] = []
    broken = []
    rows = _encoded(source, revision)
    for name, content in rows:
        if max_images is not None and len(images) == max_images:
            break
        try:
            picture = _decoded(content, size, channels)
        except (OSError, SyntaxError, OverflowError, TypeError, ValueError) as error:
            broken.append(f"{name} ({type(error).__name__})")
            continue
        if not images:
            channels, height, width = picture.shape
            if height != width:
                raise UserError(f"{name} of {source} is {width}x{height} and not square; pass size (--resolution)")
            size = height
        images.append(picture)
    warn_of_broken(broken, len(broken) + len(images), source)
    if not images:
        raise UserError(f"{source} has no image that can be read; pass another file, folder or Hub id, or 'digits'")
    return torch.stack(images)


def _encoded(source: str, revision: str | None) -> Iterator[tuple[str, Any]]:
    """Names and encoded bytes (or tensors) of the images of a source."""
    path = Path(source)
    if source == "digits":
        for name, part in load_digits().items():
            yield from ((f"{name} {i}", image) for i, image in enumerate(part.encoded))
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_FILES)
        yield from ((file.relative_to(path).as_posix(), file) for file in files)
    else:
        rows = _open_parquet(path) if path.suffix == ".parquet" else _load_from_hub(source, revision)
        column = find_image_column(rows)
        if column is None:
            raise UserError(
                f"{source!r} has no column of encoded images (bytes, or a struct with bytes); its columns are "
                f"{', '.join(rows.column_names)}"
            )
        yield from ((f"row {i}", content) for i, content in enumerate(read_encoded(rows, column)))


def _open_parquet(path: Path) -> Any:
    import datasets

    try:
        return datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a parquet file: {error}") from error


def _load_from_hub(source: str, revision: str | None) -> Any:
    import datasets

    hub_id, revision = hub_source(source, revision) or (source, None)
    try:
        return datasets.load_dataset(hub_id, split="train", revision=revision)
    except Exception as error:  # whatever datasets, the Hub's client or the network raise
        raise UserError(
            f"the images {source!r} could not be loaded: there is no such file or folder, and the Hub answers: "
            f"{(str(error) or type(error).__name__).splitlines()[0]} Without a network, pass --train_data with a parquet "
            "file or a folder of images, or --dataset_name digits"
        ) from error


def _decoded(content: Any, size: int | None, channels: int | None) -> Tensor:
    """(channels, size, size), uint8, of a tensor, bytes or a file."""
    from PIL import Image, ImageOps
    from torchvision.transforms.v2.functional import pil_to_tensor

    picture = Image.fromarray(content[0].numpy()) if isinstance(content, Tensor) else open_image(content)
    grey = channels == 1 or (channels is None and picture.mode in ("1", "L", "LA"))
    picture = picture.convert("L" if grey else "RGB")
    if size is not None and picture.size != (size, size):
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
    return pil_to_tensor(picture).contiguous()
