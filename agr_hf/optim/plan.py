"""What a step works on, kept from step to step.

A plan holds what does not change between steps: which parameters there are, what is applied to them, which backend computes
them, and the vectors that count their steps. It holds no address, and no tensor of gradients or state: every step reads the
present tensors from the groups and the state, checks that they are of the kind that the plan was made for, and only then
asks for their addresses, in the same call that uses them. So an address cannot be stale, and memory that the user lets go
of is free at once. Where anything is of another kind, the plan is made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import TYPE_CHECKING, Any

from agr_hf.optim.backends import gpu, native
from agr_hf.optim.backends.capture import untraced
from agr_hf.optim.backends.lists import ListsPart
from agr_hf.optim.backends.look import TYPES
from agr_hf.optim.flags import agr_flags, is_suspended
from agr_hf.optim.layout import check_no_shared_memory
from agr_hf.optim.options import check_options
from agr_hf.optim.part import Part, Present, Row
from agr_hf.optim.shards import LiveGroups, Scalar, add_over_shards, is_dtensor

if TYPE_CHECKING:
    from agr_hf.optim.step import StepOptimizer

# What of a group decides how its tensors are treated, besides the suspension of AGR and whether weights decay.
PLANNED = (
    "min_ndim",
    "second_moment",
    "foreach",
    "fused",
    "capturable",
    "decoupled",
    "rounding",
    "rounding_seed",
    "state_dtype",
)


class Plan:
    """All rows of an optimizer in the parts of its backends; see the head of this file.

    Raises:
        RuntimeError, ValueError: a gradient or state does not fit its parameter, is sparse, or two parameters share memory;
            nothing has been changed then, and no state has been made.
    """

    live_groups: LiveGroups  # of the present step

    def __init__(self, optimizer: StepOptimizer, present: Present, clipping: bool) -> None:
        groups = self.groups = optimizer.param_groups
        self.params = present.params
        self.key = plan_key(optimizer)
        for group in groups:
            check_options(group, type(optimizer).__name__, optimizer.options)
        check_no_shared_memory(type(optimizer).__name__, present.locals)
        for param, grad in zip(present.params, present.grads, strict=True):
            if grad is not None:
                optimizer.check_tensors(param, grad)
        flags = [
            agr_flags(group) if "agr" in optimizer.defaults else [False] * len(group["params"]) for group in groups
        ]
        active = [is_active(group) for group in groups]
        self.rows: list[Row] = []
        shapes = (
            [param.shape for param in present.params]
            if optimizer.partition is None
            else optimizer.partition.whole_shapes()
        )
        for number, group in enumerate(groups):
            for flag in flags[number]:
                # A one-element tensor's share of its own norm is 1: Psi would erase it.
                shape = shapes[len(self.rows)]
                psi = active[number] and flag and len(shape) >= group["min_ndim"] and shape.numel() > 1
                adds_decay = bool(group["weight_decay"]) and optimizer.l2_decay(group)
                on_host = present.locals[len(self.rows)].is_cpu and not group["capturable"]
                self.rows.append(
                    Row(len(self.rows), group, number, psi, psi or optimizer.uses_norms, adds_decay, on_host)
                )
        # Whose norms are known after the clipping factor only.
        self.late = [row.index for row in self.rows if row.needs_norm and row.adds_decay]
        self.meshes = self._find_meshes()
        self.sharded_groups = {self.rows[i].group_index for indices in self.meshes.values() for i in indices}
        self.partition = optimizer.partition
        self.check_meshes(present, clipping)
        new = [
            row.index
            for row, param, grad in zip(self.rows, present.params, present.grads, strict=True)
            if grad is not None and "step" not in optimizer.state.get(param, {})
        ]
        for i in new:
            optimizer.init_state(present.params[i], self.rows[i].group)
        # Rows without state wait for their first gradient.
        self.waiting = [row.index for row in self.rows if not optimizer.state.get(present.params[row.index])]
        self.state_values = list(optimizer.state.values())
        self.parts = self._make_parts(optimizer, present, set(new))

    def _find_meshes(self) -> dict[Any, list[int]]:
        """Parameters by the mesh of ranks that they are laid over: what is summed is said by the plan, and never by which
        gradients happen to be here, or ranks would add up sums of different tensors."""
        meshes: dict[Any, list[int]] = {}
        for i, param in enumerate(self.params):
            if type(param) not in TYPES and is_dtensor(param):
                meshes.setdefault(param.device_mesh, []).append(i)  # type: ignore[attr-defined]
        return meshes

    def check_meshes(self, present: Present, clipping: bool) -> None:
        if clipping and any(
            mesh.get_coordinate() is None and any(present.grads[i] is not None for i in indices)
            for mesh, indices in self.meshes.items()
        ):
            raise RuntimeError(
                "max_grad_norm needs every gradient's norm on every rank, but some parameters live on a mesh that this rank "
                "is not part of; clip outside of the optimizer, and leave max_grad_norm=None"
            )

    def _make_parts(self, optimizer: StepOptimizer, present: Present, new: set[int]) -> list[Part]:
        parts: dict[Any, list[Row]] = {}
        all_on_host = all(row.on_host for row in self.rows)
        for row in self.rows:
            i = row.index
            if i in self.waiting:
                continue
            backend: type[Part] = ListsPart
            if all_on_host and native.serves(optimizer, row, present):
                backend = native.NativePart
            elif gpu.serves(optimizer, row, present):
                backend = gpu.GPUPart
            if row.group["fused"] and backend is ListsPart:
                raise RuntimeError(
                    f"fused=True was given, but {type(optimizer).__name__} has no kernel for a gradient or memory format "
                    f"like that of a parameter of shape {tuple(present.params[i].shape)}; leave fused=None for the fastest "
                    "step there is"
                )
            device = present.locals[i].device
            keys = tuple(optimizer.tensor_state(present.params[i], row.group))
            parts.setdefault((backend, device, row.group["capturable"], keys), []).append(row)
        return [backend(optimizer, rows, present, new) for (backend, *_), rows in parts.items()]

    def fits(self, optimizer: StepOptimizer, present: Present) -> bool:
        """Whether the plan is one for the tensors of this step, which its parts then hold until the step is done."""
        state = optimizer.state
        return (
            len(present.params) == len(self.params)
            and all(map(is_, present.params, self.params))
            and self.key == plan_key(optimizer)
            and len(state) == len(self.state_values)
            and all(map(is_, state.values(), self.state_values))
            and all(present.grads[i] is None for i in self.waiting)
            and all(part.look(present) for part in self.parts)
        )

    @property
    def is_sharded(self) -> bool:
        """Whether sums over what this rank holds are not yet those of whole tensors. The same on every rank."""
        return bool(self.meshes) or self.partition is not None

    @untraced  # a count is another number in every step, and would be compiled again
    def count_groups(self) -> None:
        """Count this step of the groups that have a gradient, with AGR or without."""
        for i, group in enumerate(self.groups):
            if "agr_step" in group and self.live_groups.counts(i, group, i in self.sharded_groups):
                group["agr_step"] += 1

    def add_over_ranks(self, columns: Sequence[tuple[list[Scalar], Sequence[int]]]) -> None:
        """Make sums over local shards sums over whole tensors; see `add_over_shards` and `Partition`."""
        if self.partition is not None:
            self.partition.add_over_ranks(columns[0][0])
        elif self.meshes:
            add_over_shards(columns, self.params, self.live_groups)


def is_active(group: dict[str, Any]) -> bool:
    """Whether AGR is not suspended in a group."""
    if is_suspended(group):
        return False
    # Under `capturable` the device knows the step, and decides.
    return group.get("agr_steps") is None or group["capturable"] or group["agr_step"] < group["agr_steps"]


def plan_key(optimizer: StepOptimizer) -> list[Any]:
    """What of the groups a plan depends on."""
    return [
        (
            len(group["params"]),
            tuple(group["agr"]) if isinstance(group.get("agr"), list) else group.get("agr"),
            is_active(group),
            bool(group["weight_decay"]),
            *[group.get(key) for key in PLANNED],
        )
        for group in optimizer.param_groups
    ]
