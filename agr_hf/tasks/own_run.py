"""The record of a run of a user's own script: what can be known of it from outside, and nothing secret."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from agr_hf.optim.attach import has_agr
from agr_hf.optim.flags import unwrapped
from agr_hf.optim.registry import OPTIMIZERS
from agr_hf.schema import find_reason
from agr_hf.tasks.record import NOT_RECORDED, NOTEBOOK, Argument, make_record
from agr_hf.tasks.runs import count_elements, optimizer_groups

logger = logging.getLogger(__name__)

RESULTS = "results.json"
# What the `datasets` library calls data that were read from local files or made in memory.
NAMELESS = (
    "arrow",
    "audiofolder",
    "csv",
    "generator",
    "imagefolder",
    "json",
    "pandas",
    "parquet",
    "text",
    "webdataset",
)
HUB_SOURCE = re.compile(r"hf://datasets/(?P<id>[\w.\-]+(?:/[\w.\-]+)?)@(?P<revision>[0-9a-f]{40})/")
OTHER = "other"


def write_own_record(
    folder: str | os.PathLike[str],
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    metrics: Mapping[str, Any],
    config: Mapping[str, Any],
    device: torch.device,
    **fields: Any,
) -> bool:
    """Write `results.json` of a run of the script that this process runs. False, and a warning, where it cannot be.

    A training that has succeeded must not fail because of its record.

    Args:
        folder: of the run.
        model: that was trained, wrapped or not.
        optimizer: that trained it, wrapped or not. What the record says of it comes from its groups.
        metrics: at the end; those within tables are named after both, what is no number or text is left out.
        config: arguments of the run.
        device: that it ran on.
        **fields: other fields of `RunRecord`.
    """
    if not _is_free(folder):
        logger.warning(
            "the run is not recorded: %s is another file than RecordRun writes; rename it", Path(folder) / RESULTS
        )
        return False
    optimizer = unwrapped(optimizer)
    groups, (script, arguments) = optimizer_groups(optimizer), script_arguments()
    # Runs on data without a name are compared with those of the same script alone.
    dataset = {**fields.pop("dataset", {})}
    dataset["name"] = dataset.get("name") or f"the data of {script.removeprefix('-m ')}"
    # The arguments of a run need not be those of its optimizer, which the script may have made itself.
    largest = max(groups, key=lambda group: group["parameters"])
    left_out = ("lr", "tensors", "parameters")
    facts = {
        **describe_model(model),
        **{key: value for key, value in largest.items() if value is not None and key not in left_out},
        "optim": optimizer_name(optimizer),
        "learning_rate": largest["lr"],
        "weight_decay": max(group.get("weight_decay", 0.0) for group in groups),
    }
    if has_agr(optimizer) and "agr" not in optimizer.defaults:
        facts["agr_attached"] = True
    try:
        make_record(
            script=script,
            own_script=True,
            arguments=arguments,
            config={**config, **facts},
            task=task_of_model(model),
            optimizer=facts["optim"],
            optimizer_groups=groups,
            metrics=flatten_metrics(metrics),
            dataset=dataset,
            device=device,
            **fields,
        ).write(folder)
    except (OSError, TypeError, ValueError, StrictDataclassError) as error:
        logger.warning("the run is not recorded: %s", find_reason(error))
        return False
    logger.info("the run is recorded in %s, for agr-hf card, push and leaderboard", Path(folder) / RESULTS)
    return True


def has_own_record(folder: str | os.PathLike[str]) -> bool:
    """Whether `write_own_record` has written one of a training in this folder."""
    return (Path(folder) / RESULTS).exists() and _is_free(folder)


def remove_own_record(folder: str | os.PathLike[str]) -> None:
    """Remove what `write_own_record` left of an earlier training: it says nothing of the one that begins."""
    if has_own_record(folder):
        (Path(folder) / RESULTS).unlink()


def _is_free(folder: str | os.PathLike[str]) -> bool:
    """Whether `results.json` may be written: there is none, or it is of an earlier training of a user's script."""
    path = Path(folder) / RESULTS
    if not path.exists():
        return True
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("own_script") is True


