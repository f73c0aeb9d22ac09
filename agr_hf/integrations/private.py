"""Every touch of a private attribute of transformers or timm.

Neither library has a public registry for Trainer's optimizer names, or a place where timm shows an optimizer the model.
What is relied on here is checked first; where a version lacks it, a sentence names the route that needs nothing private.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

TRAINER_ROUTE = (
    "use the public route instead: Trainer(optimizer_cls_and_kwargs=agr_hf.integrations.trainer.trainer_optimizer("
    "'agr_adamw', args))"
)
TIMM_ROUTE = "use the public route instead: agr_hf.create_optimizer('agr_adamw', model, lr=...)"


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


def trainer_decay_names(model: torch.nn.Module) -> set[str]:
    """Names of the parameters that Trainer decays: its own rule, so that its checkpoints and ours fit each other."""
    from transformers import Trainer

    try:
        # An instance method that asks nothing of its instance.
        return set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    except (AttributeError, TypeError) as error:
        raise RuntimeError(_missing("transformers", "Trainer.get_decay_parameter_names", TRAINER_ROUTE)) from error


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
