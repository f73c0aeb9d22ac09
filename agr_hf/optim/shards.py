"""DTensors: what this rank holds of them, how they are laid, and their sums over all ranks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    # By attribute, not by class: importing torch.distributed.tensor takes longer than a step.
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds: the tensor itself, or a DTensor's shard (a view of it)."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def as_dtensor(shard: Tensor, like: Tensor) -> Tensor:
    """This rank's shard as the DTensor whose part it is, laid as `like`."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        shard,
        like.device_mesh,  # type: ignore[attr-defined]
        like.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


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


def place_of_shard(tensor: Tensor) -> tuple[int, int]:
    """Where a shard lies in its tensor: the number of its first element, and 0 or, where that does not tell its elements
    from those of other shards (anything else than one sharding of dimension 0), a number > 0 that differs from theirs."""
    if not is_dtensor(tensor):
        return 0, 0
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    coordinate = mesh.get_coordinate()
    sharding = [d for d, placement in enumerate(placements) if not placement.is_replicate()]
    if not sharding or coordinate is None:
        return 0, 0
    if len(sharding) == 1 and type(placements[sharding[0]]).__name__ == "Shard" and placements[sharding[0]].dim == 0:
        rows = tensor.shape[0]
        each = -(-rows // mesh.size(sharding[0]))
        return min(coordinate[sharding[0]] * each, rows) * (tensor.numel() // max(rows, 1)), 0
    place = 0
    for d in sharding:
        place = place * mesh.size(d) + coordinate[d]
    return 0, place + 1


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which have no other."""
    return torch.float32 if device.type == "mps" else torch.float64


# A number that the host knows, or a 0-dim tensor where reading it would make the host wait for a device.
Scalar = float | Tensor


def as_number(value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number, or a tensor with one, as a new 0-dim tensor. The device is named: the default one has no part in it."""
    if not isinstance(value, Tensor):
        return torch.full((), float(value), dtype=dtype, device=device)
    value = value.full_tensor() if is_dtensor(value) else value  # type: ignore[attr-defined]
    return value.detach().reshape(()).to(device=device, dtype=dtype, copy=True)


class LiveGroups:
    """Which groups have a gradient in this step, on this rank and on those that it shares a mesh with.

    Ranks that share a mesh must count a step alike: otherwise they suspend AGR at different steps, and then some of them
    wait for sums that the others do not bring.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], grads: Sequence[Tensor | None]) -> None:
        """Args: the groups, and the gradients of their parameters in this order."""
        self.here: list[bool] = []
        start = 0
        for group in groups:
            end = start + len(group["params"])
            self.here.append(any(grads[i] is not None for i in range(start, end)))
            start = end
        self.numbers: list[Scalar] = [float(is_here) for is_here in self.here]
        self.totals: list[Sequence[Scalar]] = []  # of each mesh: on how many of its ranks each group has a gradient

    def counts(self, index: int, group: Mapping[str, Any], is_sharded: bool) -> bool:
        """Whether this is a step of a group: of a sharded one, where any rank has a gradient of it.

        A step without a collective does not know of the other ranks. Then every group that trains is counted, and so is one
        whose step is recorded (`capturable`). A device is waited for only where this rank has no gradient of the group.
        """
        if self.here[index] or not is_sharded:
            return self.here[index]
        totals = [found[index] for found in self.totals]
        if totals and not any(isinstance(total, Tensor) for total in totals):
            return any(total > 0 for total in totals)
        trains = any(param.requires_grad for param in group["params"])
        return trains and (not totals or bool(group.get("capturable")) or any(bool(total > 0) for total in totals))


def add_over_shards(
    columns: Sequence[tuple[list[Scalar], Sequence[int]]],
    tensors: Sequence[Tensor],
    live_groups: LiveGroups | None = None,
) -> None:
    """Turn sums over local shards into sums over whole tensors, in place.

    Args:
        columns: sums of some kind (of magnitudes, of squares), one for each of `tensors`, and of which tensors they are to
            be added up. Every rank brings the same tensors in the same order: 0 for what it does not hold.
        tensors: DTensors, and others, whose sums stay as they are.
        live_groups: travel with the sums of each mesh, as many groups on every rank.

    Every sum of one mesh travels in one vector: a single all-reduce where one dimension shards anything or the mesh has all
    ranks, else one for each dimension that does.
    """
    meshes: dict[Any, list[tuple[list[Scalar], int]]] = {}
    for sums, indices in columns:
        for i in indices:
            if is_dtensor(tensors[i]):
                meshes.setdefault(tensors[i].device_mesh, []).append((sums, i))  # type: ignore[attr-defined]
    own = [] if live_groups is None else live_groups.numbers
    for mesh, entries in meshes.items():
        place = mesh.get_coordinate()
        if place is None:
            continue  # a mesh of other ranks: nothing of its tensors is here
        flat = as_vector([*[sums[i] for sums, i in entries], *own], mesh.device_type)
        for dims in _reduced_together(mesh, [tensors[i] for _, i in entries]):
            # A replicated tensor's sum is complete everywhere: only place 0 brings it, or it would count twice. (The rank
            # within a dimension's group is another number where a mesh has its ranks in an order of its own.)
            mine = [all(_shards(tensors[i], d) or place[d] == 0 for d in dims) for _, i in entries]
            mine += [True] * len(own)
            if not all(mine):
                # No mask: a list of the host's would be waited for by a device.
                kept = zip(flat.unbind(), mine, strict=True)
                flat = torch.stack([total if keep else torch.zeros_like(total) for total, keep in kept])
            group = mesh.get_group(dims[0]) if len(dims) == 1 else None
            torch.distributed.all_reduce(flat, group=group)
        # The host knows its numbers again; a device's are not read.
        totals: Sequence[Scalar] = flat.tolist() if flat.is_cpu else flat.unbind()
        for (sums, i), total in zip(entries, totals[: len(entries)], strict=True):
            before = sums[i]
            sums[i] = as_number(total, before.dtype, before.device) if isinstance(before, Tensor) else total
        if live_groups is not None:
            live_groups.totals.append(totals[len(entries) :])


def as_vector(sums: Sequence[Scalar], device_type: str) -> Tensor:
    """Sums as one vector on the device of the mesh, in its widest dtype."""
    on_device = [total for total in sums if isinstance(total, Tensor)]
    if not on_device:
        vector = torch.tensor(sums, dtype=torch.float64, device="cpu")
        return vector if device_type == "cpu" else vector.to(device_type, widest(torch.device(device_type)))
    like = on_device[0]
    stacked = [total if isinstance(total, Tensor) else like.new_full((), total) for total in sums]
    return torch.stack(stacked).to(widest(like.device))


def _shards(tensor: Tensor, dim: int) -> bool:
    return not tensor.placements[dim].is_replicate()  # type: ignore[attr-defined]


def _reduced_together(mesh: Any, tensors: Sequence[Tensor]) -> list[list[int]]:
    """Dimensions of a mesh over which anything is sharded, those in one list by one all-reduce."""
    dims = [dim for dim in range(mesh.ndim) if any(_shards(tensor, dim) for tensor in tensors)]
    if len(dims) > 1 and mesh.size() == torch.distributed.get_world_size():
        return [list(range(mesh.ndim))]  # the default group is there already; a mesh of fewer ranks has none of its own
    return [[dim] for dim in dims]
