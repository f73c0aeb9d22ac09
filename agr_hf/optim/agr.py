"""AGR (arXiv 2407.16944): Psi, AdamW and Adam with it, and Psi before the step of any other optimizer."""

from __future__ import annotations

from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from agr_hf.optim.adam import adam_, can_fuse, fold_psi_into_momentum, fused_adam_
from agr_hf.optim.backends import multi_tensor as mt
from agr_hf.optim.backends.multi_tensor import Scalar
from agr_hf.optim.flags import agr_flags, unwrapped
from agr_hf.optim.flattened import check_not_flat, check_not_flattened, shape_of
from agr_hf.optim.hyperparameters import is_count
from agr_hf.optim.norms import is_dtensor, l1_norms, local, reduced
from agr_hf.optim.step import StepOptimizer
from agr_hf.optim.work import Batch


def agr(grad: Tensor) -> Tensor:
    """Psi(g) = g (1 - |g| / sum|g|), each element shrunk by its share of the tensor's l1 norm (eq. 1 and 2).

    Args:
        grad: a dense real tensor of any shape and dtype; a DTensor gives the same answer as the full tensor.

    Returns:
        A new tensor with the shape, dtype, device and sharding of `grad`, computed in at least float32. All-zero and
        one-element tensors, and those whose norm is infinite or NaN, come back unchanged. In bfloat16 the result equals
        `grad` for tensors over about 4,000 elements: their shares are below its precision.

    Raises:
        TypeError: `grad` is complex, sparse or not a tensor.
    """
    (norm,) = l1_norms([grad])
    grad = reduced(grad.detach())
    shrunk = shrink(local(grad), norm, grad.numel())
    return as_dtensor(shrunk, grad) if is_dtensor(grad) else shrunk


def shrink(grad: Tensor, norm: Tensor, numel: int) -> Tensor:
    """Psi of a local tensor whose whole has `numel` elements and this l1 norm (0-dim); nothing is read by the host."""
    if numel <= 1 or grad.numel() == 0:
        return grad.clone()
    usable = (norm > 0) & (norm < float("inf"))
    return shrink_all([grad.to(norm.dtype)], [torch.where(usable, norm, float("inf"))])[0].to(grad.dtype)


