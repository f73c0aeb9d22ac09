"""DeepSpeed ZeRO: layers in the flat partitions that it gives an optimizer, and the step on them.

Under stages 1, 2 and 3 a group's parameters become flat float32 partitions, one for each rank (stage 3: for each rank and
sub-group), that hold pieces of layers. Where those are is known to DeepSpeed. So the step is the usual one, on the pieces,
by an optimizer of the same class: sums over the pieces, one all-reduce of a number a layer, then the update of each piece.
State stays where DeepSpeed saves and moves it, flat and under the partition.

This is the only module that reads attributes of DeepSpeed (written for 0.19.8); it never imports it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from agr_hf.optim.flags import agr_flags
from agr_hf.optim.norms import sums_of_pieces
from agr_hf.optim.shards import Scalar, as_vector

if TYPE_CHECKING:
    from agr_hf.optim.step import StepOptimizer

OTHER_WAY = (
    "use FSDP2 (torch.distributed.fsdp.fully_shard, or fsdp_version: 2 in the accelerate config) or ZeRO stage 0"
)


def is_partitioned(group: Mapping[str, Any], layers: Sequence[Tensor]) -> bool:
    """Whether ZeRO's partitions stand in a group in the place of its layers."""
    return (
        bool(group["params"])
        and all(tensor.ndim == 1 and all(tensor is not layer for layer in layers) for tensor in group["params"])
        and any(hasattr(layer, "_z3_optimizer") or hasattr(layer, "_dp_group") for layer in layers)
    )


@dataclass(frozen=True)
class Fragment:
    """A rank's piece of a layer: `numel` elements of a flat partition from `start` on, of `layers[layer]`."""

    layer: int
    start: int
    numel: int


@dataclass(frozen=True)
class Partition:
    """What this rank holds of some layers, flat.

    Attributes:
        layers: the model's parameters, the same list on every rank of `ranks`.
        shapes: of the whole layers.
        fragments: in the order of the partition. A rank may hold none.
        ranks: the process group that the layers are partitioned over.
        is_last: whether it is the last one of its group that a step comes to.
    """

    layers: list[Tensor]
    shapes: list[torch.Size]
    fragments: list[Fragment]
    ranks: Any
    is_last: bool

    def whole_shapes(self) -> list[torch.Size]:
        """Of the layer of each fragment."""
        return [self.shapes[fragment.layer] for fragment in self.fragments]

    def cut(self, flat: Tensor) -> list[Tensor]:
        """The fragments of a tensor of the partition's length, as views."""
        return [flat.narrow(0, fragment.start, fragment.numel) for fragment in self.fragments]

    def add_over_ranks(self, sums: list[Scalar]) -> None:
        """Turn sums over fragments into sums over whole layers, in place: one all-reduce, which every rank takes part in."""
        totals: list[Scalar] = [0.0] * len(self.layers)
        for fragment, found in zip(self.fragments, sums, strict=True):
            totals[fragment.layer] = found
        device = next((total.device for total in sums if isinstance(total, Tensor)), torch.device("cpu"))
        vector = as_vector(totals, device.type)
        on_wire = vector.to(_find_device(self.ranks, device))
        dist.all_reduce(on_wire, group=self.ranks)
        vector = on_wire.to(vector.device)
        # The host reads what it has itself; of a device it takes no numbers, which it would wait for.
        totals = vector.tolist() if vector.is_cpu else list(vector.unbind())
        sums[:] = [totals[fragment.layer] for fragment in self.fragments]


def _find_device(ranks: Any, device: torch.device) -> torch.device:
    """Where a process group communicates: partitions offloaded to the CPU are those of ranks with devices."""
    if device.type != "cpu" or any(name in str(dist.get_backend_config(ranks)) for name in ("gloo", "mpi", "cpu:")):
        return device
    found = torch.accelerator.current_accelerator()
    if found is None:
        raise RuntimeError(f"the process group of backend {dist.get_backend(ranks)} has no device here")
    return found


