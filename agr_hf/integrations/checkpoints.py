"""Checkpoints that can be trusted: what is wrong with one, and which is the last complete one."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from agr_hf.errors import UserError

logger = logging.getLogger(__name__)

OPTIMIZER_TENSORS = "optimizer.safetensors"
OPTIMIZER_TABLE = "optimizer.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "pytorch_model.bin")
# FSDP's kinds, sharded and whole.
FSDP_WEIGHTS = ("pytorch_model_fsdp_0", "pytorch_model_fsdp.bin")
FSDP_OPTIMIZER = ("optimizer_0", "optimizer.bin")
WEIGHTS_ONLY = (
    "it holds weights only (save_only_model=True), and neither optimizer, schedule nor random numbers; train on from its "
    "weights with from_pretrained and another output_dir, or with trainer.train(resume_from_checkpoint=...), which goes on "
    "at its step with a fresh optimizer and schedule"
)


def resolve_checkpoint(
    resume: str | bool | None, output_dir: str | os.PathLike[str] | None, processes: int | None = None
) -> str | None:
    """What `--resume_from_checkpoint` means: "latest" is the last complete checkpoint of `output_dir`, or none yet.

    Args:
        resume: None, "latest", or the path of a checkpoint folder; True and False, as `Trainer.train` takes them, are
            "latest" and None.
        output_dir: where Trainer saves; None holds no checkpoint.
        processes: of the run that resumes; see `latest_checkpoint`. Default None.

    Returns:
        A path for `Trainer.train(resume_from_checkpoint=...)`, or None to start afresh.

    Raises:
        ValueError: the named folder is no complete checkpoint, or the newest one holds weights only; the message says what
            is wrong with which file.
    """
    if resume is None or resume is False:
        return None
    if resume == "latest" or resume is True:
        found = None if output_dir is None else latest_checkpoint(output_dir, processes)
        if found is None:
            logger.warning("%s has no checkpoint to resume from: training starts at step 0", output_dir)
            return None
        resume = str(found)
    elif fault := checkpoint_fault(resume):
        raise UserError(
            f"cannot resume from {resume}: {fault}; name another one, or 'latest' for the last complete one"
        )
    saved = len(list(Path(resume).glob("rng_state*.pth")))
    if processes not in (None, saved):
        logger.warning(
            "%s has the random states of %d processes, and this run has %d (another number saved it, or one died in its "
            "save): what is drawn from here on is not what a run never stopped draws",
            resume,
            saved,
            processes,
        )
    return resume


def latest_checkpoint(output_dir: str | os.PathLike[str], processes: int | None = None) -> Path | None:
    """The newest complete `checkpoint-N` under a folder, or None.

    A process killed while it saved leaves files missing or cut short, and Trainer's own "latest" would take them. Each
    newer checkpoint that is passed over is named in a warning with the file at fault, and left as it is.

    Args:
        output_dir: where Trainer saves.
        processes: checkpoints with the random states of so many processes are preferred; where there is none, fewer
            processes may have saved them, and the newest is taken. Default None, any number.

    Raises:
        ValueError: the newest one holds weights only. To start over would end in its deletion (`save_total_limit`).
    """

    for needed in (processes, None) if processes and processes > 1 else (None,):
        found = newest_complete(Path(output_dir), partial(checkpoint_fault, processes=needed))
        if found is not None:
            return found
    return None


def newest_complete(output_dir: Path, fault_of: Callable[[Path], str | None]) -> Path | None:
    """The newest `checkpoint-N` of a folder without a fault, or None; those passed over are named in warnings."""
    for _, folder in sorted(numbered_checkpoints(output_dir), reverse=True):
        fault = fault_of(folder)
        if fault is None:
            return folder
        if fault == WEIGHTS_ONLY:
            raise UserError(f"cannot resume from {folder}: {fault}")
        logger.warning("%s is passed over: %s", folder, fault)
    return None


def numbered_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """Every folder `checkpoint-N` of a folder, with its N."""
    matches = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.glob("checkpoint-*")]
    return [(int(match[1]), path) for match, path in matches if match and path.is_dir()]


def checkpoint_fault(folder: str | os.PathLike[str], processes: int | None = None) -> str | None:
    """What keeps a Trainer checkpoint from being resumed, as a sentence, or None if it is complete.

    Every file is looked at: safetensors by their header and length, torch's files by the checksums of their archive, JSON
    by parsing, the shards of FSDP by their length. No pickle gets to run anything. Random states of
    `processes` are looked for; by default of as many as their numbers say.
    """
    folder = Path(folder)
    fault = folder_fault(folder)
    if fault:
        return fault
    state = folder / "trainer_state.json"  # Trainer writes it last
    if not state.exists():
        return "trainer_state.json is missing"
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    table = json.loads(state.read_text(encoding="utf-8"))
    step = table.get("global_step") if isinstance(table, dict) else None
    if not isinstance(step, int):
        return "trainer_state.json holds no global_step"
    if match and step != int(match[1]):
        return f"trainer_state.json is of step {step}"
    if (folder / OPTIMIZER_TABLE).exists() and not is_optimizer_table(folder / OPTIMIZER_TABLE):
        return f"{OPTIMIZER_TABLE} is no table of save_optimizer"
    if any(path.is_dir() for path in folder.glob("global_step*")):  # DeepSpeed's
        return _rank_states_fault(folder, processes)
    names = {path.name for path in folder.iterdir()}
    is_fsdp = not names.isdisjoint(FSDP_WEIGHTS + FSDP_OPTIMIZER)
    weights, optimizer = (FSDP_WEIGHTS, FSDP_OPTIMIZER) if is_fsdp else (WEIGHTS, ("optimizer.pt",))
    if names.isdisjoint(weights):
        return f"{weights[0]} is missing"
    index = folder / "model.safetensors.index.json"
    if index.exists() and "model.safetensors" not in names:
        try:
            missing = set(read_shards(index)) - names
        except ValueError as error:
            return str(error)
        if missing:
            return f"{min(missing)} is missing"
    if names.isdisjoint({*optimizer, "scheduler.pt"}) and not list(folder.glob("rng_state*.pth")):
        return WEIGHTS_ONLY
    for needed in (optimizer, ("scheduler.pt",)):
        if names.isdisjoint(needed):
            return f"{needed[0]} is missing"
    return _rank_states_fault(folder, processes)


def _rank_states_fault(folder: Path, processes: int | None) -> str | None:
    """The first of the processes' random states that is missing, as a sentence, or None.

    Trainer's first process does not wait for the others before it writes `trainer_state.json`: one may have died before it
    wrote its own. How many they were is not written down: at least `processes`, or as many as the highest number says.
    """
    if (folder / "rng_state.pth").exists():
        return None
    ranks = {int(path.stem.rpartition("_")[2]) for path in folder.glob("rng_state_[0-9]*.pth")}
    if not ranks:
        return "rng_state.pth is missing"
    # On a host with a disk of its own they need not begin at 0.
    needed = range(0 if processes else min(ranks), max(processes or 0, max(ranks) + 1))
    return next((f"rng_state_{rank}.pth is missing" for rank in needed if rank not in ranks), None)


def read_shards(index: Path) -> list[str]:
    """The files that a `model.safetensors.index.json` names.

    Raises:
        ValueError: it is no such index.
    """
    return sorted(set(read_weight_map(index).values()))


def read_weight_map(index: Path) -> dict[str, str]:
    """The file of each weight, by a `model.safetensors.index.json`.

    Raises:
        ValueError: it is no such index.
    """
    table = json.loads(index.read_text(encoding="utf-8"))
    found = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise UserError(f"{index.name} is no index of weights")
    return found


def folder_fault(folder: Path) -> str | None:
    """The first fault among the files of a folder, as a sentence, or None."""
    if not folder.is_dir():
        return "there is no such folder"
    for path in sorted(folder.iterdir()):
        fault = file_fault(path)
        if fault:
            return f"{path.name} {fault}"
        if re.fullmatch(r"(pytorch_model_fsdp|optimizer)_\d+", path.name) and (fault := _shards_fault(path)):
            return f"{path.name}/{fault}"
    return None


def _shards_fault(folder: Path) -> str | None:
    """What is wrong with a folder of `torch.distributed.checkpoint`, as a sentence, or None: all files are there, as long as
    its table says. They may be too large to be read whole by every process."""
    metadata = folder / ".metadata"  # written last
    if not metadata.exists():
        return ".metadata is missing"
    try:
        records = [record.state for record in shards_table(folder)["storage_data"].values()]
        ends = [(str(record["relative_path"]), int(record["offset"]) + int(record["length"])) for record in records]
    except Exception as error:  # an unpickler raises whatever the file makes it raise
        return f".metadata is cut short or damaged ({error})"
    for name, end in sorted(ends):
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size < end:
            return f"{name} is cut short"
    return None


def shards_table(folder: Path) -> dict[str, Any]:
    """What the table of a folder of `torch.distributed.checkpoint` holds, read without calling anything that it names."""
    with open(folder / ".metadata", "rb") as file:
        table: dict[str, Any] = _Records(file).load().state
    return table


class _Record:
    """Stands for an object of any class in a pickle: its state, and nothing of the class."""

    state: Any = None

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Records(pickle.Unpickler):
    """Reads a pickle without calling anything that it names."""

    def find_class(self, module: str, name: str) -> Any:
        return _Record


def file_fault(path: Path) -> str | None:
    """What is wrong with one file of a model or checkpoint, as the end of a sentence, or None."""
    if not path.is_file():
        return None
    if path.suffix == ".safetensors":
        return _safetensors_fault(path)
    if path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            return "is cut short or no JSON"
    if path.suffix in (".pt", ".pth", ".bin", ".pkl"):
        try:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
        except (zipfile.BadZipFile, OSError):
            return "is cut short or no archive of torch"
        if broken:
            return f"is damaged (in {broken})"
    return None


def _safetensors_fault(path: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            return None
    except (SafetensorError, OSError, ValueError) as error:
        return f"is cut short or damaged ({error})"


def is_optimizer_table(path: Path) -> bool:
    """Whether JSON has what `save_optimizer` writes."""
    table = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(table, dict) or not isinstance(table.get("step"), str):
        return False
    groups, state = table.get("param_groups"), table.get("state")
    entries = [*groups, *state.values()] if isinstance(groups, list) and isinstance(state, dict) else [None]
    return all(isinstance(entry, dict) for entry in entries)
