"""What of a run's folder is published, and in what words."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from agr_hf.errors import UserError
from agr_hf.integrations.checkpoints import file_fault, read_shards
from agr_hf.tasks.record import NO_RECORD
from agr_hf.texts import public, secret_in, without_secrets

# Weights are published as safetensors only: never what must be unpickled, and no event files, whose names hold a host's.
KINDS = (".safetensors", ".json", ".model", ".png", ".jinja")
VOCABULARIES = ("vocab.txt", "merges.txt")
# Folders at the top of a run: components of a diffusers pipeline, samples, an exported checkpoint.
FOLDERS = ("unet", "scheduler", "vae", "text_encoder", "tokenizer", "samples", "training_state")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "model_index.json")
# What another model's loader would take up beside this run's files.
LOADED = re.compile(
    r"(adapter_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
    r"|(adapter_config|model_index|tokenizer|added_tokens|special_tokens_map|vocab|(generation|preprocessor|tokenizer)_config)"
    r"\.json|chat_template\.(jinja|json)|(tokenizer|spiece)\.model|(vocab|merges)\.txt"
)
# Keys of transformers' and diffusers' JSON files whose values may be this machine's paths.
PATH_KEYS = re.compile(r"(_or_path|_file|_dir|_path|checkpoint)$")
# What `agr-hf report --output RUN` leaves beside a run.
REPORT = ("report.html", "differences.png")
# Made by push itself.
MADE = ("README.md", "curves.png", ".eval_results/agr_hf.yaml")


def is_published(path: str) -> bool:
    """Whether a path, relative to the run and with forward slashes, is of a kind that a push puts on the Hub."""
    parts = PurePosixPath(path).parts
    if path in MADE:
        return True
    if not parts or any(part.startswith(".") or part in ("", "..") for part in parts) or path.startswith("/"):
        return False
    kind = PurePosixPath(path).suffix in KINDS or parts[-1] in VOCABULARIES or path in REPORT
    return kind and (len(parts) == 1 or parts[0] in FOLDERS)


def is_replaced(path: str, of_a_run: bool) -> bool:
    """Whether a push of a run without this file takes it off the Hub: a run's folders, a model's weights and tokenizer.

    Other files at the top are left, whoever put them there.

    Args:
        path: in the repository.
        of_a_run: whether a run was published there before; files in folders are another's otherwise.
    """
    inside = len(PurePosixPath(path).parts) > 1 or path in MADE or path in REPORT
    return is_published(path) and (bool(LOADED.fullmatch(path)) or (inside and of_a_run))


def run_files(run_dir: str | os.PathLike[str], *, needs_model: bool = True) -> dict[str, Path]:
    """The files of a run to be published, by their path in the repository.

    Args:
        run_dir: of a finished run.
        needs_model: whether a folder without a model is refused; a card needs none.

    Raises:
        UserError: the folder holds no finished run; the message says what is missing.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is no folder; pass the --output_dir of a finished run")
    files = {
        path.relative_to(run_dir).as_posix(): path
        for folder in (run_dir, *(run_dir / name for name in FOLDERS))
        if folder.is_dir()
        for path in sorted(folder.rglob("*") if folder != run_dir else folder.iterdir())
        if path.is_file()
    }
    files = {name: path for name, path in files.items() if is_published(name) and name not in MADE}
    for name, path in files.items():
        if not _is_text(name):
            raise UserError(f"{run_dir}: {name!a} is no name in UTF-8, which the Hub needs; rename the file")
        if path.is_symlink() or any(parent.is_symlink() for parent in list(path.parents)[: name.count("/")]):
            raise UserError(f"{run_dir}: {name} is a link, which is not followed; put the file itself there")
    if "results.json" not in files:
        raise UserError(f"{run_dir} {NO_RECORD}")
    if needs_model and not any(name in files for name in WEIGHTS):
        raise UserError(
            f"{run_dir} has no model: one of {', '.join(WEIGHTS)} is needed beside results.json; trainer.save_model() at "
            "the end of a script writes it"
        )
    fault = _find_fault(files)
    if fault:
        raise UserError(f"{run_dir}: {fault}; nothing was pushed: train it again with --resume_from_checkpoint latest")
    return files


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes of another encoding, as the system gives them
        return False
    return True


def _find_fault(files: Mapping[str, Path]) -> str | None:
    """What keeps a model from being loaded, or None."""
    for name, path in files.items():
        fault = file_fault(path)
        if fault:
            return f"{name} {fault}"
        if name.endswith(".safetensors.index.json"):
            missing = [shard for shard in read_shards(path) if str(PurePosixPath(name).with_name(shard)) not in files]
            if missing:
                return f"{name} names {missing[0]}, which is missing"
    if "model_index.json" in files and not any(re.fullmatch(r"unet/.*\.safetensors", name) for name in files):
        return "unet has no weights"
    return None


def public_bytes(name: str, path: Path) -> bytes | Path:
    """What is published of a file: its path, or for JSON that names this machine's paths other bytes.

    Raises:
        UserError: the file holds a token or another secret of the environment.
    """
    content: bytes | Path = path
    if path.suffix == ".json":
        raw = path.read_bytes()
        value = json.loads(raw)
        cleaned = _without_paths(value)
        if name.endswith("trainer_state.json") and isinstance(cleaned, dict) and "best_model_checkpoint" in cleaned:
            cleaned["best_model_checkpoint"] = None  # a path of this machine
        content = raw if cleaned == value else json.dumps(cleaned, indent=2).encode() + b"\n"
        refuse_secrets(name, json.dumps(cleaned, ensure_ascii=False).encode(errors="replace"))  # \u escapes hide one
    refuse_secrets(name, content if isinstance(content, bytes) else content.read_bytes())
    return content


def _without_paths(value: Any, key: str = "") -> Any:
    """Only where a path is meant: "/" may be a piece of a vocabulary."""
    if isinstance(value, dict):
        return {name: _without_paths(entry, name) for name, entry in value.items()}
    if isinstance(value, list):
        return [_without_paths(entry, key) for entry in value]
    return public(value) if isinstance(value, str) and PATH_KEYS.search(key) else value


def refuse_secrets(name: str, content: bytes) -> None:
    """Raise UserError if a secret is in the name or the bytes of a file to be published."""
    found = secret_in(os.fsencode(name) + b"\n" + content)
    if found:
        raise UserError(f"{without_secrets(name)} holds {found}; nothing was pushed: take it out first")
