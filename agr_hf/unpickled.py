"""Nested Python values as JSON and named tensors, and back: what torch.save keeps, without pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agr_hf.files import replaced_file, write_text


def encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON of a value; its tensors and arrays go into `tensors` under names that begin with `name`.

    Tensors are copied to the CPU, and DTensors gathered, on every process that holds a part.

    Raises:
        TypeError: something is neither a tensor, an array, nor made of Python's plain types; the message names it.
    """
    if isinstance(value, Tensor):
        if hasattr(value, "full_tensor"):
            value = value.full_tensor()
        name = _free(name, tensors)
        tensors[name] = value.detach().cpu().contiguous().clone()  # one storage may be in several places
        return {"tensor": name}
    if type(value).__module__ == "numpy" and hasattr(value, "dtype"):
        if not value.ndim:
            return encode(value.item(), name, tensors)
        name = _free(name, tensors)
        tensors[name] = torch.from_numpy(value.copy())
        return {"array": name}
    if isinstance(value, dict):
        pairs = [[encode(k, "", {}), encode(v, f"{name}.{k}", tensors)] for k, v in value.items()]
        return {"dict": pairs}
    if isinstance(value, tuple):
        return {"tuple": [encode(entry, f"{name}.{i}", tensors) for i, entry in enumerate(value)]}
    if isinstance(value, list):
        return [encode(entry, f"{name}.{i}", tensors) for i, entry in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}, which cannot be written without pickle")


def _free(name: str, tensors: dict[str, Tensor]) -> str:
    """The name, or another one where it is taken: the keys "a.b" and "a" with "b" in it give the same."""
    return f"{name}#{len(tensors)}" if name in tensors else name


def decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value that `encode` was given.

    Raises:
        ValueError: it is not what `encode` makes, or a tensor is missing.
    """
    if isinstance(value, list):
        return [decode(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    try:
        ((kind, content),) = value.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "array":
            return tensors[content].numpy()
        if kind == "tuple":
            return tuple(decode(entry, tensors) for entry in content)
        if kind == "dict":
            return {decode(key, tensors): decode(entry, tensors) for key, entry in content}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a value written by agr_hf: {str(value)[:100]} ({error})") from None
    raise ValueError(f"not a value written by agr_hf: {str(value)[:100]}")


def save(value: Any, path: str | os.PathLike[str]) -> None:
    """Write a value as `{path}.json` and, where it has tensors, `{path}.safetensors`, each whole or not at all.

    Raises:
        TypeError: see `encode`.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    table = encode(value, "", tensors)
    if tensors:
        with replaced_file(f"{path}.safetensors") as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    write_text(f"{path}.json", json.dumps(table, allow_nan=True) + "\n")


def load(path: str | os.PathLike[str]) -> Any:
    """Read what `save` wrote; nothing is unpickled.

    Raises:
        OSError: a file is missing.
        ValueError: a file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as load_bytes

    tensors: dict[str, Tensor] = {}
    if Path(f"{path}.safetensors").exists():
        try:
            # Read and not mapped: the file may be replaced while the tensors live.
            tensors = load_bytes(Path(f"{path}.safetensors").read_bytes())
        except SafetensorError as error:
            raise ValueError(f"{path}.safetensors is damaged: {error}") from None
    return decode(json.loads(Path(f"{path}.json").read_text(encoding="utf-8")), tensors)
