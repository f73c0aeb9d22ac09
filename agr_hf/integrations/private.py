"""Every touch of a private attribute of transformers, timm or torch's optimizers, loss scalers and data loaders.

There is no public registry for Trainer's optimizer names, no place where timm shows an optimizer the model, and none where
Trainer lets an optimizer clip. What is relied on here is checked first; where a version lacks it, a sentence names the route
that needs nothing private, or Trainer goes on clipping by itself.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.utils.data import DataLoader, Dataset
    from transformers import Trainer, TrainerCallback

logger = logging.getLogger(__name__)

TRAINER_ROUTE = (
    "use the public route instead: Trainer(optimizer_cls_and_kwargs=agr_hf.integrations.trainer.trainer_optimizer("
    "'agr_adamw', args))"
)
TIMM_ROUTE = "use the public route instead: agr_hf.create_optimizer('agr_adamw', model, lr=...)"
# Trainer's methods that clip gradients and measure their norm, with the parameters that they have.
TRAINER_CLIPPING = {"_clip_grad_norm": ["self", "model"], "_get_grad_norm": ["self", "model", "grad_norm"]}


def add_trainer_optimizer(name: str, handler: Callable[[Any], tuple[Any, dict[str, Any]]]) -> None:
    """Add a member to transformers' OptimizerNames, and its handler to the table that Trainer looks in.

    Raises:
        RuntimeError: this transformers has no such enum or table, or the name is somebody else's.
    """
    from transformers import training_args

    try:
        from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS as handlers
    except ImportError as error:
        raise RuntimeError(_missing("transformers", "trainer_optimizer._OPTIMIZER_HANDLERS", TRAINER_ROUTE)) from error
    names: Any = getattr(training_args, "OptimizerNames", None)
    if not isinstance(handlers, dict) or not hasattr(names, "_value2member_map_"):
        raise RuntimeError(_missing("transformers", "training_args.OptimizerNames", TRAINER_ROUTE))
    member = names._value2member_map_.get(name)
    if member is None:
        member = _enum_member(names, name)
    elif member in handlers and not handlers[member].__module__.startswith("agr_hf."):
        raise RuntimeError(
            f"transformers {version('transformers')} has an optimizer {name!r} of its own; {TRAINER_ROUTE}"
        )
    handlers[member] = handler


def _enum_member(names: Any, value: str) -> Any:
    # The standard library closes an enum that has members; these are the tables that its own constructor fills.
    member = str.__new__(names, value)
    member._name_, member._value_ = value.upper(), value
    member.__objclass__, member._sort_order_ = names, len(names._member_names_)
    type.__setattr__(names, member._name_, member)
    names._member_names_.append(member._name_)
    names._member_map_[member._name_] = member
    names._value2member_map_[value] = member
    if names(value) is not member or names[member._name_] is not member or member not in list(names):
        raise RuntimeError(_missing("transformers", "an OptimizerNames that can be extended", TRAINER_ROUTE))
    return member


def add_default_callback(callback: type[TrainerCallback]) -> None:
    """Have every Trainer of this process begin with a callback, before those that it is given.

    Raises:
        RuntimeError: this transformers has no list of them.
    """
    from transformers import trainer

    defaults = getattr(trainer, "DEFAULT_CALLBACKS", None)
    if not isinstance(defaults, list):
        route = f"use the public route instead: Trainer(callbacks=[{callback.__name__}()])"
        raise RuntimeError(_missing("transformers", "trainer.DEFAULT_CALLBACKS", route))
    if callback not in defaults:
        defaults.append(callback)


def name_optimizer_in_cards(describe: Callable[[Any], str | None]) -> None:
    """Let the model card that Trainer writes say `describe(optimizer)` of the optimizer, where that is a text.

    By itself it names `TrainingArguments.optim` whatever runs, with `adam_beta1` and `adam_beta2`. It stays so where this
    transformers has no such function; may be called again.
    """
    from transformers import modelcard

    name = "extract_hyperparameters_from_trainer"
    own: Any = getattr(modelcard, name, None)
    if own is None or hasattr(own, "__wrapped__"):
        return

    @functools.wraps(own)
    def extract(trainer: Trainer) -> dict[str, Any]:
        found: dict[str, Any] = own(trainer)
        text = describe(trainer.optimizer)
        return found if text is None else {**found, "optimizer": text}

    setattr(modelcard, name, extract)


def trainer_decay_names(model: torch.nn.Module) -> set[str]:
    """Names of the parameters that Trainer decays: its own rule, so that its checkpoints and ours fit each other."""
    from transformers import Trainer

    try:
        # An instance method that asks nothing of its instance.
        return set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    except (AttributeError, TypeError) as error:
        raise RuntimeError(_missing("transformers", "Trainer.get_decay_parameter_names", TRAINER_ROUTE)) from error


def move_trainer_clipping(clip_in_step: Callable[[Any, Any, Iterable[Tensor], float], Tensor | None]) -> None:
    """Let Trainer ask `clip_in_step(accelerator, optimizer, parameters, max_norm)` before it clips or measures gradients.

    Where it returns a tensor, that is the norm, and Trainer takes no pass of its own; Trainer reads it when it logs, after
    the step. A trainer with a `_clip_grad_norm` or `_get_grad_norm` of its own is left alone: it may read the norm, or the
    clipped gradients, at once. May be called again: nothing is wrapped twice.
    """
    from transformers import Trainer

    methods: list[Any] = [vars(Trainer).get(name) for name in TRAINER_CLIPPING]
    # Not __module__: a wrapper of another library has that of what it wraps.
    homes = {getattr(method, "__globals__", {}).get("__name__") for method in methods}
    if homes == {__name__}:
        return
    parameters = [list(inspect.signature(method).parameters) for method in methods if callable(method)]
    if homes != {"transformers.trainer"} or parameters != list(TRAINER_CLIPPING.values()):
        logger.warning(
            "Trainer clips gradients by itself, in a pass before the optimizer's step: %s of transformers %s are not the "
            "methods that agr_hf knows (another version, or changed by another library)",
            " and ".join(TRAINER_CLIPPING),
            version("transformers"),
        )
        return
    own_clip, own_measure = methods

    def clip(trainer: Trainer, model: torch.nn.Module, max_norm: float) -> Tensor | None:
        found = [getattr(getattr(trainer, name), "__func__", None) for name in TRAINER_CLIPPING]
        if found != [_clip_grad_norm, _get_grad_norm]:
            return None
        return clip_in_step(trainer.accelerator, trainer.optimizer, model.parameters(), max_norm)

    @functools.wraps(own_clip)
    def _clip_grad_norm(self: Trainer, model: torch.nn.Module) -> Any:
        norm = clip(self, model, self.args.max_grad_norm)
        return own_clip(self, model) if norm is None else norm

    @functools.wraps(own_measure)
    def _get_grad_norm(self: Trainer, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        # With a limit the gradients were clipped before, and a request must not be replaced by one to measure.
        if grad_norm is None and self.args.max_grad_norm <= 0:
            grad_norm = clip(self, model, math.inf)
        return own_measure(self, model, grad_norm=grad_norm)

    Trainer._clip_grad_norm, Trainer._get_grad_norm = _clip_grad_norm, _get_grad_norm  # type: ignore[method-assign]


def set_loader_dataset(loader: DataLoader[Any], dataset: Dataset[Any]) -> None:
    """Give a loader that was made already another data set of the same length and order; torch's own setter refuses it."""
    object.__setattr__(loader, "dataset", dataset)


