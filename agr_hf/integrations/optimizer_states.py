"""Optimizer states: as files without pickle, and those of older or flattened kinds made complete."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agr_hf.errors import UserError
from agr_hf.files import replaced_file, write_text
from agr_hf.integrations.checkpoints import (
    OPTIMIZER_TABLE,
    OPTIMIZER_TENSORS,
    file_fault,
    is_optimizer_table,
    shards_table,
)
from agr_hf.optim.flags import unwrapped
from agr_hf.optim.state import StatefulOptimizer
from agr_hf.unpickled import decode, encode


def save_optimizer(optimizer: torch.optim.Optimizer, folder: str | os.PathLike[str], write: bool = True) -> None:
    """Write an optimizer's state as `optimizer.safetensors` and `optimizer.json`, each whole or not at all.

    The tensors are named `{parameter's index}.{key}`; the table holds the groups, and what of the state is no tensor. The
    table is written last and carries the tensors' names: a pair from two saves is found out.

    Args:
        optimizer: any torch optimizer. DTensors are written whole.
        folder: where the two files go.
        write: False on the processes that only take part in gathering DTensors.

    Raises:
        TypeError: a group or state holds something that is neither a tensor nor JSON; the message names it.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    state = optimizer.state_dict()
    table = {
        "optimizer": type(optimizer).__name__,
        "param_groups": [
            {key: encode(value, f"group.{i}.{key}", tensors) for key, value in group.items()}
            for i, group in enumerate(state["param_groups"])
        ],
        "state": {
            str(i): {key: encode(value, f"{i}.{key}", tensors) for key, value in entry.items()}
            for i, entry in state["state"].items()
        },
    }
    if not write:
        return
    folder = Path(folder)
    steps = str(max((float(v) for k, v in tensors.items() if k.endswith(".step")), default=0.0))
    table["step"] = steps
    text = json.dumps(table, indent=1, allow_nan=True)
    with replaced_file(folder / OPTIMIZER_TENSORS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", "step": steps})
    write_text(folder / OPTIMIZER_TABLE, text + "\n")


def load_optimizer(optimizer: torch.optim.Optimizer, folder: str | os.PathLike[str]) -> None:
    """Load what `save_optimizer` wrote into an optimizer over the same parameters and groups. Nothing is unpickled.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, the two are of different saves, or the groups do not match.
    """
    from safetensors import safe_open

    folder = Path(folder)
    for name in (OPTIMIZER_TENSORS, OPTIMIZER_TABLE):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder / name} is missing; save_optimizer writes it")
        fault = file_fault(folder / name)
        if fault:
            raise UserError(f"{folder / name} {fault}")
    if not is_optimizer_table(folder / OPTIMIZER_TABLE):
        raise UserError(f"{folder / OPTIMIZER_TABLE} is no table of save_optimizer")
    table = json.loads((folder / OPTIMIZER_TABLE).read_text(encoding="utf-8"))
    with safe_open(folder / OPTIMIZER_TENSORS, framework="pt") as file:
        if (file.metadata() or {}).get("step") != table["step"]:
            raise UserError(f"{OPTIMIZER_TENSORS} and {OPTIMIZER_TABLE} in {folder} are of different saves")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    optimizer.load_state_dict(
        {
            "param_groups": [{key: decode(v, tensors) for key, v in group.items()} for group in table["param_groups"]],
            "state": {int(i): {key: decode(v, tensors) for key, v in e.items()} for i, e in table["state"].items()},
        }
    )


@contextmanager
def loads_older_state(optimizer: torch.optim.Optimizer, folder: str | os.PathLike[str]) -> Iterator[None]:
    """A context in which `torch.distributed.checkpoint` loads sharded optimizer states without some of the groups' options.

    It looks in the files for every option that the groups have, and ends in "Missing key in checkpoint state_dict" where
    they were saved before one existed (`agr_suspended`), or by `torch.optim.AdamW`. In this context
    `optimizer.state_dict()` does not name what the files lack, and the optimizer keeps its own values of it. `train` for
    Trainer and `load_checkpoint` for Accelerate loops use it themselves.

    Args:
        optimizer: the one that will load them, also in accelerate's wrapper; those of others are left alone.
        folder: of `torch.distributed.checkpoint`, such as `checkpoint-8/optimizer_0`. Nothing is done where it holds none,
            or a flattened state: see `complete_flattened_state`.

    Raises:
        ValueError: the state was saved by another optimizer. Nothing has been changed then.
    """
    inner, folder = unwrapped(optimizer), Path(folder)
    if not isinstance(inner, StatefulOptimizer) or not (folder / ".metadata").exists():
        yield
        return
    names = [str(name) for name in shards_table(folder)["state_dict_metadata"]]
    options = {name[name.index("param_groups.") :] for name in names if "param_groups." in name}
    if "param_groups.0.params" not in options:
        yield
        return
    held = {name.rpartition(".")[2] for name in names if "param_groups." not in name}
    missing = {"step", *inner.state_keys, *inner.required_state} - held
    if held and missing:
        raise ValueError(
            f"{folder} was saved by another optimizer: {type(inner).__name__} needs {', '.join(sorted(missing))} of each "
            f"parameter, and it holds {', '.join(sorted(held))}; start {type(inner).__name__} afresh"
        )

    def leave_out(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        groups = [
            {key: value for key, value in group.items() if f"param_groups.{i}.{key}" in options}
            for i, group in enumerate(state["param_groups"])
        ]
        return {**state, "param_groups": groups}

    handle = inner.register_state_dict_post_hook(leave_out)
    try:
        yield
    finally:
        handle.remove()


def complete_flattened_state(state: dict[str, Any], model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give a flattened optimizer state the options that it was saved without, those of `optimizer`.

    `torch.distributed.checkpoint` with `flatten_optimizer_state_dict=True` looks for every option of the groups in the
    state, and ends in a KeyError where a state of `torch.optim.AdamW` has no `agr`. Call this
    before `set_optimizer_state_dict`.

    Args:
        state: flattened; entries are added to it.
        model: whose parameters the optimizer has.
        optimizer: the one that will load it.
    """
    groups = {param: group for group in unwrapped(optimizer).param_groups for param in group["params"]}
    for name, param in model.named_parameters():
        for key, value in groups.get(param, {}).items():
            if key != "params":
                state.setdefault(f"param_groups.{name}.{key}", value)