def as_dtensor(shard: Tensor, like: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        shard,
        like.device_mesh,  # type: ignore[attr-defined]
        like.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def psi(batch: Batch) -> list[Tensor]:
    """Psi of every gradient of a batch, or the gradients themselves where AGR does not apply."""
    if not batch.psi:
        return batch.grads
    if batch.on_host:  # where every norm is known to be usable
        shares = mt.magnitude(batch.grads)
        mt.div_(shares, batch.norms)
        return list(mt.addcmul(batch.grads, batch.grads, shares, value=-1))
    return shrink_all(batch.grads, batch.norms)


def shrink_all(grads: list[Tensor], norms: list[Scalar]) -> list[Tensor]:
    """Psi of each local tensor with the l1 norm of its whole, infinite where Psi does not apply.

    In this form such tensors pass through exactly, infinite elements included: g * (1 - max/inf) = g, where
    g - g * (inf/inf) would be NaN.
    """
    shares = mt.magnitude(grads)
    mt.clamp_max_(shares, torch.finfo(shares[0].dtype).max)
    mt.div_(shares, norms)
    mt.add_(shares, -1.0)
    mt.mul_(shares, grads)
    mt.neg_(shares)
    return list(shares)


class _AGRAdam(StepOptimizer):
    fused_devices = ("cpu",)

    def update(self, batch: Batch) -> None:
        decay = 0.0 if self.l2_decay(batch.group) else batch.group["weight_decay"]
        if batch.psi and batch.group["second_moment"] == "raw":
            if can_fuse(batch) and fold_psi_into_momentum(batch):
                fused_adam_(batch, batch.grads, decay)
            else:
                adam_(batch, psi(batch), batch.grads, decay)
            return
        grads = psi(batch)
        if can_fuse(batch):
            fused_adam_(batch, grads, decay)
        else:
            adam_(batch, grads, grads, decay)


class AGRAdamW(_AGRAdam):
    """AdamW with adaptive gradient regularization (arXiv 2407.16944, algorithm 2).

    `g~ = Psi(g);  m = b1 m + (1 - b1) g~;  v = b2 v + (1 - b2) g^2`, then AdamW's update with decoupled decay. State
    keys are those of `torch.optim.AdamW`, and either loads the other's state_dict.

    Args:
        params: parameters, or groups; `agr_param_groups(model)` makes groups by layer type as the paper applies AGR.
        lr: learning rate, a number or a tensor with one element. Default 1e-3.
        betas: decay rates of the two moments. Default (0.9, 0.999).
        eps: added to the root of the second moment. Default 1e-8.
        weight_decay: decoupled decay, `p -= lr * weight_decay * p`. Default 1e-2.
        agr: apply Psi to this group; or a list with True or False for each of its parameters. Default True.
        agr_steps: stop applying Psi after that many steps of the group (the paper's suspension, table 7); the count
            `agr_step` is part of the state_dict. Default None, never.
        min_ndim: tensors of fewer dimensions are left alone. Default 2: weights, not biases. The authors' code does 0.
        second_moment: "raw" feeds g^2 to the second moment (the paper, default), "regularized" Psi(g)^2 (the authors'
            code).
        max_grad_norm: clip the global l2 norm of all gradients of this optimizer to it before anything else, as
            `torch.nn.utils.clip_grad_norm_` does, without touching `.grad`. Under ZeroRedundancyOptimizer that is each
            process's share of them: clip outside there. Default None.
        foreach: None takes the fastest of the device (CPU: cache-sized blocks through torch's fused kernel; CUDA:
            multi-tensor). True works on all tensors at once, False on one at a time. Default None.
        fused: True insists on the one-pass kernel (CPU), False forbids it. Default None.
        maximize: ascend instead. Default False.
        capturable: keep the step count on the device, for CUDA graphs. Default False.

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter is complex, quantized or a flattened shard.

    Example:
        >>> optimizer = AGRAdamW(agr_param_groups(model, weight_decay=0.01), lr=1e-3)
        >>> Trainer(model=model, args=args, train_dataset=data, optimizers=(optimizer, None))
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        agr: bool = True,
        agr_steps: int | None = None,
        min_ndim: int = 2,
        second_moment: Literal["raw", "regularized"] = "raw",
        max_grad_norm: float | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "agr": agr,
            "agr_steps": agr_steps,
            "agr_step": 0,
            "min_ndim": min_ndim,
            "second_moment": second_moment,
            "max_grad_norm": max_grad_norm,
            "foreach": foreach,
            "fused": fused,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def l2_decay(self, group: dict[str, Any]) -> bool:
        return False


class AGRAdam(_AGRAdam):
    """Adam with adaptive gradient regularization and L2 decay (arXiv 2407.16944, algorithm 2, its L2 term).

    As `AGRAdamW`, but decay is part of the gradient: Psi and its norm are those of `g + weight_decay * p`.

    Args:
        params, lr, betas, eps: as `AGRAdamW`.
        weight_decay: L2 penalty added to the gradient. Default 0.
        agr, agr_steps, min_ndim, second_moment, max_grad_norm, foreach, fused, maximize, capturable: as `AGRAdamW`.

    Raises:
        ValueError: as `AGRAdamW`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        agr: bool = True,
        agr_steps: int | None = None,
        min_ndim: int = 2,
        second_moment: Literal["raw", "regularized"] = "raw",
        max_grad_norm: float | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "agr": agr,
            "agr_steps": agr_steps,
            "agr_step": 0,
            "min_ndim": min_ndim,
            "second_moment": second_moment,
            "max_grad_norm": max_grad_norm,
            "foreach": foreach,
            "fused": fused,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(params, defaults)


# Live handles: Psi of Psi is nobody's rule.
_ATTACHED: WeakKeyDictionary[torch.optim.Optimizer, AGRHandle] = WeakKeyDictionary()


class AGRHandle:
    """What `attach_agr` returns: `.remove()` ends it, `.steps` says when it ends by itself."""

    def __init__(self, optimizer: torch.optim.Optimizer, min_ndim: int, steps: int | None) -> None:
        self.min_ndim = min_ndim
        self.steps = steps
        self._made_with = [shape_of(group) for group in optimizer.param_groups]
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
            self._regularize(self._advance(optimizer))
            return None
        params = self._advance(optimizer)

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

    def _advance(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """Parameters that Psi applies to in this step. The count lives in the group, so that checkpoints keep it."""
        active: list[Tensor] = []
        check_not_flattened("attach_agr", optimizer.param_groups, self._made_with)
        self._count(optimizer)
        for group in optimizer.param_groups:
            done = group["agr_step"]
            if self.steps is None or done < self.steps:
                active += [param for param, flag in zip(group["params"], agr_flags(group), strict=True) if flag]
            group["agr_step"] = done + 1
        return active

    @torch.no_grad()
    def _regularize(self, params: list[Tensor]) -> None:
        pairs = [(p, reduced(p.grad)) for p in params if p.grad is not None and p.ndim >= self.min_ndim]
        for (param, grad), norm in zip(pairs, l1_norms([grad for _, grad in pairs]), strict=True):
            shrunk = shrink(local(grad), norm, grad.numel())
            if grad is param.grad:
                local(grad).copy_(shrunk)
            else:
                param.grad = as_dtensor(shrunk, grad)


def attach_agr(optimizer: torch.optim.Optimizer, *, min_ndim: int = 2, steps: int | None = None) -> AGRHandle:
    """Apply Psi to the gradients before every step of any torch optimizer (Lion, Muon, SGD, a third party's).

    It changes `.grad` in place: that is its job. Both moments of an Adam then see Psi(g), which is
    `second_moment="regularized"`; the paper's rule is `AGRAdamW`. Groups with `agr=False` (see `agr_param_groups`) are
    left alone. A step with a closure is regularized after each evaluation of the closure.

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
