"""Does this model, with these arguments, scale its gradients by accumulation steps or processes (transformers #47688)?"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from agr_hf.integrations.random_states import kept_random_states
from agr_hf.optim.adal import AdaL

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)


def gradient_scale(model: torch.nn.Module, args: TrainingArguments, dataloader: Any) -> int:
    """How many times larger than the mean loss's gradients Trainer's are for this model; 1 where all is well.

    Trainer leaves the division by the accumulation steps to a model whose forward takes `num_items_in_batch`, and
    multiplies its loss by the number of processes. A head that drops the number does neither division. Which kind this is
    is found by asking: the loss of one example, twice, with two numbers of items.

    Args:
        model: the model, not wrapped.
        args: the training arguments.
        dataloader: Trainer's; one example of its dataset is collated. Random states, and the model's mode, are restored.

    Returns:
        1 as well where it cannot be found out (iterable datasets, a forward that fails on one example).
    """
    scale: int = args.gradient_accumulation_steps
    if getattr(args, "average_tokens_across_devices", False):
        scale *= args.world_size
    if scale == 1 or not accepts_loss_kwargs(model):
        return 1
    try:
        losses = _losses(model, dataloader)
    except Exception as error:
        # Whatever a dataset or a forward may raise on a single example is no reason to stop a training.
        logger.info("could not find out whether the model uses num_items_in_batch: %s", error)
        return 1
    return scale if torch.equal(*losses) else 1


def accepts_loss_kwargs(model: torch.nn.Module) -> bool:
    """Whether Trainer hands `num_items_in_batch` to this model, by the rule that it documents."""
    declared = getattr(model, "accepts_loss_kwargs", None)
    if declared is not None:
        return bool(declared)
    parameters = inspect.signature(model.forward).parameters.values()
    return any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _losses(model: torch.nn.Module, dataloader: Any) -> tuple[torch.Tensor, torch.Tensor]:
    device = next(model.parameters()).device
    with _undisturbed(model), torch.no_grad():
        batch = dataloader.collate_fn([dataloader.dataset[0]])
        batch = {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}
        one, two = (model(**batch, num_items_in_batch=torch.tensor(n, device=device)) for n in (1, 2))
    return one["loss"], two["loss"]


@contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Run a model in eval mode, and leave its modes and every random state as they were."""
    modes = {module: module.training for module in model.modules()}
    devices = {param.device for param in model.parameters()}
    try:
        with kept_random_states(devices):
            model.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def gradient_scale_warning(
    model: torch.nn.Module, args: TrainingArguments, optimizer: torch.optim.Optimizer, dataloader: Any
) -> str | None:
    """A sentence for the user where scaled gradients change what the optimizer does, or None."""
    adal = isinstance(optimizer, AdaL)
    clips = bool(args.max_grad_norm) or any(group.get("max_grad_norm") for group in optimizer.param_groups)
    if dataloader is None or not (adal or clips):
        return None
    scale = gradient_scale(model, args, dataloader)
    if scale == 1:
        return None
    changes = []
    if clips:
        changes.append(f"clips at 1/{scale} of the norm that max_grad_norm names")
    if adal:
        changes.append(f"AdaL's gradients are {scale**2} times larger (it is of degree 2), which its eps notices")
    return (
        f"{type(model).__name__} takes num_items_in_batch and does not use it, so its gradients are {scale} times those of "
        f"the mean loss (gradient_accumulation_steps={args.gradient_accumulation_steps}, {args.world_size} processes; "
        f"transformers issue 47688): this run {' and '.join(changes)}. Set model.accepts_loss_kwargs = False before making "
        "the Trainer, and it divides as it should"
    )