def find_partition(flat: Tensor, layers: Sequence[Tensor]) -> Partition:
    """Find the layers of a flat partition.

    All ranks that the layers are partitioned over call it together, for it checks that they hold each element once.

    Args:
        flat: a partition as DeepSpeed's ZeRO (stage 1, 2 or 3) gives it to an optimizer: 1-D.
        layers: the model's parameters that the partition's group was made of, in their order; frozen ones may be among them.

    Raises:
        RuntimeError: DeepSpeed's attributes are not those that are known, or do not fit the partition.
    """
    layers = list(layers)
    try:
        z3 = next((layer._z3_optimizer for layer in layers if hasattr(layer, "_z3_optimizer")), None)
        found = _of_stage_1_and_2(flat, layers) if z3 is None else _of_stage_3(flat, layers, z3)
    except (AttributeError, KeyError, TypeError, StopIteration) as error:
        raise RuntimeError(
            f"this DeepSpeed keeps its partitions in another way than agr_hf knows ({type(error).__name__}: {error}), so "
            f"that the layers in them cannot be found; {OTHER_WAY}"
        ) from error
    _check(found, flat)
    return found


def _of_stage_1_and_2(flat: Tensor, layers: list[Any]) -> Partition:
    # Each 16-bit parameter is a view into its group's flat tensor, which is cut evenly among the ranks.
    trained = [layer for layer in layers if hasattr(layer, "_dp_group")]
    ranks = trained[0]._dp_group if trained else None
    low = dist.get_rank(ranks) * flat.numel()
    fragments = []
    for i, layer in enumerate(trained):
        first = max(low, layer.storage_offset())
        numel = min(low + flat.numel(), layer.storage_offset() + layer.numel()) - first
        if numel > 0:
            fragments.append(Fragment(i, first - low, numel))
    fragments.sort(key=lambda fragment: fragment.start)
    return Partition(trained, [layer.shape for layer in trained], fragments, ranks, is_last=True)


def _of_stage_3(flat: Tensor, layers: list[Any], z3: Any) -> Partition:
    if z3.offload_optimizer and z3.partial_offload != 1.0:
        raise RuntimeError(
            "with an offload ratio below 1 DeepSpeed updates part of the model by an AdamW of its own; set "
            '"offload_optimizer": {"ratio": 1}'
        )
    number = next(i for i, own in enumerate(z3.fp32_partitioned_groups_flat) if own is flat)
    places = [(layer, z3.grad_position.get(z3.get_param_id(layer))) for layer in layers]
    trained = [(layer, place) for layer, place in places if place is not None and place[0] == number]
    ranks = trained[0][0].ds_process_group if trained else None
    fragments = []
    for i, (layer, (_, start, numel)) in enumerate(trained):
        numel = min(numel, layer.ds_numel - dist.get_rank(ranks) * numel)  # the last ranks' pieces are padded
        if numel > 0:
            fragments.append(Fragment(i, start, numel))
    fragments.sort(key=lambda fragment: fragment.start)
    # Sub-groups are stepped in their order.
    is_last = number == max(place[0] for _, place in places if place is not None)
    return Partition(
        [layer for layer, _ in trained], [layer.ds_shape for layer, _ in trained], fragments, ranks, is_last
    )


def _check(found: Partition, flat: Tensor) -> None:
    """Raise a RuntimeError, on all ranks, unless the fragments of all ranks are each element of each layer once."""
    end, fits = 0, flat.ndim == 1
    for fragment in found.fragments:
        fits = fits and fragment.start >= end
        end = fragment.start + fragment.numel
    fits = fits and end <= flat.numel()
    sums: list[Scalar] = [float(fragment.numel) if fits else -1.0 for fragment in found.fragments]
    if found.layers:
        found.add_over_ranks(sums)
        fits = fits and sums == [found.shapes[fragment.layer].numel() for fragment in found.fragments]
    if not (found.layers and fits):
        raise RuntimeError(
            f"the layers of a ZeRO partition of {flat.numel()} elements were not found where DeepSpeed usually has them; "
            f"{OTHER_WAY}"
        )