def rank_states_saver(trainer: Trainer) -> tuple[str, Callable[[str], None]]:
    """Trainer's method that writes a process's random states, before the first process writes `trainer_state.json`.

    Raises:
        RuntimeError: this transformers has none.
    """
    name = "_save_rng_state"
    method = getattr(trainer, name, None)
    if method is None or list(inspect.signature(method).parameters) != ["output_dir"]:
        route = "use trainer.train(resume_from_checkpoint=agr_hf.integrations.checkpoints.resolve_checkpoint(...))"
        raise RuntimeError(
            f"agr_hf cannot wait for the processes: transformers {version('transformers')} lacks {name}; {route}"
        )
    return name, method


def optimizer_loader(trainer: Trainer) -> tuple[str, Callable[[str | None], None]] | None:
    """Trainer's method that loads the state of the optimizer that it has made; None where this transformers has none."""
    name = "_load_optimizer_and_scheduler"
    method = getattr(trainer, name, None)
    if method is None or list(inspect.signature(method).parameters) != ["checkpoint"]:
        return None
    return name, method


def prepared_optimizers(accelerator: Accelerator) -> list[torch.optim.Optimizer]:
    """In the order of the files that `load_state` reads; none where this accelerate does not say."""
    return list(getattr(accelerator, "_optimizers", []))


def has_step_pre_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether anything is called before the optimizer's step; true where this torch does not say."""
    return bool(getattr(optimizer, "_optimizer_step_pre_hooks", True))


def knows_overflow(scaler: Any) -> bool:
    """Whether a loss scaler can be asked `overflowed`."""
    return hasattr(scaler, "_found_inf_per_device")


def overflowed(scaler: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Whether a loss scaler, having unscaled the gradients, will skip the step. It reads the same flags a moment later."""
    return any(flag.item() for flag in scaler._found_inf_per_device(optimizer).values())


def timm_registry() -> Any:
    """timm's registry of optimizers, the one `create_optimizer_v2` asks."""
    try:
        from timm.optim._optim_factory import default_registry
    except ImportError as error:
        raise RuntimeError(_missing("timm", "optim._optim_factory.default_registry", TIMM_ROUTE)) from error
    for method in ("register", "create_optimizer", "get_optimizer_info"):
        if not hasattr(default_registry, method):
            raise RuntimeError(_missing("timm", f"OptimizerRegistry.{method}", TIMM_ROUTE))
    return default_registry


def _missing(package: str, what: str, route: str) -> str:
    return f"agr_hf cannot register its names with {package} {version(package)}, which lacks {what}; {route}"
