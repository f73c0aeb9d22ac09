"""The one reduction: sum|g| of each gradient, whole or sharded."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from agr_hf.optim.backends import multi_tensor
from agr_hf.optim.layout import Layout
from agr_hf.optim.shards import Scalar, add_over_shards, local, reduced

# Elements of a block on the CPU: 1 MiB of float32, which stays in the second-level cache.
BLOCK = 262_144


def l1_norms(grads: Iterable[Tensor]) -> list[Tensor]:
    """Sum of magnitudes of each tensor, the S of AGR (arXiv 2407.16944, eq. 2) and of AdaL (arXiv 2107.01525, alg. 1).

    Args:
        grads: dense real tensors of any shape, dtype and device. A DTensor counts as the whole tensor: the shards'
            sums meet in one all-reduce for each device mesh dimension that shards anything, however many tensors.

    Returns:
        One 0-dim tensor for each gradient, on its device; float32, or float64 for float64 gradients. A DTensor's is a
        plain tensor, the same on every rank. Nothing is read back to the host from a GPU.

    Raises:
        TypeError: a gradient is complex, sparse or not a tensor.
    """
    if isinstance(grads, Tensor):
        raise TypeError("l1_norms takes a list of tensors, but one tensor was given; wrap it: l1_norms([grad])")
    grads = list(grads)
    for grad in grads:
        check_dense_real(grad)
    wholes = [reduced(grad) for grad in grads]
    sums: list[Scalar] = [*local_sums([local(grad) for grad in wholes])]
    add_over_shards([(sums, range(len(sums)))], wholes)
    return sums  # type: ignore[return-value]


def local_sums(grads: Sequence[Tensor]) -> list[Tensor]:
    """sum|g| of what this rank holds, as 0-dim tensors of at least float32."""
    sums: dict[int, Tensor] = {}
    for indices in by_device_and_dtype(grads):
        sums.update(zip(indices, sums_of_pieces([grads[i] for i in indices], 1), strict=True))
    return [sums[i] for i in range(len(grads))]


def check_dense_real(grad: object) -> None:
    """Raise a TypeError that says what was given unless `grad` is a dense real floating-point tensor."""
    if not isinstance(grad, Tensor):
        raise TypeError(f"a gradient must be a torch.Tensor, but {type(grad).__name__} was given")
    if grad.layout != torch.strided or not grad.is_floating_point():
        raise TypeError(
            f"a gradient must be dense and real, but one with layout {grad.layout} and dtype {grad.dtype} was given; "
            "call .to_dense() on a sparse gradient, and split a complex one with torch.view_as_real"
        )


def by_device_and_dtype(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the tensors that may share one multi-tensor call."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(i)
    return list(groups.values())


def sums_of_pieces(pieces: Sequence[Tensor], power: int) -> list[Tensor]:
    """sum|x| (power 1) or sum x^2 (power 2) of each local tensor, in at least float32; one device and dtype."""
    device, dtype = pieces[0].device, torch.promote_types(pieces[0].dtype, torch.float32)
    if device.type == "cpu":
        return [sum_on_cpu(piece, power).to(dtype) for piece in pieces]
    if device.type == "cuda":
        filled = [piece for piece in pieces if piece.numel()]
        if not filled:
            totals = []
        elif power == 1:
            totals = multi_tensor.l1(filled)
        else:
            totals = [norm.square() for norm in multi_tensor.l2(filled)]
        found = iter(totals)
        return [next(found) if piece.numel() else torch.zeros((), dtype=dtype, device=device) for piece in pieces]
    return [(piece.abs() if power == 1 else piece.to(dtype).square()).sum(dtype=dtype) for piece in pieces]


def sum_on_cpu(x: Tensor, power: int) -> Tensor:
    """sum|x| or sum x^2 as a 0-dim float64 tensor, block by block: no full-size temporary.

    `vector_norm(1)` runs one float32 accumulator down the whole tensor and is off by 1% at 23M elements.
    """
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    for block in Layout(x).flat(x).split(BLOCK):
        if power == 1:
            total += block.abs().sum(dtype=torch.float64)
        else:
            block = block.double()
            total += torch.dot(block, block)
    return total
