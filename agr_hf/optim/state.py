"""State of the optimizers: made with the first gradient, saved, and loaded from files of this and of related optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from agr_hf.errors import UserError
from agr_hf.optim.flattened import GivenLayers
from agr_hf.optim.layout import Layout
from agr_hf.optim.options import check_group
from agr_hf.optim.rounding import COMPENSATION
from agr_hf.optim.shards import as_number, is_dtensor, local, placed_like, widest
from agr_hf.optim.zero import is_partitioned

# How a step is computed is this run's choice; what it computes is the checkpoint's.
IMPLEMENTATION_KEYS = ("foreach", "fused", "capturable")
# Keys of torch's optimizers that mean nothing here, and would mislead a torch optimizer that loads our state later.
FOREIGN_KEYS = ("amsgrad", "differentiable", "decoupled_weight_decay", "decoupled")
# State of other optimizers that have Adam's keys too, or of ours; other keys are the user's own, and kept.
FOREIGN_STATE = (
    "exp_avg_diff", "exp_avg_var", "exp_inf", "max_exp_avg_sq", "momentum_buffer", "mu_product", "neg_pre_grad",
    "scaled_exp_avg", "square_avg", "sum", "weight_sum",
)  # fmt: skip
# Optional state that a related optimizer may find and need not understand: Adan takes AGRAdan's.
IGNORED_STATE = ("pre_l1_norm",)


class StatefulOptimizer(torch.optim.Optimizer):
    """State and checkpoints. A subclass states:

    - `state_keys`: names of the state tensors shaped like the parameter;
    - `scalar_state`: names of per-parameter 0-dim state tensors with their first values (kept in float64, where there is);
    - `required_state`: names of `scalar_state` without which a loaded state means nothing;
    - `betas_count`: how many betas the rule has.
    """

    state_keys: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    scalar_state: ClassVar[Mapping[str, float]] = {}
    required_state: ClassVar[tuple[str, ...]] = ()
    betas_count: ClassVar[int] = 2

    def _reset(self) -> None:
        """Forget what is found anew, and is not part of the state."""
        self._layers = GivenLayers()

    def tensor_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, torch.dtype]:
        """The state tensors shaped like a parameter, with their dtypes: float32 or wider, but for the first moment under
        `state_dtype` and what Kahan's compensation keeps beside a bfloat16 parameter."""
        wide = torch.promote_types(param.dtype, torch.float32)
        dtypes = dict.fromkeys(self.state_keys, wide)
        if group["state_dtype"] is not None and wide == torch.float32:
            dtypes[self.state_keys[0]] = torch.bfloat16
        if group["rounding"] == "kahan" and param.dtype == torch.bfloat16:
            dtypes[COMPENSATION] = param.dtype
        return dtypes

    def init_state(self, param: Tensor, group: dict[str, Any]) -> None:
        """Make the state of a parameter that gets its first gradient: zeros."""
        state, device = self.state[param], local(param).device
        state["step"] = torch.zeros((), dtype=torch.float32, device=device if group["capturable"] else "cpu")
        for key, dtype in self.tensor_state(param, group).items():
            state[key] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        for key, value in self.scalar_state.items():
            # With the gradients: a norm of a GPU's gradient must never be waited for.
            state[key] = torch.full((), value, dtype=widest(device), device=device)

    def lay_state(self, param: Tensor, group: Mapping[str, Any], layout: Layout, state: dict[str, Any]) -> None:
        """Bring state tensors to the dtype and memory order of their parameter, where either changed in mid-run.

        It may also come from a file that keeps no strides, or from a run that rounded in another way.
        """
        for key, dtype in self.tensor_state(param, group).items():
            if key == COMPENSATION and key not in state:
                state[key] = torch.zeros_like(param, memory_format=torch.preserve_format)
            if state[key].dtype != dtype:
                state[key] = state[key].to(dtype)
            held = local(state[key])
            if held.numel() and layout.view(held) is None:
                if is_dtensor(state[key]):
                    held.set_(layout.relaid(held))  # type: ignore[call-overload]
                else:
                    state[key] = layout.relaid(held)

    def check_shapes(self, param: Tensor, state: Mapping[str, Any]) -> None:
        """Raise a ValueError where state is no dense real tensor of the parameter's shape."""
        for key in (*self.state_keys, COMPENSATION):
            if key not in state:
                continue
            found, what = state[key], None
            if not isinstance(found, Tensor):
                what = f"is of type {type(found).__name__}"
            elif found.shape != param.shape:
                what = f"has the shape {tuple(found.shape)}"
            elif found.layout != torch.strided or not found.is_floating_point() or found.is_meta != param.is_meta:
                what = f"has the layout {found.layout} and dtype {found.dtype} on {found.device}"
            if what:
                raise UserError(
                    f"{type(self).__name__}: {key} {what} and its parameter {tuple(param.shape)}; the state belongs to "
                    "another model, or the parameter was changed since: load this model's state, or take a new optimizer"
                )

    # ---- checkpoints

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it, and no optimizer here has it
        if "defaults" in state:  # unpickled or copied; load_state_dict looks after its own groups
            self._reset()
            self._layers = GivenLayers(self.param_groups)
            for group in self.param_groups:
                for key, value in self.defaults.items():
                    group.setdefault(key, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer, or of torch's optimizer with the same state keys.

        Moments come back in float32 (float64 for float64 parameters; see `state_dtype`) whatever the parameter's dtype.
        Options that the file does not know (a state saved by torch.optim.AdamW has no `agr`) keep this optimizer's values,
        and so do `foreach`, `fused` and `capturable`, which say how and not what to compute. Entries of the user's own are
        kept as torch keeps them.

        Tensors may be whole or DTensors, and are laid over the processes as the parameters are; all processes call it.

        Args:
            state_dict: what `state_dict()` returned. It is copied, and never changed by later steps.

        Raises:
            ValueError: the groups do not match, something has a wrong type, or the state was saved by an optimizer with
                other state keys. Nothing has been changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise UserError(f"{type(self).__name__} loads a state_dict, but {type(state_dict).__name__} was given")
        final: dict[str, Any] = {}
        before = [dict(group) for group in self.param_groups]

        def remember(_: torch.optim.Optimizer, given: dict[str, Any]) -> None:
            self._check_loadable(given)
            final.update(given)

        def restore(_: torch.optim.Optimizer) -> None:
            ids = [i for group in final["param_groups"] for i in group["params"]]
            params = [(param, group) for group in self.param_groups for param in group["params"]]
            for group, old in zip(self.param_groups, before, strict=True):
                self._complete(group, old)
            for i, (param, group) in zip(ids, params, strict=True):
                if final["state"].get(i):
                    self._restore(param, group, final["state"][i])

        # The user's own hooks come before the one, which sees what they leave before torch rounds it to the parameters'
        # dtype, and after the other.
        handles = [
            self.register_load_state_dict_pre_hook(remember),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            for handle in handles:
                handle.remove()
        self._layers.pair(self.param_groups)
        self._layers.keep_options()

    def _complete(self, group: dict[str, Any], old: dict[str, Any]) -> None:
        """Give a loaded group what was saved before an option existed, or by another optimizer, does not say."""
        for key in set(FOREIGN_KEYS) - set(self.defaults):
            group.pop(key, None)
        for key in IMPLEMENTATION_KEYS:
            group[key] = old[key]
        if "agr_step" in old:
            # Steps of torch's optimizer, before or in between, are steps of the run too.
            steps = [float(self.state[param]["step"]) for param in group["params"] if self.state.get(param)]
            group["agr_step"] = int(max([group.get("agr_step", 0), *steps]))
        for key, value in old.items():
            group.setdefault(key, value)
        group["decoupled_weight_decay"] = not self.l2_decay(group)  # type: ignore[attr-defined]

    def _check_loadable(self, given: dict[str, Any]) -> None:
        name = type(self).__name__
        groups, entries = given.get("param_groups"), given.get("state")
        if (
            not isinstance(entries, Mapping)
            or not isinstance(groups, (list, tuple))
            or not all(
                isinstance(group, Mapping) and isinstance(group.get("params"), (list, tuple)) for group in groups
            )
            or not all(isinstance(entry, Mapping) for entry in entries.values())
        ):
            raise UserError(
                f"{name} loads what state_dict() returned, a dict with a dict `state` and a list `param_groups` of dicts "
                "with `params`, but something else was given"
            )
        if any(group.get("amsgrad") for group in groups):
            raise UserError(f"this state was saved with amsgrad=True, which {name} does not have; start it afresh")
        betas = [group.get("betas", ()) for group in groups]
        if any(not isinstance(some, (list, tuple)) or len(some) != self.betas_count for some in betas):
            raise UserError(
                f"this state was saved by another optimizer: {name} has {self.betas_count} betas; start {name} afresh"
            )
        sizes = [[len(group["params"]) for group in some] for some in (groups, self.param_groups)]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"the state has groups of {sizes[0]} parameters, and {name} of {sizes[1]}; rebuild the optimizer with the "
                "saved groups, load, and then say where AGR applies "
                "(agr_hf.optim.param_groups.set_agr_flags(optimizer.param_groups, model))"
            )
        for group, (own, layers) in zip(groups, self._layers.pair(self.param_groups), strict=True):
            kept = {key: own[key] for key in ("params", *IMPLEMENTATION_KEYS)}
            if is_partitioned(own, layers):
                kept["params"] = layers  # of which `agr` may have a list
            options: Mapping[str, Any] = self.options  # type: ignore[attr-defined]
            check_group({**own, **group, **kept}, f"the state that {name} loads", options, self.betas_count)
        ids = [i for group in groups for i in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for i, param in zip(ids, params, strict=True):
            if entries.get(i):
                self._check_entry(i, param, entries[i], foreign_groups=any("decoupled" in group for group in groups))
        for group in groups:
            decoupled = group.get("decoupled_weight_decay")  # torch's Adam and AdamW say so, and ours
            ours = not self.l2_decay({**self.defaults, **group})  # type: ignore[attr-defined]
            if decoupled is not None and group.get("weight_decay") and decoupled != ours:
                kinds = ("decoupled", "L2") if decoupled else ("L2", "decoupled")
                raise UserError(
                    f"this state was saved with a weight decay of {group['weight_decay']} that is {kinds[0]}, and that of "
                    f"{name} is {kinds[1]}; load it into {'AGRAdamW' if decoupled else 'AGRAdam'}, or start {name} afresh"
                )

    def _check_entry(self, i: Any, param: Tensor, entry: Mapping[str, Any], foreign_groups: bool) -> None:
        name = type(self).__name__
        needed = ("step", *self.state_keys, *self.required_state)
        foreign = set(FOREIGN_STATE) - {*needed, *self.scalar_state, *IGNORED_STATE}
        missing = [key for key in needed if key not in entry]
        # timm's Adopt has Adam's keys, of moments of another kind, and groups that say `decoupled` as AdaL's do.
        if missing or foreign & set(entry) or (foreign_groups and "decoupled" not in self.defaults):
            raise UserError(
                f"this state was saved by another optimizer: {name} needs {', '.join(needed)} for each parameter, and that "
                f"of parameter {i} holds {', '.join(map(str, entry))}; start {name} afresh"
            )
        for key in ("step", *self.scalar_state):
            number = entry.get(key, 0.0)
            if not _is_number(number, param):
                raise UserError(
                    f"{name}: {key} of parameter {i} must be a number >= 0 or a tensor with one, but {number!r} was given; "
                    "the state is broken: load another one"
                )
        self.check_shapes(param, entry)

    def _restore(self, param: Tensor, group: dict[str, Any], saved: Mapping[str, Any]) -> None:
        """Undo the rounding of torch's load_state_dict, which casts moments to the parameter's dtype."""
        state, device = self.state[param], local(param).device
        dtypes = self.tensor_state(param, group)
        if COMPENSATION not in saved:
            dtypes.pop(COMPENSATION, None)
        for key, dtype in dtypes.items():
            state[key] = placed_like(saved[key], param).to(device=device, dtype=dtype, copy=True)
        for key, first in self.scalar_state.items():
            state[key] = as_number(saved.get(key, first), widest(device), device)
        # A fused or capturable optimizer of torch keeps it on the device, where reading it would stall every step.
        state["step"] = as_number(saved["step"], torch.float32, device if group["capturable"] else torch.device("cpu"))


def _is_number(value: Any, param: Tensor) -> bool:
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex() or (value.is_meta and not param.is_meta):
            return False
        value = value.item() if value.is_cpu else 0.0  # a device's is not waited for
    return isinstance(value, (int, float)) and value >= 0
