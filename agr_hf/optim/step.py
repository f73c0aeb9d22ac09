"""The step that every optimizer of the package shares: one reduction, then one pass.

A rule (agr.py, adal.py, adan.py, acprop.py, nosadam.py) says only how a batch of gradients changes parameters and
state. Everything that is hard for all of them is solved here once: low precision, memory formats, shards, clipping,
L2 decay, late parameters, checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from agr_hf.optim.backends.capture import check_graph_capture
from agr_hf.optim.flags import agr_flags
from agr_hf.optim.flattened import check_not_flat, check_not_flattened, shape_of
from agr_hf.optim.hyperparameters import check_group, with_plain_numbers
from agr_hf.optim.layout import Layout
from agr_hf.optim.norms import is_dtensor, local, placed_like, reduced, widest
from agr_hf.optim.reduction import reduce_norms
from agr_hf.optim.work import Batch, Work, batches

# How a step is computed is this run's choice; what it computes is the checkpoint's.
IMPLEMENTATION_KEYS = ("foreach", "fused", "capturable")
# Keys of torch's optimizers that mean nothing here, and would mislead a torch optimizer that loads our state later.
FOREIGN_KEYS = ("amsgrad", "differentiable", "decoupled_weight_decay", "decoupled")
# A key of AdaL's groups alone: its moments are of gradients multiplied by their norm, under the same names as Adam's.
ADAL_KEY = "decoupled"
TRAINABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What an optimizer may find in the state of a relative and need not understand: Adan takes AGRAdan's.
HARMLESS_STATE = ("pre_l1_norm", "lookahead_slow_buff")


class StepOptimizer(torch.optim.Optimizer):
    """Base of the package's optimizers. A subclass states its state and its rule:

    - `state_keys`: names of the state tensors shaped like the parameter;
    - `scalar_state`: names of per-parameter 0-dim state tensors with their first values (kept in float64, where there is);
    - `required_state`: names of `scalar_state` without which a loaded state means nothing;
    - `uses_norms`: whether the rule needs every l1 norm (AGR's are asked for where Psi applies);
    - `fused_devices`: types of the devices on which it has a one-pass kernel;
    - `l2_decay(group)`: whether weight decay is part of the gradient (L2) or left to the rule (decoupled);
    - `update(batch)`: the rule.
    """

    state_keys: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    scalar_state: Mapping[str, float] = {}
    required_state: tuple[str, ...] = ()
    uses_norms = False
    fused_devices: tuple[str, ...] = ()
    betas_count = 2
    # What `clip_next_step` asked for, until the step: the limit, and the tensor that gets the norm. Not part of the state.
    _clip_request: tuple[float, Tensor] | None = None

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        # Of each group as it was made: how many matrices, and which vectors.
        self._made_with: list[tuple[int, set[int]]] = []
        super().__init__(params, defaults)

    # ---- to be stated by a rule

    def l2_decay(self, group: dict[str, Any]) -> bool:
        return True

    def update(self, batch: Batch) -> None:
        raise NotImplementedError(f"{type(self).__name__} states no rule: define update(batch)")

    def finish(self, works: list[Work]) -> None:
        """Bring `scalar_state` up to date, once a tensor and step: `update` sees large tensors in pieces."""

    # ---- parameters

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see `torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: a hyperparameter is out of range, or a parameter is complex or a flattened shard.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group, type(self).__name__, self.betas_count)
            for param in group["params"]:
                self._check_param(param, group)
        except Exception:
            self.param_groups.pop()
            raise
        with_plain_numbers(group)
        group["decoupled_weight_decay"] = not self.l2_decay(group)
        self._made_with.append(shape_of(group))

    def _check_param(self, param: Tensor, group: dict[str, Any]) -> None:
        name = type(self).__name__
        if group["fused"] and param.device.type not in self.fused_devices:
            raise ValueError(
                f"fused=True was given, but {name} has no fused kernel on {param.device.type}"
                + (f" (only on {', '.join(self.fused_devices)})" if self.fused_devices else "")
                + "; leave fused=None for the fastest step there is"
            )
        if param.dtype not in TRAINABLE:
            raise ValueError(
                f"{name} trains parameters of float16, bfloat16, float32 and float64, but one of dtype {param.dtype} and "
                f"shape {tuple(param.shape)} was given; view a complex parameter as real (torch.view_as_real) and leave "
                "quantized ones (integers, float8) out"
            )
        check_not_flat(name, param)

    # ---- the step

    def clip_next_step(self, max_norm: float) -> Tensor:
        """Clip the global l2 norm of all gradients to `max_norm` in the next step only, as clip_grad_norm_ before it would.

        `.grad` is not changed. Where a group has a `max_grad_norm`, the smaller limit counts. Of several calls before a step
        the last one counts.

        Args:
            max_norm: > 0; math.inf measures only.

        Returns:
            0-dim float32 tensor on the device of the first parameter: NaN until the next step fills it with the norm found
            before clipping.

        Raises:
            ValueError: `max_norm` is no number > 0.
        """
        if not max_norm > 0:
            raise ValueError(
                f"{type(self).__name__}: max_norm={max_norm!r} is not allowed; it must be a number > 0, or inf to measure"
            )
        first = next(param for group in self.param_groups for param in group["params"])
        norm = torch.full((), math.nan, dtype=torch.float32, device=local(first).device)
        self._clip_request = (float(max_norm), norm)
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: clears the gradients, computes the loss, calls backward and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: a gradient is sparse, or the layers of a group were flattened after it was made.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_graph_capture(self)
        check_not_flattened(type(self).__name__, self.param_groups, self._made_with)
        self._check_gradients()
        works = [work for group in self.param_groups for work in self._collect(group)]
        request, self._clip_request = self._clip_request, None
        if request is not None and not works:
            request[1].zero_()
        if works:
            scales = reduce_norms(works, self.param_groups, request)
            for group in self.param_groups:
                mine = [work for work in works if work.group is group]
                for batch, written in batches(mine, scales[id(group)]):
                    self.update(batch)
                    for target, source in written:
                        target.copy_(source)
            for work in works:
                if work.target is not None:
                    work.target.copy_(work.param)
            self.finish(works)
        return loss

    def _check_gradients(self) -> None:
        """Before anything changes: a refused step must not count as made."""
        for group in self.param_groups:
            if "agr" in self.defaults:
                agr_flags(group)  # refuses a list of another length
            for param in group["params"]:
                grad = param.grad
                if grad is not None and grad.layout != torch.strided:
                    raise RuntimeError(
                        f"{type(self).__name__} does not take sparse gradients, but one of layout {grad.layout} and shape "
                        f"{tuple(grad.shape)} was given; make the embedding with sparse=False"
                    )
                if grad is not None and grad.shape != param.shape:
                    raise ValueError(
                        f"{type(self).__name__}: a gradient has the shape {tuple(grad.shape)} and its parameter "
                        f"{tuple(param.shape)}; the parameter was changed since: compute the gradient anew"
                    )
                if grad is not None and param in self.state:
                    self._check_shapes(param, self.state[param])

    def _check_shapes(self, param: Tensor, state: Mapping[str, Any]) -> None:
        """State of another shape would send the fused kernel past the end of its memory."""
        for key in self.state_keys:
            if key in state and state[key].shape != param.shape:
                raise ValueError(
                    f"{type(self).__name__}: {key} has the shape {tuple(state[key].shape)} and its parameter "
                    f"{tuple(param.shape)}; the state belongs to another model, or the parameter was changed since: load "
                    "the state of this model, or make the optimizer anew"
                )

    def _collect(self, group: dict[str, Any]) -> list[Work]:
        # Not `in group`: groups of agr_param_groups name `agr` for optimizers that have none.
        flags = agr_flags(group) if "agr" in self.defaults else [False] * len(group["params"])
        active = any(flags) and (group["agr_steps"] is None or group["agr_step"] < group["agr_steps"])
        works = []
        for param, flag in zip(group["params"], flags, strict=True):
            grad = param.grad
            if grad is None:
                continue
            state = self.state[param]
            made = "step" not in state
            if made:
                self._init_state(param, group, state)
            work = Work(param, reduced(grad, param), group)
            work.first = made or (not group["capturable"] and not state["step"])
            state["step"] += 1
            # float64: 1 - 0.999^t loses four digits in float32.
            work.step = state["step"].double() if group["capturable"] else state["step"].item()
            work.scalars = {key: state[key] for key in ("step", *self.scalar_state)}
            if work.param.numel():
                work.state = self._local_state(param, state, work.layout)
            # A one-element tensor's share of its own norm is 1: Psi would erase it.
            work.psi = active and flag and param.ndim >= group["min_ndim"] and param.numel() > 1
            work.needs_norm = work.psi or self.uses_norms
            work.coupled = bool(group["weight_decay"]) and self.l2_decay(group)
            works.append(work)
        if works and any(flags):
            group["agr_step"] += 1
        return works

    def _init_state(self, param: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        device = local(param).device if group["capturable"] else torch.device("cpu")
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        dtype = torch.promote_types(param.dtype, torch.float32)
        for key in self.state_keys:
            state[key] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        for key, value in self.scalar_state.items():
            # With the gradients: a norm of a GPU's gradient must never be waited for.
            on = local(param).device
            state[key] = torch.full((), value, dtype=widest(on), device=on)  # filled there: a copy would be waited for

    def _local_state(self, param: Tensor, state: dict[str, Any], layout: Layout) -> dict[str, Tensor]:
        locals_: dict[str, Tensor] = {}
        for key in self.state_keys:
            tensor = local(state[key])
            if tensor.dtype != (dtype := torch.promote_types(param.dtype, torch.float32)):
                state[key] = state[key].to(dtype)  # the model's precision changed in mid-run
                tensor = local(state[key])
            if layout.view(tensor) is None:
                # Loaded from a file that keeps no strides, or the model changed its memory format since.
                tensor = layout.relaid(tensor)
                if is_dtensor(param):
                    state[key].to_local().set_(tensor)
                else:
                    state[key] = tensor
            locals_[key] = tensor
        return locals_

    # ---- checkpoints

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "defaults" in state:  # unpickled or copied; load_state_dict looks after its own groups
            self._made_with = [shape_of(group) for group in self.param_groups]
            for group in self.param_groups:
                _complete(group, self.defaults, self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer, or of torch's optimizer with the same state keys.

        Moments come back in float32 (float64 for float64 parameters) whatever the parameter's dtype. Options that the
        file does not know (a state saved by torch.optim.AdamW has no `agr`) keep this optimizer's values, and so do
        `foreach`, `fused` and `capturable`, which say how and not what to compute.

        Tensors may be whole or DTensors, and are laid over the processes as the parameters are; all processes call it.

        Args:
            state_dict: what `state_dict()` returned. It is copied, and never changed by later steps.

        Raises:
            ValueError: the groups do not match, or the state was saved by an optimizer with other state keys.
        """
        final: dict[str, Any] = {}
        before = [dict(group) for group in self.param_groups]

        def remember(_: torch.optim.Optimizer, given: dict[str, Any]) -> None:
            self._check_loadable(given)
            final.update(given)

        def restore(_: torch.optim.Optimizer) -> None:
            ids = [i for group in final["param_groups"] for i in group["params"]]
            params = [param for group in self.param_groups for param in group["params"]]
            groups = [group for group in self.param_groups for _ in group["params"]]
            for i, param, group in zip(ids, params, groups, strict=True):
                if i in final["state"]:
                    self._restore(param, group, final["state"][i])
            for group, old in zip(self.param_groups, before, strict=True):
                for key in set(FOREIGN_KEYS) - set(self.defaults):
                    group.pop(key, None)
                for key in IMPLEMENTATION_KEYS:
                    group[key] = old[key]
                _complete(group, old, self.state)
                group["decoupled_weight_decay"] = not self.l2_decay(group)

        # The user's own hooks come before the one, which sees what they leave before torch rounds it to the parameters'
        # dtype, and after the other.
        handles = [
            self.register_load_state_dict_pre_hook(remember),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _check_loadable(self, given: dict[str, Any]) -> None:
        name = type(self).__name__
        if any(group.get("amsgrad") for group in given["param_groups"]):
            raise ValueError(f"this state was saved with amsgrad=True, which {name} does not have; start it afresh")
        if any(len(group.get("betas", ())) != self.betas_count for group in given["param_groups"]):
            raise ValueError(
                f"this state was saved by another optimizer: {name} has {self.betas_count} betas; start {name} afresh"
            )
        if given["state"] and any(
            (ADAL_KEY in group) != (ADAL_KEY in self.defaults) for group in given["param_groups"]
        ):
            raise ValueError(
                "this state was saved by another optimizer: AdaL's moments are of gradients multiplied by their layer's l1 "
                f"norm, and with moments of another scale training would stand still or leap; start {name} afresh"
            )
        sizes = [[len(group["params"]) for group in groups] for groups in (given["param_groups"], self.param_groups)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"this state was saved of groups of {sizes[0]} parameters, and {name} has groups of {sizes[1]}: a state "
                "fits the groups that it was saved of; make the optimizer with those, and tell it afterwards where AGR "
                "applies (agr_hf.optim.param_groups.set_agr_flags(optimizer.param_groups, model))"
            )
        for group, own in zip(given["param_groups"], self.param_groups, strict=True):
            kept = {key: own[key] for key in ("params", *IMPLEMENTATION_KEYS)}
            check_group({**own, **group, **kept}, f"the state that {name} loads", self.betas_count)
        ids = [i for group in given["param_groups"] for i in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        needed = ("step", *self.state_keys, *self.required_state)
        known = {*needed, *self.scalar_state, *HARMLESS_STATE}
        for i, param in zip(ids, params, strict=True):
            state = given["state"].get(i)
            if not state:
                continue
            if not set(needed) <= set(state) <= known:
                raise ValueError(
                    f"this state was saved by another optimizer: {name} needs {', '.join(needed)} for each parameter, but "
                    f"that of parameter {i} holds {', '.join(map(str, state))}; start {name} afresh"
                )
            self._check_shapes(param, state)
        for group in given["param_groups"]:
            decoupled = group.get("decoupled_weight_decay")  # torch's Adam and AdamW say so, and ours
            ours = not self.l2_decay({**self.defaults, **group})
            if decoupled is not None and group.get("weight_decay") and decoupled != ours:
                kinds = ("decoupled", "L2") if decoupled else ("L2", "decoupled")
                raise ValueError(
                    f"this state was saved with a weight decay of {group['weight_decay']} that is {kinds[0]}, and that of "
                    f"{name} is {kinds[1]}; load it into {'AGRAdamW' if decoupled else 'AGRAdam'}, or start {name} afresh"
                )

    def _restore(self, param: Tensor, group: dict[str, Any], saved: dict[str, Any]) -> None:
        """Undo the rounding of torch's load_state_dict, which casts moments to the parameter's dtype."""
        state = self.state[param]
        if not state:
            return
        device = local(param).device
        dtype = torch.promote_types(param.dtype, torch.float32)
        for key in self.state_keys:
            state[key] = placed_like(saved[key], param).to(device=device, dtype=dtype, copy=True)
        for key, first in self.scalar_state.items():
            value = saved.get(key, first)
            state[key] = torch.as_tensor(value, dtype=torch.float64).to(device, widest(device), copy=True)
        # A fused or capturable optimizer of torch keeps it on the device, where reading it would stall every step.
        step = torch.as_tensor(saved["step"], dtype=torch.float32)
        state["step"] = step.to(device if group["capturable"] else "cpu", copy=True)


def _complete(group: dict[str, Any], values: Mapping[str, Any], state: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Give a group that was saved before an option existed, or by another optimizer, the values it lacks."""
    if "agr_step" in values:
        # Steps made without AGR, by torch's optimizer before or in between, are steps of the run all the same.
        steps = [float(state[param]["step"]) for param in group["params"] if state.get(param)]
        group["agr_step"] = int(
            max(steps, default=0.0) if "agr_step" not in group else max(group["agr_step"], *steps, 0)
        )
    for key, value in values.items():
        group.setdefault(key, value)
