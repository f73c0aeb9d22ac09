"""A checkpoint that others can continue from: Trainer's or accelerate's folder, without pickle.

A published folder `training_state` holds every file of the checkpoint: safetensors and JSON as they are, torch's pickles as
JSON and safetensors of the same name (`agr_hf.unpickled`), in the order of their names.
"""

# No `from __future__ import annotations`: see agr_hf/schema.py.
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from accelerate.utils import load
from huggingface_hub.errors import StrictDataclassError

from agr_hf import unpickled
from agr_hf.errors import UserError
from agr_hf.files import replaced_folder, write_text
from agr_hf.integrations.accelerate import MANIFEST, latest_state
from agr_hf.integrations.checkpoints import latest_checkpoint, numbered_checkpoints
from agr_hf.schema import Number, check_entries, find_reason

FOLDER = "training_state"
# The index: the checkpoint's name, and of each pickle its own name.
INDEX = "checkpoint.json"
PICKLES = (".pt", ".pth", ".bin", ".pkl")
# Trainer writes its arguments for the record and never reads them; the names of files are of what was saved here.
LEFT_OUT = ("training_args.bin", MANIFEST)
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
# Of what is no pickle, these go along: neither a card with paths in it nor what a program keeps hidden.
KINDS = (".safetensors", ".json", ".model")


class LoggedState(TypedDict):
    """An entry of the log of Trainer's state, what the scripts compute with."""

    step: int
    epoch: Number
    loss: NotRequired[Number | None]


class SavedState(TypedDict):
    """Trainer's state, what it and the scripts compute with."""

    global_step: int
    log_history: list[dict[str, Any]]
    max_steps: NotRequired[int | None]
    num_train_epochs: NotRequired[int | None]
    epoch: NotRequired[Number | None]
    logging_steps: NotRequired[Number | None]
    eval_steps: NotRequired[Number | None]
    save_steps: NotRequired[Number | None]


def newest_checkpoint(run_dir: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint of a run, Trainer's or accelerate's, or None."""
    folders = [folder for _, folder in numbered_checkpoints(Path(run_dir))]
    accelerates = any(next(folder.glob("random_states_*.pkl"), None) for folder in folders)
    return latest_state(run_dir) if accelerates else latest_checkpoint(run_dir)


def export_checkpoint(checkpoint: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Write a checkpoint as safetensors and JSON into `folder`.

    Raises:
        UserError: a file cannot be written without pickle; the message names it.
    """
    checkpoint, folder = Path(checkpoint), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pickles = []
    for path in sorted(checkpoint.iterdir()):
        if path.name in LEFT_OUT or path.is_symlink():
            continue
        if path.is_dir():
            raise UserError(
                f"{checkpoint.name} is sharded over processes ({path.name}); only whole checkpoints are published"
            )
        if path.suffix in KINDS and NAME.fullmatch(path.name):
            shutil.copyfile(path, folder / path.name)
        if path.suffix not in PICKLES:
            continue
        try:
            # Tensors, plain values and numpy's arrays, which random states hold; no other class.
            unpickled.save(load(path, map_location="cpu", weights_only=True), folder / path.name)
        except Exception as error:  # an unpickler raises whatever the file makes it raise
            reason = str(error).splitlines()[0]
            raise UserError(f"{checkpoint.name}/{path.name} cannot be written without pickle: {reason}") from None
        pickles.append(path.name)
    write_text(folder / INDEX, json.dumps({"name": checkpoint.name, "pickles": pickles}) + "\n")


def import_checkpoint(folder: str | os.PathLike[str], output_dir: str | os.PathLike[str]) -> Path:
    """Make a checkpoint under `output_dir` again of what `export_checkpoint` wrote. Nothing from outside is unpickled.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: the folder is not what `export_checkpoint` writes.
    """
    folder = Path(folder)
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        name, pickles = str(index["name"]), [str(pickle) for pickle in index["pickles"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder} holds no published training state: {error}") from None
    if not re.fullmatch(r"checkpoint-[0-9]{1,12}", name):
        raise UserError(f"{folder / INDEX} names {name!r}, which is no checkpoint")
    for text in pickles:
        if not NAME.fullmatch(text):
            raise UserError(f"{folder / INDEX} names {text!r}, which is no file name of a checkpoint")
    _check_trainer_state(folder / "trainer_state.json")
    with replaced_folder(Path(output_dir) / name) as temporary:
        made = {INDEX}
        for pickle in pickles:
            if Path(pickle).suffix not in PICKLES:
                raise UserError(f"{folder / INDEX} names {pickle!r}, which is no file of torch.save")
            torch.save(_loaded(folder, pickle), temporary / pickle)
            made |= {f"{pickle}.json", f"{pickle}.safetensors"}
        for path in folder.iterdir():
            if path.name not in made and path.suffix in KINDS:
                shutil.copyfile(path, temporary / path.name)
    return Path(output_dir) / name


def _loaded(folder: Path, pickle: str) -> dict[str, Any]:
    """All that Trainer and accelerate keep in pickles are tables: an optimizer's, a schedule's, random states."""
    try:
        value = unpickled.load(folder / pickle)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{pickle} of the published training state is missing or damaged: {error}") from None
    needed = {"state", "param_groups"} if pickle.startswith("optimizer") else set()
    if not isinstance(value, dict) or not value or not needed <= set(value):
        raise UserError(f"{pickle} of the published training state is none: it is no table of what it should hold")
    return value


def _check_trainer_state(path: Path) -> None:
    """Raise UserError where Trainer could not read its state, or the scripts its log; not every checkpoint has one."""
    from transformers import TrainerState

    if not path.exists():
        return
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        check_entries(saved, SavedState)
        check_entries(saved["log_history"], LoggedState)
        state = TrainerState.load_from_json(str(path))
    except (ValueError, TypeError, RecursionError, StrictDataclassError) as error:
        raise UserError(f"{path.name} is no state of a Trainer: {find_reason(error)}") from None
    if any(steps is not None and steps <= 0 for steps in (state.logging_steps, state.eval_steps, state.save_steps)):
        raise UserError(f"{path.name} is no state of a Trainer: it logs, evaluates or saves every 0 steps")