def fragment_norms(
    flat: Tensor, layers: Sequence[Tensor], values: Tensor | None = None, *, order: int = 1
) -> list[Tensor]:
    """The norm of each whole layer of a flat ZeRO partition, as LARS, LAMB, AGR and AdaL need it.

    All ranks of the partition call it together, in every step: it takes one all-reduce of a number a layer, and another one
    for the check of the partition.

    Args:
        flat: the flat partition in `optimizer.param_groups`, see `find_partition`.
        layers: the parameters that the group was made of, before `deepspeed.initialize`.
        values: 1-D, as long as `flat`: the partition itself, or an update. Default its gradient, `flat.grad`.
        order: 1 for sum|x|, 2 for the Euclidean norm.

    Returns:
        One 0-dim float32 tensor for each layer of which this rank holds anything, in the order of the partition.

    Raises:
        ValueError: `order` is neither, or there is no gradient.
        RuntimeError: the layers cannot be found, see `find_partition`.
    """
    values = flat.grad if values is None else values
    if order not in (1, 2) or values is None:
        raise ValueError(f"fragment_norms: order={order!r} must be 1 or 2, and the partition must have a gradient")
    found = find_partition(flat, layers)
    pieces = found.cut(values)
    sums: list[Scalar] = [*sums_of_pieces(pieces, order)] if pieces else []
    found.add_over_ranks(sums)
    norms = [torch.as_tensor(total, dtype=torch.float32, device=flat.device) for total in sums]
    return [norm.sqrt() for norm in norms] if order == 2 else norms


class PartitionStep:
    """An optimizer's step on one flat partition: that of an optimizer of the same class on the pieces of layers in it."""

    def __init__(self, optimizer: StepOptimizer, group: dict[str, Any], flat: Tensor, layers: Sequence[Tensor]) -> None:
        self.flat = flat
        self.partition = find_partition(flat, layers)
        self.given = list(layers)
        self.pieces = [torch.empty(0, dtype=flat.dtype, device=flat.device) for _ in self.partition.fragments]
        make: Any = type(optimizer)
        self.inner: StepOptimizer = make([{**group, "params": self.pieces, "agr": self._flags(group)}])
        self.inner.partition = self.partition
        self.known: list[Any] = []  # numbers of the flat state, as the last step left them

    def step(self, optimizer: StepOptimizer, group: dict[str, Any]) -> None:
        flat, inner = self.flat, self.inner
        state = optimizer.state[flat]
        inner.param_groups[0].update({**group, "params": self.pieces, "agr": self._flags(group)})
        self._take_numbers(optimizer, state)
        # Cut in every step, and let go of after it: DeepSpeed moves partitions and state, to a CPU or a disk and back.
        tensors = {key: self.partition.cut(state[key]) for key in optimizer.state_keys}
        try:
            grads = [None] * len(self.pieces) if flat.grad is None else self.partition.cut(flat.grad)
            for i, (piece, view) in enumerate(zip(self.pieces, self.partition.cut(flat.detach()), strict=True)):
                piece.data, piece.grad = view, grads[i]
                inner.state[piece].update({key: views[i] for key, views in tensors.items()})
            inner.take_step()
        finally:
            for piece in self.pieces:
                piece.data, piece.grad = flat.new_empty(0), None
                for key in tensors:
                    inner.state[piece].pop(key, None)
        if flat.grad is not None:
            self._give_numbers(optimizer, state)
        if self.partition.is_last and "agr_step" in group and flat.grad is not None:
            group["agr_step"] += 1

    def _flags(self, group: dict[str, Any]) -> list[bool]:
        """The `agr` of each piece, of which the group may have one for each layer that it was given."""
        wanted = dict(zip(map(id, self.given), agr_flags({**group, "params": self.given}), strict=True))
        return [wanted[id(self.partition.layers[fragment.layer])] for fragment in self.partition.fragments]

    def knows(self, optimizer: StepOptimizer, state: Mapping[str, Any]) -> bool:
        """Whether the numbers of the flat state are those that the last step left."""
        numbers = _read_numbers(optimizer, state)
        return bool(self.known) and all(own is found for own, found in zip(self.known, numbers, strict=True))

    def _take_numbers(self, optimizer: StepOptimizer, state: dict[str, Any]) -> None:
        """Begin with the numbers of a flat state that was loaded, or is new."""
        if self.knows(optimizer, state):
            return
        self.inner.state.clear()
        for i, piece in enumerate(self.pieces):
            entry = self.inner.state[piece]
            entry["step"] = state["step"].detach().clone()
            for key, first in optimizer.scalar_state.items():
                # Of another number of ranks, it is of other pieces.
                saved = state.get(_plural(key))
                fits = isinstance(saved, Tensor) and saved.shape == (len(self.pieces),)
                entry[key] = saved[i].clone() if fits else torch.tensor(first, device=self.flat.device)  # type: ignore[index]
        self.known = _read_numbers(optimizer, state)

    def _give_numbers(self, optimizer: StepOptimizer, state: dict[str, Any]) -> None:
        """Keep the numbers in the flat state; new tensors, for checkpoints of DeepSpeed may share one among partitions."""
        state["step"] = state["step"] + 1
        entries = [self.inner.state[piece] for piece in self.pieces]
        for key in optimizer.scalar_state:
            state[_plural(key)] = torch.stack([entry[key] for entry in entries]) if entries else torch.zeros(0)
        self.known = _read_numbers(optimizer, state)


