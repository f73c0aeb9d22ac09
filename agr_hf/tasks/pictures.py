"""Pictures in rows of a data set and in files: which column they are in, and how they are decoded."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def find_image_column(rows: Any) -> str | None:
    """`image` or `img`, else the first column of images of a data set, else of bytes; None where there is none."""
    import datasets

    typed = [column for column, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    encoded = [column for column, kind in rows.features.items() if _holds_bytes(kind)]
    named = [column for column in ("image", "img") if column in (*typed, *encoded)]
    return next(iter([*named, *typed, *encoded]), None)


def _holds_bytes(kind: Any) -> bool:
    """Of bytes, or of structs with bytes, which parquet files of images keep and `datasets` may not know as images."""
    return "bytes" in kind if isinstance(kind, dict) else getattr(kind, "dtype", "") in ("binary", "large_binary")


def find_label_column(rows: Any, wanted: str | None = None) -> str | None:
    """The column of the labels: `wanted`, else `label`, `labels` or `fine_label`; None where there is none."""
    return next((name for name in (wanted, "label", "labels", "fine_label") if name in rows.column_names), None)


def read_encoded(rows: Any, column: str) -> Iterator[bytes | Path | None]:
    """The encoded images of a column, or their files; None where a row has neither."""
    import datasets

    if isinstance(rows.features[column], datasets.Image):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    for row in rows.select_columns([column]):
        yield encoded_image(row[column])


def encoded_image(value: Any) -> bytes | Path | None:
    """The encoded image of a row, or its file, of bytes or a struct of bytes and path."""
    if not isinstance(value, Mapping):
        return value
    path = value.get("path")
    return value["bytes"] if value.get("bytes") is not None else None if path is None else Path(path)


def _opened(content: bytes | Path | None) -> Any:
    from PIL import Image

    if content is None:
        raise ValueError("the row has no image")
    return Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)


def read_size(content: bytes | Path | None) -> tuple[int, int]:
    """Width and height of an encoded image; raises as `open_image`."""
    with _opened(content) as file:
        return file.size


def open_image(content: bytes | Path | None) -> Any:
    """A decoded PIL image, of encoded bytes or a file; 16-bit and float greys (PNG, TIFF) from 0 to 255.

    Raises:
        OSError, SyntaxError, ValueError: it is no image, or its grey values are out of range.
    """
    with _opened(content) as file:
        file.load()
        return _eight_bits(file)


def _eight_bits(picture: Any) -> Any:
    """PIL alone would clip such grey values."""
    import numpy
    from PIL import Image

    if not picture.mode.startswith(("I", "F")):
        return picture
    values = numpy.asarray(picture).astype(numpy.float64)
    if picture.mode == "F":
        if not (numpy.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError("float grey values must lie between 0 and 1")
        return Image.fromarray((values * 255).round().astype(numpy.uint8))
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("integer grey values must lie between 0 and 65535")
    return Image.fromarray((values / 257).round().astype(numpy.uint8))


def warn_of_broken(broken: Sequence[str], total: int, what: str) -> None:
    """Name what could not be read."""
    if broken:
        names = ", ".join(broken[:5]) + (", ..." if len(broken) > 5 else "")
        logger.warning("%d of %d images of %s cannot be read and are left out: %s", len(broken), total, what, names)
