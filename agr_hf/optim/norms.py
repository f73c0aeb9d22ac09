"""The one reduction: sum|g| of each gradient, whole or sharded."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from agr_hf.optim.backends import multi_tensor
from agr_hf.optim.backends.cpu import BLOCK
from agr_hf.optim.layout import Layout


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
    sums: list[Tensor | None] = [None] * len(grads)
    wholes = [reduced(grad) for grad in grads]
    for indices in by_device_and_dtype([local(grad) for grad in wholes]):
        pieces = [local(wholes[i]) for i in indices]
        for i, total in zip(indices, sums_of_pieces(pieces, 1), strict=True):
            sums[i] = total
    return add_over_shards([[s for s in sums if s is not None]], wholes)[0]


def check_dense_real(grad: object) -> None:
    """Raise a TypeError that says what was given unless `grad` is a dense real floating-point tensor."""
    if not isinstance(grad, Tensor):
        raise TypeError(f"a gradient must be a torch.Tensor, but {type(grad).__name__} was given")
    if grad.layout != torch.strided or not grad.is_floating_point():
        raise TypeError(
            f"a gradient must be dense and real, but one with layout {grad.layout} and dtype {grad.dtype} was given; "
            "call .to_dense() on a sparse gradient, and split a complex one with torch.view_as_real"
        )


def is_dtensor(tensor: Tensor) -> bool:
    # By attribute, not by class: importing torch.distributed.tensor takes longer than a step.
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds: the tensor itself, or a DTensor's shard (a view of it)."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor, whole or a DTensor, laid over the ranks as `like` is. Every rank calls it, with the same whole.

    Raises:
        RuntimeError: this torch cannot lay it so.
    """
    if not is_dtensor(like):
        return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = like.device_mesh, tuple(like.placements)  # type: ignore[attr-defined]
    if is_dtensor(tensor):
        if tensor.device_mesh == mesh and tuple(tensor.placements) == placements:  # type: ignore[attr-defined]
            return tensor
        tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    whole = DTensor.from_local(tensor.to(local(like).device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    laid = whole.redistribute(mesh, placements)
    # torch 2.9 mistakes the shards of FSDP over tensor parallelism for plain ones.
    strided = any(type(placement).__name__ == "_StridedShard" for placement in placements)
    if strided and not torch.allclose(laid.full_tensor(), tensor.to(laid.device), rtol=0, atol=0, equal_nan=True):
        raise RuntimeError(
            f"torch {torch.__version__} cannot lay a whole tensor over {placements}; load a state that was saved of the "
            "same shards (torch.distributed.checkpoint does so), or take a newer torch"
        )
    return laid


def reduced(grad: Tensor, like: Tensor | None = None) -> Tensor:
    """A DTensor gradient with every Partial placement summed, laid out as `like` where that is given."""
    if not is_dtensor(grad):
        return grad
    placements = tuple(grad.placements)  # type: ignore[attr-defined]
    if like is not None and is_dtensor(like):
        wanted = tuple(like.placements)  # type: ignore[attr-defined]
    else:
        from torch.distributed.tensor import Replicate

        wanted = tuple(Replicate() if placement.is_partial() else placement for placement in placements)
    return grad if wanted == placements else grad.redistribute(placements=wanted)  # type: ignore[attr-defined]


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which have no other."""
    return torch.float32 if device.type == "mps" else torch.float64


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
        return [torch.tensor(sum_on_cpu(piece, power), dtype=dtype, device="cpu") for piece in pieces]
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


def sum_on_cpu(x: Tensor, power: int) -> float:
    """sum|x| or sum x^2, block by block: no full-size temporary, and the blocks add up in float64.

    `vector_norm(1)` runs one float32 accumulator down the whole tensor and is off by 1% at 23M elements; `sum` adds
    in pairs (relative error about 1e-8 a block).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = 0.0
    for block in Layout(x).flat(x).split(BLOCK):
        if power == 1:
            total += block.abs().sum(dtype=dtype).item()
        else:
            block = block.to(dtype)
            total += torch.dot(block, block).item()
    return total


def add_over_shards(rows: list[list[Tensor]], tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Turn sums over local shards into sums over whole tensors.

    Args:
        rows: some sums (of magnitudes, of squares), each a list with one 0-dim tensor for each of `tensors`.
        tensors: the tensors they are sums of; those that are no DTensor keep their sums.

    Every sum of one mesh travels in one vector: a single all-reduce where one dimension shards anything or the mesh has all
    ranks, else one for each dimension that does.
    """
    meshes: dict[object, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if is_dtensor(tensor):
            meshes.setdefault(tensor.device_mesh, []).append(i)  # type: ignore[attr-defined]
    for mesh, indices in meshes.items():
        place = mesh.get_coordinate()  # type: ignore[attr-defined]
        if place is None:
            continue  # a mesh of other ranks: nothing of its tensors is here
        flat = torch.stack([row[i].double() if row[i].is_cpu else row[i] for row in rows for i in indices])
        for dims in _reduced_together(mesh, [tensors[i] for i in indices]):
            # A replicated tensor's sum is complete everywhere: only place 0 brings it, or it would count twice. (The rank
            # within a dimension's group is another number where a mesh has its ranks in an order of its own.)
            mine = [all(_shards(tensors[i], d) or place[d] == 0 for d in dims) for i in indices]
            if not all(mine):
                # No mask: a list of the host's would be waited for by a device.
                kept = zip(flat.unbind(), mine * len(rows), strict=True)
                flat = torch.stack([total if keep else torch.zeros_like(total) for total, keep in kept])
            group = mesh.get_group(dims[0]) if len(dims) == 1 else None  # type: ignore[attr-defined]
            torch.distributed.all_reduce(flat, group=group)
        totals = iter(flat.unbind())
        for row in rows:
            for i in indices:
                row[i] = next(totals).to(row[i].dtype)
    return rows


def _shards(tensor: Tensor, dim: int) -> bool:
    return not tensor.placements[dim].is_replicate()  # type: ignore[attr-defined]


def _reduced_together(mesh: Any, tensors: Sequence[Tensor]) -> list[list[int]]:
    """Dimensions of a mesh over which anything is sharded, those in one list by one all-reduce."""
    dims = [dim for dim in range(mesh.ndim) if any(_shards(tensor, dim) for tensor in tensors)]
    if len(dims) > 1 and mesh.size() == torch.distributed.get_world_size():
        return [list(range(mesh.ndim))]  # the default group is there already; a mesh of fewer ranks has none of its own
    return [[dim] for dim in dims]
