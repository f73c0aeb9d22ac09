"""The step of each parameter inside of the backward pass: no two gradients need be in memory at a time."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from agr_hf.optim.flags import unwrapped
from agr_hf.optim.shards import is_dtensor
from agr_hf.optim.step import StepOptimizer

# Optimizers with a live handle.
_HANDLED: WeakSet[StepOptimizer] = WeakSet()


class InBackwardHandle:
    """What `step_in_backward` returns: `.remove()` ends it."""

    def __init__(self, optimizer: StepOptimizer) -> None:
        self._optimizer = optimizer
        self._inner: dict[Tensor, tuple[StepOptimizer, int, int]] = {}  # with the group, and the place in it
        self._stepped: set[Tensor] = set()  # since the last call of `optimizer.step`
        self._counts: list[int | None] = []  # of the groups, before that call
        self._hooks: list[Any] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self._take_params()
        _HANDLED.add(optimizer)

    def _take_params(self) -> None:
        """Step in their backward pass what is trained now: layers are unfrozen, and groups added, in the middle of a run."""
        index = 0
        for number, group in enumerate(self._optimizer.param_groups):
            for place, param in enumerate(group["params"]):
                if param.requires_grad and param not in self._inner:
                    make: Any = type(self._optimizer)
                    self._inner[param] = make([param]), number, place
                    self._inner[param][0].first_index = index  # it draws the random bits of its place
                    self._hooks.append(param.register_post_accumulate_grad_hook(self._step))
                index += 1

    def remove(self) -> None:
        """Leave the gradients of later backward passes to `optimizer.step`. May be called twice."""
        for hook in self._hooks:
            hook.remove()
        _HANDLED.discard(self._optimizer)

    def _step(self, param: Tensor) -> None:
        optimizer, name = self._optimizer, type(self._optimizer).__name__
        if param in self._stepped:
            raise RuntimeError(
                f"{name} steps in the backward pass, and a parameter of shape {tuple(param.shape)} got a second gradient "
                "before optimizer.step(): gradients cannot be accumulated so; call optimizer.step() after each backward "
                "pass, or .remove() the handle of step_in_backward"
            )
        check_alone(optimizer)
        inner, number, place = self._inner[param]
        group = optimizer.param_groups[number]
        inner.param_groups[0].update({**group, "params": [param]})
        if isinstance(group.get("agr"), list):
            inner.param_groups[0]["agr"] = group["agr"][place]
        inner.state[param] = optimizer.state[param]
        inner.step()
        param.grad = None
        self._stepped.add(param)

    def _before_step(self, optimizer: StepOptimizer, args: Any, kwargs: Any) -> None:
        if optimizer._clip_request is not None:
            optimizer._clip_request = None
            raise RuntimeError(
                f"{type(optimizer).__name__} steps in the backward pass, where the norm of all gradients is not known yet: "
                "leave clipping out (max_grad_norm=0 in TrainingArguments)"
            )
        self._counts = [group.get("agr_step") for group in optimizer.param_groups]

    def _after_step(self, optimizer: StepOptimizer, args: Any, kwargs: Any) -> None:
        for group, count in zip(optimizer.param_groups, self._counts, strict=True):
            # Once, though the step itself counts too where it finds the gradient of a layer that was just unfrozen.
            if count is not None and not self._stepped.isdisjoint(group["params"]):
                group["agr_step"] = count + 1
        self._stepped.clear()
        self._take_params()


def check_alone(optimizer: StepOptimizer) -> None:
    """Raise RuntimeError where a gradient is not complete, or not final, when the backward pass has made it."""
    name = type(optimizer).__name__
    if any(group["max_grad_norm"] is not None for group in optimizer.param_groups):
        raise RuntimeError(
            f"{name}: max_grad_norm={[group['max_grad_norm'] for group in optimizer.param_groups]} needs all gradients "
            "before the first step; leave it None, or do not step in the backward pass"
        )
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    world = torch.distributed.get_world_size() if distributed else 1
    if world > 1:
        raise RuntimeError(
            f"{name}: in a job of {world} processes gradients are added up after they are made; step_in_backward is for one "
            "process. FSDP2 shares out gradients and state instead"
        )
    if any(is_dtensor(param) for group in optimizer.param_groups for param in group["params"]):
        raise RuntimeError(
            f"{name}: step_in_backward takes whole parameters, but DTensors were given; use optimizer.step"
        )


def step_in_backward(optimizer: torch.optim.Optimizer) -> InBackwardHandle:
    """Step each parameter as soon as its gradient is complete, and free the gradient: a model then needs the memory of its
    largest gradient, and not of all of them.

    AGR's and AdaL's norms are of one tensor, so the step is the same to the bit. Call `loss.backward()` and
    `optimizer.step()` as before, one after the other; `step` then counts only, and `zero_grad` finds nothing. Learning rates
    are those of the moment of the backward pass.

    Args:
        optimizer: one of the package's, or accelerate's wrapper of it; of whole parameters, in one process.

    Returns:
        A handle with `.remove()`.

    Raises:
        TypeError: `optimizer` is none of the package's.
        RuntimeError: gradients would change after they were made: `max_grad_norm` is set, or several processes share the
            job. So do a backward pass that accumulates gradients, and a step that is asked to clip. Clipping or scaling by
            others (`torch.nn.utils.clip_grad_norm_`) finds no gradients, and does nothing. Or the optimizer steps in the
            backward pass already.
    """
    inner = unwrapped(optimizer)
    if not isinstance(inner, StepOptimizer):
        raise TypeError(f"step_in_backward takes an optimizer of agr_hf, but {type(inner).__name__} was given")
    check_alone(inner)
    if inner in _HANDLED:
        raise RuntimeError(
            f"this {type(inner).__name__} steps in the backward pass already; call .remove() on the handle of the first time"
        )
    return InBackwardHandle(inner)
