"""The step that every optimizer of the package shares: one reduction, then one pass.

A rule (agr_adam.py, adal.py, adan.py, acprop.py, nosadam.py) says only how a batch of gradients changes parameters and
state. What is hard for all of them is done once: the plan of a step in plan.py, sums over tensors, shards and clipping here,
low precision and memory formats in the backends, state and checkpoints in state.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, Signature, signature
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from agr_hf.errors import suggest
from agr_hf.optim.backends import native
from agr_hf.optim.backends.capture import check_graph_capture, untraced
from agr_hf.optim.flattened import check_not_flat, check_not_flattened, is_deepspeed_here
from agr_hf.optim.layout import check_no_shared_memory
from agr_hf.optim.options import Option, StepOptions, check_group, check_numbers, read_options, use_plain_numbers
from agr_hf.optim.part import Present, Sums
from agr_hf.optim.plan import Plan
from agr_hf.optim.shards import LiveGroups, Scalar, as_number, local, widest
from agr_hf.optim.state import StatefulOptimizer
from agr_hf.optim.zero import Partition, PartitionStep, check_loaded, is_partitioned

if TYPE_CHECKING:
    from agr_hf.optim.backends.lists import Batch, Item

TRAINABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class StepOptimizer(StatefulOptimizer):
    """Base of the package's optimizers. A subclass states its state (see `StatefulOptimizer`), its options and its rule:

    - `option_types`: the TypedDict of its keyword options (options.py);
    - `uses_norms`: whether the rule needs every l1 norm (AGR's are asked for where Psi applies);
    - `native_rule`: the rule of backends/native.py that computes it, if any;
    - `l2_decay(group)`: whether weight decay is part of the gradient (L2) or left to the rule (decoupled);
    - `update(batch)`: the rule.
    """

    option_types: ClassVar[type] = StepOptions
    options: ClassVar[Mapping[str, Option]] = {}
    uses_norms = False
    native_rule: ClassVar[str | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the options one by one in the signature of the class, to people, integrations and documentation."""
        super().__init_subclass__(**kwargs)
        found = read_options(cls.option_types)
        cls.options = {name: option for name, (_, option) in found.items()}
        given = [
            p for p in list(signature(cls.__init__).parameters.values())[1:] if p.kind is not Parameter.VAR_KEYWORD
        ]
        keywords = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=option.default, annotation=kind)
            for name, (kind, option) in found.items()
        ]
        cls.__signature__ = Signature([*given, *keywords])  # type: ignore[attr-defined]

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        betas: tuple[float, ...],
        eps: float,
        weight_decay: float,
        **options: Any,
    ) -> None:
        unknown = [key for key in options if key not in self.options]
        if unknown:
            known = ["lr", "betas", "eps", "weight_decay", *self.options]
            shown = ", ".join(f"{key}{suggest(key, known)}" for key in unknown)
            raise TypeError(f"{type(self).__name__} has no option {shown}; it has {', '.join(known)}")
        if isinstance(params, torch.nn.Module):
            raise TypeError(
                f"{type(self).__name__} takes parameters, but a model ({type(params).__name__}) was given; pass "
                f"agr_param_groups(model), or model.parameters()"
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {key: option.default for key, option in self.options.items()} | options
        if "agr" in defaults:
            defaults |= {"agr_step": 0, "agr_suspended": False}
        self._reset()
        super().__init__(params, defaults)

    def _reset(self) -> None:
        super()._reset()
        self.plan: Plan | None = None
        self.first_index = 0  # of its parameters among those of an optimizer that hands them out one by one
        self.partition: Partition | None = None  # the parameters are pieces of layers in it
        self._partitions: dict[int, PartitionStep] = {}  # by the id of the flat tensor, which it keeps
        self._clip_request: tuple[float, Tensor] | None = None  # of `clip_next_step`: the limit, and what gets the norm

    # ---- stated by a rule

    def l2_decay(self, group: Mapping[str, Any]) -> bool:
        return True

    def update(self, batch: Batch) -> None:
        raise NotImplementedError(f"{type(self).__name__} states no rule: define update(batch)")

    def finish(self, items: list[Item]) -> None:
        """Bring `scalar_state` up to date, once a tensor and step: `update` sees large tensors in pieces."""

    # ---- parameters

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see `torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: a hyperparameter is out of range, or a parameter is complex, quantized, a flattened shard, or shares
                memory with another one.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group, type(self).__name__, self.options, self.betas_count)
            for param in group["params"]:
                self._check_param(param, group)
            check_no_shared_memory(type(self).__name__, [local(p) for g in self.param_groups for p in g["params"]])
        except Exception:
            self.param_groups.pop()
            raise
        use_plain_numbers(group)
        group["decoupled_weight_decay"] = not self.l2_decay(group)
        self._layers.add(group)

    def _check_param(self, param: Tensor, group: dict[str, Any]) -> None:
        name = type(self).__name__
        if is_lazy(param):
            raise ValueError(
                f"{name}: a parameter has no shape yet (a lazy layer's); run the model on one batch before the optimizer is "
                "made"
            )
        if param.dtype not in TRAINABLE:
            raise ValueError(
                f"{name} trains parameters of float16, bfloat16, float32 and float64, but one of dtype {param.dtype} and "
                f"shape {tuple(param.shape)} was given; view a complex parameter as real (torch.view_as_real) and leave "
                "quantized ones (integers, float8) out"
            )
        if group["rounding"] != "nearest" and param.dtype == torch.float16:
            raise ValueError(
                f"{name}: rounding={group['rounding']!r} is for bfloat16 parameters, and one of float16 was given; train "
                "float32 parameters under autocast, or bfloat16 ones"
            )
        if group["fused"]:
            kernel = native.missing_kernel(self.native_rule, local(param))
            if kernel:
                raise ValueError(
                    f"fused=True was given, but {name} has no fused kernel {kernel}; leave fused=None for the fastest step "
                    "there is"
                )
        check_not_flat(name, param)

    # ---- the step

    def clip_next_step(self, max_norm: float) -> Tensor:
        """Clip the global l2 norm of all gradients in the next step only, as `clip_grad_norm_` before it would.

        `.grad` is not changed. Where a group has a `max_grad_norm`, the smaller limit counts. Of several calls before a step
        the last one counts. A step that a GradScaler leaves out is none: the request waits for the step after it, which its
        own call replaces; Trainer and Accelerate take care of it.

        Args:
            max_norm: > 0; math.inf measures only.

        Returns:
            A 0-dim float32 tensor on the device of the first parameter: NaN until the next step fills it with the norm found
            before clipping.

        Raises:
            ValueError: `max_norm` is no number > 0.
        """
        if not max_norm > 0:
            raise ValueError(
                f"{type(self).__name__}: max_norm={max_norm!r} is not allowed; it must be a number > 0, or inf to measure"
            )
        device = local(self.param_groups[0]["params"][0]).device
        norm = torch.full((), math.nan, dtype=torch.float32, device=device)
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
            ValueError: a gradient or state does not fit its parameter, two parameters share memory, or what was written into
                a group is no value of its option. A step that raises has changed nothing.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        partitions = self._find_partitions() if is_deepspeed_here() else None
        if partitions is None:
            self.take_step()
        for group, partition in partitions or ():
            partition.step(self, group)
        return loss

    def take_step(self) -> None:
        """The step itself, without what torch's hooks add to `step`."""
        check_graph_capture(self)
        for group in self.param_groups:
            check_numbers(group, type(self).__name__, self.betas_count)
        request = self._clip_request
        unscale, skipped = self._read_loss_scale()
        if skipped is True:
            self._clip_request = None
            if request is not None:
                request[1].fill_(math.inf)
            return
        limits = [math.inf if group["max_grad_norm"] is None else group["max_grad_norm"] for group in self.param_groups]
        limits = limits if request is None else [min(limit, request[0]) for limit in limits]
        clipping = request is not None or min(limits) < math.inf
        plan = self._look(clipping, skipped)
        if plan is None:
            return
        self._clip_request = None  # a refused step leaves it in place
        signs: list[Scalar] = [-unscale if group["maximize"] else unscale for group in self.param_groups]
        # On one rank and without clipping a backend takes each norm where it needs it, while gradients are in the cache.
        sums, scales = None, signs
        if clipping or plan.is_sharded:
            sums, scales, norm = self._reduce(plan, signs, limits, unscale, clipping)
            if request is not None:
                request[1].fill_(norm)
        if skipped is False:  # else the steps on the device count alone, as in a recorded step
            plan.count_groups()
        for part in plan.parts:
            if any(part.live):
                part.update(sums, scales)
        self.after_step(plan)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What GradScaler asks: whether it leaves unscaling and skipping to `step`. True with fused=True, as in torch's
        optimizers. Not by default: it saves no reading of the gradients, and Accelerate knows of a skipped step only where
        GradScaler does not call `step`."""
        return all(bool(group["fused"]) for group in self.param_groups)

    def _read_loss_scale(self) -> tuple[Scalar, bool | Tensor]:
        """What turns gradients of a scaled loss into gradients, for whoever sets `grad_scale` and `found_inf` as GradScaler
        does for fused optimizers, and whether they overflowed: the step is none then. A recorded step reads both on the
        device, and nothing waits for them."""
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is None and grad_scale is None:
            return 1.0, False
        if all(group["fused"] and group["capturable"] for group in self.param_groups):
            device = local(self.param_groups[0]["params"][0]).device
            skipped = False if found_inf is None else as_number(found_inf, torch.float32, device) != 0
            return 1.0 if grad_scale is None else as_number(grad_scale, widest(device), device).reciprocal(), skipped
        host = torch.device("cpu")
        if found_inf is not None and as_number(found_inf, torch.float32, host).item():
            return 1.0, True
        return 1.0 if grad_scale is None else 1.0 / as_number(grad_scale, torch.float64, host).item(), False

    def after_step(self, plan: Plan) -> None:
        """What a rule says to the user of a step that is done."""

    @untraced
    def _find_partitions(self) -> list[tuple[dict[str, Any], PartitionStep]] | None:
        """What DeepSpeed ZeRO has put in the place of the layers, with the steps on it; None where the layers are there."""
        if not (self.uses_norms or "agr" in self.defaults):
            return None  # a rule without norms does not ask whose elements these are
        pairs = self._layers.pair(self.param_groups)
        if not any(is_partitioned(group, layers) for group, layers in pairs):
            check_not_flattened(type(self).__name__, pairs)
            return None
        if self._clip_request or any(group["max_grad_norm"] is not None for group in self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__}: DeepSpeed ZeRO steps one group after the other, so that none sees the norm of all "
                'gradients; leave max_grad_norm=None and set "gradient_clipping" in DeepSpeed\'s configuration'
            )
        found = []
        for group, layers in pairs:
            for flat in group["params"]:
                known = self._partitions.get(id(flat))
                if known is None or not known.knows(self, self.state.get(flat) or {}):
                    check_loaded(self, flat)
                if known is None:
                    known = self._partitions[id(flat)] = PartitionStep(self, group, flat, layers)
                    self._init_partitions()
                found.append((group, known))
        return found

    def _init_partitions(self) -> None:
        """Make the state of all partitions: DeepSpeed links what is there after the step of the first group to its layers,
        and universal checkpoints of the others would have none."""
        for group, layers in self._layers.pairs:
            for flat in group["params"] if is_partitioned(group, layers) else ():
                if "step" not in self.state[flat]:
                    self.init_state(flat, group)

    @untraced  # torch.compile cannot trace identities and addresses
    def _look(self, clipping: bool, skipped: bool | Tensor) -> Plan | None:
        """The plan for the tensors of this step, which are checked, and counted: from here on nothing refuses. None where no
        parameter has a gradient, and none can have one on another rank."""
        present = Present(self.param_groups)
        if not clipping and present.is_idle and self.partition is None:
            return None
        if self.plan is None or not self.plan.fits(self, present):
            self.plan = None
            plan = Plan(self, present, clipping)
            if not plan.fits(self, present):
                raise RuntimeError(
                    f"{type(self).__name__}: a tensor has no memory (its storage was freed), or gradients or state changed "
                    "while the step looked at them"
                )
            self.plan = plan
        self.plan.check_meshes(present, clipping)
        for part in self.plan.parts:
            part.count(skipped)
        self.plan.live_groups = LiveGroups(self.param_groups, present.grads)
        return self.plan

    def _reduce(
        self, plan: Plan, signs: Sequence[Scalar], limits: Sequence[float], unscale: Scalar, clipping: bool
    ) -> tuple[Sums, list[Scalar], Scalar]:
        """Sums over all tensors and ranks, what the gradients of each group are multiplied by, and the global norm.

        Sums of magnitudes and of squares travel in one vector: one collective a mesh (see `add_over_shards`). Only L2 decay
        with clipping takes a second: its norm is of a gradient that the first has to clip.
        """
        sums = Sums([0.0] * len(plan.rows), [0.0] * len(plan.rows))
        for part in plan.parts:
            part.add_sums(sums, signs, squares=clipping, coupled_only=False)
        late = plan.late if clipping else []
        early = (
            [] if not plan.is_sharded else [row.index for row in plan.rows if row.needs_norm and row.index not in late]
        )
        plan.add_over_ranks([(sums.norms, early), (sums.squares, range(len(plan.rows)) if clipping else ())])
        if not clipping:
            return sums, list(signs), 0.0
        norm = _root_of_sum(sums.squares) * unscale
        scales = [_factor(limit, norm) * sign for sign, limit in zip(signs, limits, strict=True)]
        if late:
            for part in plan.parts:
                part.add_sums(sums, scales, squares=False, coupled_only=True)
            plan.add_over_ranks([(sums.norms, late)])
        return sums, scales, norm

    def check_tensors(self, param: Tensor, grad: Tensor) -> None:
        """Refuse what a kernel would read or write past the end of, before anything changes."""
        name = type(self).__name__
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"{name} does not take sparse gradients, but one of layout {grad.layout} and shape {tuple(grad.shape)} was "
                "given; make the embedding with sparse=False"
            )
        if grad.shape != param.shape:
            raise ValueError(
                f"{name}: a gradient has the shape {tuple(grad.shape)} and its parameter {tuple(param.shape)}; the "
                "parameter was changed since: compute the gradient anew"
            )
        if param in self.state:
            self.check_shapes(param, self.state[param])


def _root_of_sum(squares: Sequence[Scalar]) -> Scalar:
    on_device = [square for square in squares if isinstance(square, Tensor)]
    total: Scalar = sum(square for square in squares if not isinstance(square, Tensor))
    if on_device:
        total = total + torch.stack([square.to(on_device[0].device) for square in on_device]).sum()
    return total**0.5


def _factor(limit: float, norm: Scalar) -> Scalar:
    """What `torch.nn.utils.clip_grad_norm_` multiplies with. A NaN norm makes every gradient NaN, as there."""
    if limit == math.inf:
        return 1.0
    factor = limit / (norm + 1e-6)
    if isinstance(factor, Tensor):
        return factor.clamp(max=1.0)
    return 1.0 if factor > 1.0 else factor
