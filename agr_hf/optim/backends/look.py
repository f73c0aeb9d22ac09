"""How a step looks at its tensors: whether they are of the kind that its plan was made for, and where their memory is.

The extension does it in C (look.h), through torch's functions for C; Python does it elsewhere.
"""

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    from agr_hf.optim.backends import _native  # type: ignore[attr-defined]
except ImportError as error:
    _native, WHY_NOT = None, str(error)
else:
    WHY_NOT = ""

TYPES = (Tensor, torch.nn.Parameter)  # a subclass may have no memory of its own


def read_look(tensor: Any) -> tuple[torch.dtype, torch.Size, tuple[int, ...]]:
    """What makes a tensor another kind of tensor to a backend."""
    return tensor.dtype, tensor.shape, tensor.stride()


def read_grads_in_python(params: list[Tensor]) -> tuple[list[Tensor | None], bool]:
    """The gradient of each parameter, and whether all of these tensors have memory of their own."""
    grads = [param.grad for param in params]
    return grads, {*map(type, params), *map(type, grads)} <= {*TYPES, type(None)}


def describe_in_python(tensors: Sequence[Any]) -> Any:
    """What `look` compares tensors with."""
    return [(type(tensor) in TYPES and not tensor.is_neg(), tensor.device, *read_look(tensor)) for tensor in tensors]


def look_in_python(
    params: list[Any],
    grads: list[Any],
    states: list[dict[str, Any]],
    keys: tuple[str, ...],
    columns: list[tuple[str, list[Tensor], int, int]],
    kept: Any,
    addresses: "array[int]",
) -> int:
    """Read the addresses of a step's tensors.

    Args:
        params, grads, states: of each row; a gradient may be None.
        keys: which tensors of the state.
        columns: numbers of the rows, each with its key, the views that the states must hold, and the address and the size
            in bytes of the first.
        kept: what `describe` gave of a param, a grad and the state's tensors, row after row.
        addresses: written, a column of each kind: 0 where there is no gradient, 1 where there are no elements.

    Returns:
        How many rows have a gradient; -1 where a tensor is of another kind than its description.
    """
    table = [params, grads, *[[state.get(key) for state in states] for key in keys]]
    for k, column in enumerate(table):
        for i, tensor in enumerate(column):
            address = 0
            if tensor is not None or k != 1:
                if tensor is None or [kept[i * len(table) + k]] != describe_in_python([tensor]):
                    return -1
                address = tensor.data_ptr() if tensor.numel() else 1
                if not address:
                    return -1  # torch takes it for zero, and has no memory for it
            addresses[k * len(params) + i] = address
    for key, views, first, size in columns:
        for i, (state, view) in enumerate(zip(states, views, strict=True)):
            if state.get(key) is not view or view.data_ptr() != first + i * size:
                return -1
    return sum(grad is not None for grad in grads)


def find_torch() -> Path | None:
    """The library of torch that has its functions for C."""
    return next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"), None)


def use_torch() -> bool:
    """Whether the extension can look at tensors: it learns from one where an object of Python has its tensor, and must read
    the same of it as Python does."""
    if _native is None:
        return False
    tensor, library = torch.empty(3, 5, device="cpu")[1:, 1:], find_torch()
    if library is None or not _native.use_torch(str(library), *TYPES, tensor, tensor._cdata):
        return False
    kept, addresses = _native.describe([tensor, tensor]), array("q", [0, 0])
    return (
        array("q", kept)[-4:].tolist() == [*tensor.shape, *tensor.stride()]
        and _native.look([tensor], [tensor], [{}], (), [], kept, addresses) == 1
        and addresses.tolist() == [tensor.data_ptr()] * 2
    )


if use_torch():
    read_grads, describe, look = _native.read_grads, _native.describe, _native.look
else:
    read_grads, describe, look = read_grads_in_python, describe_in_python, look_in_python
