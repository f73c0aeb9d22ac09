"""transformers' Trainer: the optimizers by name."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from agr_hf.errors import UserError, suggest
from agr_hf.integrations import private
from agr_hf.integrations.clipping import clip_in_step
from agr_hf.integrations.launch import check_launch
from agr_hf.integrations.resume import save_model as save_model  # found here too
from agr_hf.integrations.resume import train as train
from agr_hf.optim.flags import unwrapped
from agr_hf.optim.param_groups import set_agr_flags
from agr_hf.optim.registry import OPTIMIZERS, OptimizerInfo, optimizer_info

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

# Names that Trainer has given to torch's optimizers itself; its sgd has no momentum.
TRAINERS_OWN = ("rmsprop", "sgd")
# What optim_args may hold besides the optimizer's own options; three betas do not fit adam_beta1 and adam_beta2.
BETAS = ("beta1", "beta2", "beta3")
# Arguments of the optimizers that TrainingArguments has fields for.
FIELDS = {"params", "lr", "betas", "eps", "weight_decay"}


def register() -> None:
    """Add the package's names to Trainer, and those of torch's that are free there; see `agr_hf.register`.

    Trainer's clipping moves into the step of the package's optimizers, where that is the same.
    """
    private.move_trainer_clipping(clip_in_step)
    private.name_optimizer_in_cards(describe_optimizer)
    for info in OPTIMIZERS.values():
        if info.name not in TRAINERS_OWN:
            private.add_trainer_optimizer(info.name, _handler(info))


def describe_optimizer(optimizer: torch.optim.Optimizer | None) -> str | None:
    """An optimizer of the package as its class would be called, for a model card; None for others."""
    optimizer = None if optimizer is None else unwrapped(optimizer)
    info = next((info for info in OPTIMIZERS.values() if info.ours and info.cls is type(optimizer)), None)
    if optimizer is None or info is None:
        return None
    # Of several groups the first decays; what is None there is an option that was not used.
    group = optimizer.param_groups[0]
    values = {"lr": group.get("initial_lr", group["lr"])}
    values |= {key: group[key] for key in inspect.signature(info.cls).parameters if key in group and key not in values}
    shown = [
        f"{key}={_plain(value)}" for key, value in values.items() if key not in ("params", "agr") and value is not None
    ]
    return f"{info.name}: {info.title}, {info.cls.__name__}({', '.join(shown)})"


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _handler(info: OptimizerInfo) -> Callable[[Any], tuple[type[torch.optim.Optimizer], dict[str, Any]]]:
    def handle(context: Any) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """What Trainer asks for: an optimizer class and its arguments, groups under "params"."""
        check_launch(context.args)
        options = parse_optim_args(info, context.args.optim_args)
        _say_l2(info, context.args.weight_decay, options)
        arguments = optimizer_arguments(info, context.args, options)
        sets_agr_flags = context.model is not None and _regularizes(info, arguments)
        return (_with_agr_flags(info.cls, context.model) if sets_agr_flags else info.cls), arguments

    return handle


def _with_agr_flags(cls: type[torch.optim.Optimizer], model: torch.nn.Module) -> type[torch.optim.Optimizer]:
    """What Trainer takes for an optimizer class: it makes one of `cls`, with `agr` in the groups that Trainer made."""

    class Grouped(cls):  # type: ignore[valid-type, misc]
        def __new__(cls_: type, params: Any, **arguments: Any) -> Any:  # no Grouped: Python calls no __init__ of it
            optimizer = cls(params, **arguments)
            set_agr_flags(optimizer.param_groups, model)
            return optimizer

    return Grouped


def _say_l2(info: OptimizerInfo, weight_decay: float, options: Mapping[str, Any]) -> None:
    """Trainer's `weight_decay` is AdamW's for most users; AdaL's is another thing."""
    if info.name == "adal" and weight_decay and not options.get("decoupled"):
        logger.warning(
            "weight_decay=%g is L2 in AdaL, as its paper has it: part of the gradient before it is scaled; with "
            "optim_args='decoupled=true' weights decay as in AdamW",
            weight_decay,
        )


def _regularizes(info: OptimizerInfo, arguments: dict[str, Any]) -> bool:
    return "agr" in inspect.signature(info.cls).parameters and arguments.get("agr") is not False


class OptimizerFactory:
    """Called by Trainer as `OptimizerFactory()(model, **kwargs)`."""

    def __call__(
        self, model: torch.nn.Module, *, name: str, weight_decay: float, **arguments: Any
    ) -> torch.optim.Optimizer:
        info = optimizer_info(name)
        groups = trainer_groups(model, weight_decay)
        if _regularizes(info, arguments):
            set_agr_flags(groups, model)
        return info.cls(groups, **arguments)