def check_loaded(optimizer: StepOptimizer, flat: Tensor) -> None:
    """Refuse a state, or options, that a universal checkpoint of DeepSpeed has not brought back whole.

    Args:
        optimizer: whose state and groups are looked at.
        flat: a partition whose state is new, or was loaded since its last step.

    Raises:
        RuntimeError: state is missing, or a group has the options of the first one instead of its own.
    """
    name, state = type(optimizer).__name__, optimizer.state.get(flat)
    if not state:
        return
    missing = [key for key in optimizer.state_keys if key not in state]
    if float(state["step"]) > 0:
        missing += [key for key in map(_plural, optimizer.required_state) if key not in state]
    if missing:
        raise RuntimeError(
            f"the state that DeepSpeed loaded lacks {', '.join(missing)} of {name}: its universal checkpoints keep tensors "
            "of the parameters' shape only, and under ZeRO 3 no others than exp_avg and exp_avg_sq; go on from a plain "
            "checkpoint, on as many ranks as saved it"
        )
    # One tensor in the state of several partitions is what the universal load of ZeRO 3 leaves.
    if not any(other is not state and other.get("step") is state["step"] for other in optimizer.state.values()):
        return
    layers = optimizer._layers
    first = layers.pairs[0][0]
    for (group, _), own in zip(layers.pairs, layers.options, strict=True):
        changed = [key for key, value in own.items() if group[key] != value and group[key] == first[key]]
        if changed:
            raise RuntimeError(
                f"DeepSpeed has given all groups of {name} the options of the first one, as it does when it loads a "
                f"universal checkpoint under ZeRO 3: {', '.join(changed)} of another group changed. Give each group its own "
                "options again after load_checkpoint, in engine.optimizer.param_groups"
            )


def _read_numbers(optimizer: StepOptimizer, state: Mapping[str, Any]) -> list[Any]:
    return [state.get("step"), *[state.get(_plural(key)) for key in optimizer.scalar_state]]


def _plural(key: str) -> str:
    """A number of each piece, in the state of a partition."""
    return f"{key}s"
