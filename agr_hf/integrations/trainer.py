"""transformers' Trainer: the optimizers by name."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from agr_hf.errors import UserError
from agr_hf.integrations import private
from agr_hf.integrations.checkpoints import read_weight_map, resolve_checkpoint
from agr_hf.integrations.clipping import clip_in_step
from agr_hf.integrations.launch import check_launch
from agr_hf.integrations.optimizer_states import loads_older_state
from agr_hf.integrations.random_states import kept_random_states
from agr_hf.optim.attach import has_agr
from agr_hf.optim.flags import agr_flags, unwrapped
from agr_hf.optim.param_groups import set_agr_flags
from agr_hf.optim.registry import OPTIMIZERS, OptimizerInfo, optimizer_info
from agr_hf.optim.shards import is_dtensor

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_utils import TrainOutput

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


def train(trainer: Trainer, resume_from_checkpoint: str | bool | None = None, **options: Any) -> TrainOutput:
    """`trainer.train(resume_from_checkpoint=...)` that resumes from what is complete, and completely.

    These go wrong without it:

    - Trainer's own "latest" takes a checkpoint that a kill left half-written. One of several processes may die before it
      wrote its random states, and the checkpoint looks complete: here the first process waits for the others.
    - For models whose files name weights otherwise than the model does (ViT and many others in transformers 5), Trainer
      loads what it finds by name, warns of missing keys and trains on from fresh weights (transformers #43701).
    - What a collator masks and a transform crops is drawn anew in the rest of an epoch: see
      `agr_hf.integrations.epochs.SeededDraws`. An evaluation takes from the random numbers of the training, so that a run
      resumed from a checkpoint before it trains otherwise. Here neither is so, and the run never stopped is to be trained
      by this function too.
    - A run with `max_steps` that is finished takes one step more.
    - A sharded optimizer state that was saved before an option of the groups existed, or by torch's AdamW, is not loaded.
    - A run with AGR goes on with torch's AdamW where its optimizer is not named again. It may be meant: a warning says so.

    Args:
        trainer: ready to train.
        resume_from_checkpoint: None, a checkpoint folder, or "latest" for the last complete one of the output folder (a
            fresh start where there is none); True is "latest".
        **options: other arguments of `trainer.train`.

    Raises:
        ValueError: the named checkpoint is not complete, or the newest one holds weights only; the message says what is
            wrong with which file.
    """
    from agr_hf.integrations.epochs import SeededDraws

    args = trainer.args
    # Without a disk that all share, each host has the random states of its own processes only.
    processes = None if args.save_on_each_node else args.world_size
    checkpoint = resolve_checkpoint(resume_from_checkpoint, args.output_dir, processes)
    evaluate, get_loader = trainer.evaluate, trainer.get_train_dataloader
    draws = SeededDraws(args.seed)

    def evaluate_apart(*args: Any, **kwargs: Any) -> dict[str, float]:
        with kept_random_states(_find_devices(trainer)):
            return evaluate(*args, **kwargs)

    def seeded_loader() -> DataLoader[Any]:
        loader, reason = get_loader(), None
        if not draws.seed_loader(loader) and checkpoint and (_read_state(checkpoint).get("epoch") or 0) % 1:
            reason = "the data are a stream or come from a loader of another kind; save at the ends of epochs"
        elif checkpoint and getattr(trainer.data_collator, "seed", None) is not None:
            reason = "the collator has a generator of its own; give it no seed"
        if reason:
            logger.warning("resumed from %s, batches are not those of a run never stopped: %s", checkpoint, reason)
        return loader

    with ExitStack() as stack:
        stack.enter_context(_replaced(trainer, "evaluate", evaluate_apart))
        stack.enter_context(_replaced(trainer, "get_train_dataloader", seeded_loader))
        if args.world_size > 1:
            name, save = private.rank_states_saver(trainer)

            def save_and_wait(output_dir: str) -> None:
                save(output_dir)
                trainer.accelerator.wait_for_everyone()

            stack.enter_context(_replaced(trainer, name, save_and_wait))
        callbacks: list[TrainerCallback] = [draws]
        if checkpoint is not None:
            callbacks.append(_check_resumed_callback(checkpoint))
            if found := private.optimizer_loader(trainer):
                name, load = found

                def load_older(folder: str | None) -> None:
                    optimizer: Any = trainer.optimizer
                    with loads_older_state(optimizer, Path(checkpoint) / "optimizer_0"):
                        load(folder)

                stack.enter_context(_replaced(trainer, name, load_older))
            if 0 < args.max_steps <= _read_state(checkpoint)["global_step"]:
                # Trainer looks for the end behind a step only; without data an epoch is one step, and all of them are over.
                empty: DataLoader[Any] = DataLoader([])  # type: ignore[arg-type]
                stack.enter_context(_replaced(trainer, "get_train_dataloader", lambda: empty))
        for callback in callbacks:
            trainer.add_callback(callback)
            stack.callback(trainer.remove_callback, callback)
        return trainer.train(resume_from_checkpoint=checkpoint, **options)


def _find_devices(trainer: Trainer) -> list[torch.device]:
    """Whose generators a forward pass may draw from: with DataParallel those of several devices."""
    device, count = trainer.args.device, trainer.args.n_gpu
    return [torch.device(device.type, index) for index in range(count)] if count > 1 else [device]


def save_model(trainer: Trainer) -> None:
    """`trainer.save_model()` that writes the whole model under FSDP too. Every process calls it.

    With `SHARDED_STATE_DICT`, the kind of its checkpoints, Trainer writes no model at all, and says nothing.
    """
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()


@contextmanager
def _replaced(trainer: Trainer, method: str, function: Callable[..., Any]) -> Iterator[None]:
    """A method of one trainer replaced for a while."""
    before = vars(trainer).get(method)
    setattr(trainer, method, function)
    try:
        yield
    finally:
        if before is None:
            delattr(trainer, method)
        else:
            setattr(trainer, method, before)


def _read_state(checkpoint: str) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    return state


def _check_resumed_callback(checkpoint: str) -> TrainerCallback:
    from transformers import TrainerCallback

    class CheckResumed(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            load_renamed_weights(kwargs["model"], checkpoint)
            _say_agr_ends(kwargs.get("optimizer"), checkpoint)

    return CheckResumed()


def _say_agr_ends(optimizer: torch.optim.Optimizer | None, checkpoint: str) -> None:
    """Where a run with AGR goes on without: torch's AdamW takes the state, and whoever forgot --optim would not notice."""
    path = Path(checkpoint) / "optimizer.pt"
    if optimizer is None or not path.is_file() or has_agr(unwrapped(optimizer)):
        return
    groups = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["param_groups"]
    if any(any(agr_flags(group)) for group in groups if "agr" in group):
        logger.warning(
            "%s was trained with AGR, and goes on without: this run's optimizer is %s; if that is not meant, give the "
            "optimizer of the first run again (--optim agr_adamw, for example)",
            checkpoint,
            type(unwrapped(optimizer)).__name__,
        )


def load_renamed_weights(model: torch.nn.Module, checkpoint: str) -> bool:
    """Load a transformers model whose file names weights otherwise than it does. False where the names agree.

    Raises:
        RuntimeError: the weights are sharded over processes; the message says what to do.
    """
    from safetensors import safe_open
    from transformers import PreTrainedModel

    path, index = Path(checkpoint) / "model.safetensors", Path(checkpoint) / "model.safetensors.index.json"
    if not isinstance(model, PreTrainedModel) or not (path.exists() or index.exists()):
        return False
    if path.exists():
        with safe_open(path, framework="pt") as file:
            saved = set(file.keys())
    else:
        saved = set(read_weight_map(index))
    if saved <= set(model.state_dict()):
        return False
    if any(is_dtensor(param) for param in model.parameters()):
        raise RuntimeError(
            f"{checkpoint} names weights otherwise than {type(model).__name__} does, and Trainer cannot load such a file "
            "into sharded weights (transformers #43701); make the model with from_pretrained(checkpoint) before sharding"
        )
    loaded = type(model).from_pretrained(checkpoint, config=model.config)
    model.load_state_dict(loaded.state_dict())
    logger.warning(
        "the weights of %s were loaded under the names that %s gives them: keys that Trainer misses above are there",
        checkpoint,
        type(model).__name__,
    )
    return True


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
    return (
        f"{info.name} has no option {', '.join(keys)}; it has {', '.join(known)}, and learning_rate, weight_decay, "
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