def trainer_optimizer(
    name: str, args: TrainingArguments, **options: Any
) -> tuple[type[OptimizerFactory], dict[str, Any]]:
    """For `Trainer(optimizer_cls_and_kwargs=...)`: an optimizer by name, which needs public interfaces only.

    Clipping moves into its step as with `agr_hf.register`, and stays with Trainer where this transformers has no place for
    it. Learning rate, betas, epsilon and weight decay come from `args`, as for `--optim`; `options` win over them. The model
    card that Trainer writes names the optimizer with these.

    Args:
        name: one of `agr_hf.list_optimizers()`.
        args: the training arguments.
        **options: arguments of the optimizer, such as `agr_steps=1000`.

    Raises:
        ValueError: there is no such name or option, or this process trains alone beside others (`check_launch`).

    Example:
        >>> Trainer(model, args, optimizer_cls_and_kwargs=trainer_optimizer("agr_adamw", args, agr_steps=1000), ...)
    """
    private.move_trainer_clipping(clip_in_step)
    private.name_optimizer_in_cards(describe_optimizer)
    check_launch(args)
    info = optimizer_info(name)
    unknown = set(options) - set(inspect.signature(info.cls).parameters)
    if unknown:
        raise UserError(_unknown(info, sorted(unknown)))
    weight_decay = options.pop("weight_decay", args.weight_decay)
    _say_l2(info, weight_decay, options)
    return OptimizerFactory, {"name": name, "weight_decay": weight_decay, **optimizer_arguments(info, args, options)}


def optimizer_arguments(info: OptimizerInfo, args: TrainingArguments, options: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the optimizer from TrainingArguments; `options` win."""
    accepted = inspect.signature(info.cls).parameters
    arguments: dict[str, Any] = {"lr": args.learning_rate, **info.defaults}
    if "eps" in accepted:
        arguments["eps"] = args.adam_epsilon
    if "betas" in accepted:
        default = accepted["betas"].default
        given = (args.adam_beta1, args.adam_beta2)
        if len(default) == len(given):
            arguments["betas"] = given
        elif given != (0.9, 0.999) and "betas" not in options:
            logger.warning(
                "%s has %d betas: adam_beta1=%g and adam_beta2=%g are not used, its own %s are; set them with "
                "optim_args='beta1=...,beta2=...,beta3=...'",
                info.title,
                len(default),
                *given,
                default,
            )
    return {**arguments, **options}


def trainer_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainer's own two groups in its order, so that checkpoints move between torch's AdamW and ours.

    The first decays, the second (biases and norms) does not. Frozen parameters are left out, as Trainer does. What a
    subclass of Trainer decays otherwise is not known here: there the names of `register` serve.
    """
    decayed = private.trainer_decay_names(model)
    trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [param for name, param in trainable if name in decayed], "weight_decay": weight_decay},
        {"params": [param for name, param in trainable if name not in decayed], "weight_decay": 0.0},
    ]
    return groups


def parse_optim_args(info: OptimizerInfo, text: str | None) -> dict[str, Any]:
    """`optim_args`, as in "second_moment=regularized,agr_steps=1000", with the types of the optimizer's options.

    Raises:
        ValueError: an entry is not `name=value`, is unknown, or has a value of another type.
    """
    accepted = inspect.signature(info.cls).parameters
    options: dict[str, Any] = {}
    for entry in filter(None, (part.strip() for part in (text or "").split(","))):
        key, equals, value = (part.strip() for part in entry.partition("="))
        if not equals or not value:
            raise UserError(f"optim_args: {entry!r} is not allowed; entries are name=value, separated by commas")
        if key in BETAS:
            options[key] = _number(key, value)
        elif key not in accepted or key in FIELDS:
            raise UserError(_unknown(info, [key]))
        else:
            options[key] = _value(info, key, value)
    betas = [options.pop(key) for key in BETAS if key in options]
    if betas:
        default = accepted["betas"].default
        if len(betas) != len(default):
            raise UserError(f"optim_args: {info.name} takes {len(default)} betas, but {len(betas)} were given")
        options["betas"] = tuple(betas)
    return options


def _unknown(info: OptimizerInfo, keys: list[str]) -> str:
    known = [key for key in inspect.signature(info.cls).parameters if key not in FIELDS]
    shown = ", ".join(f"{key}{suggest(key, [*known, 'learning_rate'])}" for key in keys)
    return (
        f"{info.name} has no option {shown}; it has {', '.join(known)}, and learning_rate, weight_decay, "
        "adam_beta1, adam_beta2 and adam_epsilon of TrainingArguments"
    )


def _number(key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"optim_args: {key}={text!r} is not allowed; it must be a number") from None


def _value(info: OptimizerInfo, key: str, text: str) -> Any:
    """The value of an option; torch checks those of its own optimizers itself."""
    option = getattr(info.cls, "options", {}).get(key)
    if option is None:
        plain = {"true": True, "false": False, "none": None}
        return plain[text.lower()] if text.lower() in plain else _number(key, text)
    try:
        value = option.read(text)
        if option.accepts(value):
            return value
    except (KeyError, ValueError):
        pass
    raise UserError(f"optim_args: {key}={text!r} is not allowed; it must be {option.allowed}")