def optimizer_name(optimizer: torch.optim.Optimizer) -> str:
    """Its name in `list_optimizers()`, or the name of its class; what the script calls it may be something else."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer  # DeepSpeed wraps it more than once
    group, names = optimizer.param_groups[0], []
    for info in OPTIMIZERS.values():
        if info.cls is type(optimizer) and all(group.get(key) == value for key, value in info.defaults.items()):
            names.append((len(info.defaults), info.name))
    return max(names)[1] if names else type(optimizer).__name__


def script_arguments(argv: Sequence[str] | None = None) -> tuple[str, dict[str, Argument]]:
    """Name and arguments of the running script, as `RunRecord` has them. Secrets by name are left out.

    What an option takes is not known here: an option has the words up to the next one.

    Args:
        argv: None for those of this process.
    """
    main = sys.modules["__main__"]
    if not getattr(main, "__file__", None):
        return NOTEBOOK, {}
    spec = getattr(main, "__spec__", None)
    script = f"-m {spec.name.removesuffix('.__main__')}" if spec else Path(str(main.__file__)).name
    found: dict[str, list[str]] = {}
    name = ""
    for word in sys.argv[1:] if argv is None else argv:
        if re.fullmatch(r"--?[A-Za-z][\w.\-]*(=.*)?", word, re.DOTALL):
            name, equals, value = word.removeprefix("--").partition("=")
            found.setdefault(name, []).extend([value] if equals else [])
        elif not NOT_RECORDED.fullmatch(word.partition("=")[0]):  # Hydra's words are name=value
            found.setdefault(name, []).append(word)
    arguments: dict[str, Argument] = {
        key: list(words) if len(words) != 1 else words[0]
        for key, words in found.items()
        if not NOT_RECORDED.fullmatch(key.lstrip("-").replace("-", "_"))
    }
    return script, arguments


def flatten_metrics(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Numbers and texts by name, those of tables too; 0-dim tensors and numpy's numbers become Python's."""
    found: dict[str, Any] = {}
    for key, value in metrics.items():
        name = f"{prefix}{key}"
        if hasattr(value, "item"):
            with contextlib.suppress(ValueError, RuntimeError):  # of several elements
                value = value.item()
        if isinstance(value, Mapping):
            found |= flatten_metrics(value, f"{name}_")
        elif value is None or isinstance(value, (bool, int, float, str)):
            found[name] = value
    return found


def describe_model(model: torch.nn.Module) -> dict[str, Any]:
    """Facts of a model for a record's `config`: its class, what it was fine-tuned from, how large it is."""
    from accelerate.utils import extract_model_from_parallel

    model = extract_model_from_parallel(model, keep_torch_compile=False)
    adapted = model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
    base = str(getattr(getattr(adapted, "config", None), "_name_or_path", "") or "")
    cls = type(adapted)
    base = "" if Path(base).exists() else base
    of_transformers = cls.__module__.startswith("transformers.")
    return {
        "model_name": base.rpartition("/")[2] or cls.__name__,
        "model_class": cls.__name__ if of_transformers else None,
        "base_model": base or None,
        "library": "peft" if adapted is not model else "transformers" if of_transformers else None,
        "parameters": sum(map(count_elements, model.parameters())),
    }


def task_of_model(model: torch.nn.Module) -> str:
    """What transformers calls the task of a model's class, as its own cards do; "other" where it knows none."""
    from transformers.modelcard import TASK_MAPPING

    name = describe_model(model)["model_class"]
    tasks: dict[str, Any] = TASK_MAPPING
    for task, classes in tasks.items():
        names = [of for one in classes.values() for of in (one if isinstance(one, (tuple, list)) else (one,))]
        if name in names:
            return task
    return OTHER


def describe_own_dataset(train: Any, evaluation: Any = None, name: str | None = None) -> dict[str, Any]:
    """What can be seen of a user's data: name and place on the Hub where the `datasets` library knows them, and sizes.

    Args:
        train, evaluation: data sets; None where there is none.
        name: the user's name for it, which wins.
    """
    info = getattr(train, "info", None)
    known = str(getattr(info, "dataset_name", None) or "")
    sources = [HUB_SOURCE.match(url) for url in (getattr(info, "download_checksums", None) or {})]
    hub = sources[0] if sources and sources[0] and name is None else None
    split = getattr(evaluation, "split", None)
    return {
        "name": name or (hub["id"] if hub else None) or (known if known and known not in NAMELESS else None),
        "hub_id": hub["id"] if hub else None,
        "revision": hub["revision"] if hub else None,
        "config": getattr(info, "config_name", None) if hub else None,
        "examples": _length(train),
        "split": (str(split) if split is not None else "evaluation") if evaluation is not None else None,
        "evaluated": _length(evaluation),
    }


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:  # a stream
        return None


def loss_curve(log_history: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The training loss alone, of a run that was never evaluated."""
    return [
        {"epoch": entry["epoch"], "step": entry["step"], "train_loss": entry["loss"]}
        for entry in log_history
        if "loss" in entry
    ]
