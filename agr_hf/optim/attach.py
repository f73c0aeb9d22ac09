"""Psi before the step of any torch optimizer."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from agr_hf.optim.flags import agr_flags, is_suspended, unwrapped
from agr_hf.optim.flattened import GivenLayers, check_not_flat, check_not_flattened, is_deepspeed_here
from agr_hf.optim.layout import is_expanded
from agr_hf.optim.norms import check_dense_real, local_sums
from agr_hf.optim.options import is_count
from agr_hf.optim.psi import shrink
from agr_hf.optim.shards import LiveGroups, add_over_shards, as_dtensor, is_dtensor, local, reduced
from agr_hf.optim.step import StepOptimizer

# Live handles: Psi of Psi is nobody's rule.
_ATTACHED: WeakKeyDictionary[torch.optim.Optimizer, AGRHandle] = WeakKeyDictionary()


class AGRHandle:
    """What `attach_agr` returns: `.remove()` ends it, `.steps` says when it ends by itself."""

    def __init__(self, optimizer: torch.optim.Optimizer, min_ndim: int, steps: int | None) -> None:
        self.min_ndim = min_ndim
        self.steps = steps
        self._layers = GivenLayers(optimizer.param_groups)
        for group in optimizer.param_groups:
            for param in group["params"]:
                check_not_flat("attach_agr", param)
            group.setdefault("agr_step", 0)
        loading = getattr(optimizer, "_base_optimizer", optimizer)  # timm's Lookahead leaves it to what it wraps
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            loading.register_load_state_dict_post_hook(self._count),
        ]
        _ATTACHED[optimizer] = self

    def remove(self) -> None:
        """Leave the gradients of later steps as they are. May be called twice."""
        for hook in self._hooks:
            hook.remove()
        for optimizer in [optimizer for optimizer, handle in _ATTACHED.items() if handle is self]:
            del _ATTACHED[optimizer]

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # With a closure the gradients of this step do not exist yet: Psi goes behind each of its evaluations.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            live_groups = LiveGroups(
                optimizer.param_groups, [param.grad for group in optimizer.param_groups for param in group["params"]]
            )
            self._regularize(self._find_active(optimizer), live_groups)
            self._advance(optimizer, live_groups)
            return None
        params = self._find_active(optimizer)
        self._advance(optimizer, None)

        def regularized_closure() -> Any:
            loss = closure()
            with torch.no_grad():
                self._regularize(params)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": regularized_closure}
        return (args[0], regularized_closure, *args[2:]), kwargs

    @staticmethod
    def _count(optimizer: torch.optim.Optimizer) -> None:
        """Give a count to groups without one: loaded from a state saved without AGR, whose steps are steps of the run too,
        or added since."""
        for group in optimizer.param_groups:
            if "agr_step" not in group:
                steps = [optimizer.state[p]["step"] for p in group["params"] if "step" in optimizer.state.get(p, {})]
                group["agr_step"] = int(max(map(float, steps), default=0))

    def _find_active(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """Parameters that Psi applies to in this step."""
        active: list[Tensor] = []
        if is_deepspeed_here():
            check_not_flattened("attach_agr", self._layers.pair(optimizer.param_groups))
        self._count(optimizer)
        for group in optimizer.param_groups:
            if not is_suspended(group) and (self.steps is None or group["agr_step"] < self.steps):
                active += [param for param, flag in zip(group["params"], agr_flags(group), strict=True) if flag]
        return active

    @staticmethod
    def _advance(optimizer: torch.optim.Optimizer, live_groups: LiveGroups | None) -> None:
        """Count this step of the groups that have a gradient, as the package's own optimizers count, or of all where only a
        closure will tell. The count lives in the group, so that checkpoints keep it."""
        # A GradScaler lets a fused optimizer see the step that it skips.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return
        for i, group in enumerate(optimizer.param_groups):
            is_sharded = any(is_dtensor(param) for param in group["params"])
            if live_groups is None or live_groups.counts(i, group, is_sharded):
                group["agr_step"] += 1

    @torch.no_grad()
    def _regularize(self, params: list[Tensor], live_groups: LiveGroups | None = None) -> None:
        params = [param for param in params if param.ndim >= self.min_ndim]
        here = [(i, reduced(param.grad, param)) for i, param in enumerate(params) if param.grad is not None]
        for _, grad in here:
            check_dense_real(grad)
        sums: list[Any] = [0.0] * len(params)
        for (i, _), total in zip(here, local_sums([local(grad) for _, grad in here]), strict=True):
            sums[i] = total
        # Of all parameters, for ranks may have different gradients: what this one lacks counts as zero.
        add_over_shards([(sums, range(len(params)))], params, live_groups)
        for i, grad in here:
            param, norm = params[i], sums[i]
            shrunk = shrink(local(grad), norm, grad.numel())
            if grad is param.grad and not is_expanded(local(grad)):
                local(grad).copy_(shrunk)
            else:
                param.grad = as_dtensor(shrunk, grad) if is_dtensor(grad) else shrunk


def has_agr(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the steps of an optimizer apply AGR: it is one of the package's with AGR, or AGR is attached to it. Its groups
    do not tell: torch's optimizers take over every key of a state that they load."""
    return "agr" in optimizer.defaults or optimizer in _ATTACHED


def attach_agr(optimizer: torch.optim.Optimizer, *, min_ndim: int = 2, steps: int | None = None) -> AGRHandle:
    """Apply Psi to the gradients before every step of any torch optimizer (Lion, Muon, SGD, a third party's).

    It changes `.grad` in place, or replaces one that was expanded: that is its job. Both moments of an Adam then see
    Psi(g), which is `second_moment="regularized"`; the paper's rule is `AGRAdamW`. Groups with `agr=False` (see
    `agr_param_groups`) are left alone. A step with a closure is regularized after each evaluation of the closure.

    Args:
        optimizer: any torch optimizer; of an accelerate-prepared one the optimizer inside is taken.
        min_ndim: tensors of fewer dimensions are left alone. Default 2.
        steps: stop after that many steps. The count is the group's `agr_step`, part of the optimizer's state_dict.
            Default None, never.

    Returns:
        A handle with `.remove()`. Attach again after copying or unpickling the optimizer: torch does not keep hooks.

    Raises:
        TypeError: `optimizer` is no torch optimizer, or already applies AGR itself.
        RuntimeError: AGR is attached to it already.
        ValueError: `min_ndim` or `steps` is no whole number >= 0, or a parameter is a flat one of FSDP1. A step raises
            RuntimeError where DeepSpeed ZeRO has flattened the layers since.
    """
    optimizer = unwrapped(optimizer)  # accelerate's wrapper never runs its own hooks
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"attach_agr takes a torch.optim.Optimizer, but {type(optimizer).__name__} was given")
    base = getattr(optimizer, "_base_optimizer", optimizer)  # timm's Lookahead
    if isinstance(base, StepOptimizer) and "agr" in base.defaults:
        raise TypeError(
            f"{type(base).__name__} applies AGR itself; attaching it again would apply Psi twice. Use its own "
            "options agr, agr_steps and min_ndim"
        )
    if optimizer in _ATTACHED or base in _ATTACHED:
        raise RuntimeError(
            f"AGR is attached to this {type(optimizer).__name__} already; call .remove() on the handle of the first time"
        )
    for key, value in (("min_ndim", min_ndim), ("steps", steps)):
        if not (is_count(value) or (key == "steps" and value is None)):
            raise ValueError(f"attach_agr: {key}={value!r} is not allowed; it must be a whole number >= 0")
    return AGRHandle(optimizer, min_ndim, steps)
