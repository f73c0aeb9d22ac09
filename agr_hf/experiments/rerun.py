"""Runs of others, run again: from the start and compared, or on from where they ended."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from agr_hf.environment import environment
from agr_hf.files import write_text
from agr_hf.hub.download import download_run, published_results
from agr_hf.hub.results import read_results
from agr_hf.hub.training_state import FOLDER, import_checkpoint
from agr_hf.tasks.runs import without_token_arguments
from agr_hf.texts import one_line, public, without_secrets

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

# A published command is a stranger's text. It is never given to a shell; of it only the script's name and arguments of
# these names are used. They say what is trained on what; none can write elsewhere, send anything, or name code.
_TRAINER = """
    optim optim_args learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm num_train_epochs max_steps
    lr_scheduler_type lr_scheduler_kwargs warmup_steps per_device_train_batch_size per_device_eval_batch_size
    gradient_accumulation_steps gradient_checkpointing seed data_seed bf16 fp16 use_cpu full_determinism
    label_smoothing_factor eval_strategy eval_steps eval_on_start save_strategy save_steps save_total_limit
    logging_strategy logging_steps dataloader_drop_last dataloader_num_workers disable_tqdm recipe dataset_name
    max_train_samples max_eval_samples suspend_agr_at_epoch gradient_statistics_every train_file
"""
_CLASSIFIER = "model_name test_file image_size augmentation lr_milestones lr_gamma"
_ALBERT = """
    model_name_or_path tokenizer_name hidden_size num_hidden_layers num_attention_heads intermediate_size embedding_size
    vocab_size dataset_config_name validation_file max_seq_length mlm_probability max_ngram
"""
_DDPM = """
    recipe dataset_name dataset_revision train_data max_train_images resolution random_flip unet optim learning_rate
    weight_decay agr_steps lr_scheduler lr_warmup_steps max_grad_norm num_epochs max_train_steps train_batch_size
    gradient_accumulation_steps mixed_precision use_ema ema_decay checkpointing_steps save_images_epochs num_grid_samples
    ddpm_num_inference_steps num_eval_samples eval_batch_size features fid seed cpu gradient_statistics_every
"""
ARGUMENTS: dict[str, frozenset[str]] = {
    script: frozenset(re.findall(r"\w+", names))
    for script, names in {
        "train_image_classifier.py": _TRAINER + _CLASSIFIER,
        "train_albert.py": _TRAINER + _ALBERT,
        "train_ddpm.py": _DDPM,
    }.items()
}
# Arguments of a published command that are the publisher's own affair.
LEFT_OUT = re.compile(r"output_dir|report_to|resume_from_checkpoint|push_.*|hub_.*|run_name|logging_dir")
# Published files are known by their names: a path or an address in a command is not of our making.
LONGEST = 10_000
ELSEWHERE = re.compile(r"[A-Za-z][\w+.\-]*://")
FEATURES = re.compile(r"pixels|timm:[\w.\-]+")


def published_command(results: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Script and arguments of a published run, those that may be used.

    Raises:
        ValueError: the command is of no script of agr_hf, or has arguments that are not repeated; the message names them.
    """
    if len(results["command"]) > LONGEST:
        raise ValueError(
            f"the published command has {len(results['command']):,} characters; no run's has over {LONGEST:,}"
        )
    try:
        words = shlex.split(results["command"])
    except ValueError as error:
        raise ValueError(f"the published command cannot be read ({error}): {one_line(results['command'])}") from None
    place = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    script = "" if place is None else Path(words[place]).name
    if place is None or script not in ARGUMENTS:
        raise ValueError(
            f"the published command is not of one of agr_hf's scripts ({', '.join(ARGUMENTS)}): "
            f"{one_line(results['command'])}"
        )
    kept: list[str] = []
    taking: bool | None = None
    for word in words[place + 1 :]:
        if not word.startswith("--"):
            if taking:
                _check_value(word, results)
                kept.append(word)
            elif taking is None:
                raise ValueError(
                    f"the published command begins with {word!r}, which is no argument: {one_line(results['command'])}"
                )
            continue  # the value of an argument left out
        name, _, value = word[2:].partition("=")
        name = name.replace("-", "_")  # the scripts take either
        known = name if name in ARGUMENTS[script] else name.removeprefix("no_")
        taking = known in ARGUMENTS[script]
        if taking:
            _check_value(value, results)
            kept.append(word)
        elif not LEFT_OUT.fullmatch(name):
            raise ValueError(
                f"the published command has --{name}, which is not repeated for others; if you want it, run the command "
                f"yourself: {one_line(results['command'])}"
            )
    features = [value for name, value in pairwise([*kept, ""]) if name == "--features"]
    features += [word.partition("=")[2] for word in kept if word.startswith("--features=")]
    if not all(FEATURES.fullmatch(value) for value in features):
        raise ValueError(
            f"the published command takes features from {', '.join(features)}, which would load code or files; run the "
            f"command yourself if you trust it: {one_line(results['command'])}"
        )
    return script, kept


def _check_value(value: str, results: Mapping[str, Any]) -> None:
    if ELSEWHERE.search(value) or public(value) != value:
        raise ValueError(
            f"the published command names {one_line(value)!r}, a place outside; if you trust it, run the command yourself: "
            f"{one_line(results['command'])}"
        )


def script_path(script: str) -> Path:
    """Where a training script of the package is.

    Raises:
        RuntimeError: the scripts are not installed.
    """
    package = importlib.util.find_spec("agr_hf.training_scripts")
    if package is None or not package.submodule_search_locations:
        raise RuntimeError("the training scripts are not installed with agr_hf; install it again")
    return Path(package.submodule_search_locations[0]) / script


def run_script(script: str, arguments: Sequence[str], processes: int = 1) -> None:
    """Run a training script of the package in processes of its own.

    Raises:
        RuntimeError: it failed; what it wrote to stderr was shown.
    """
    path = script_path(script)
    launcher = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    )
    command = [sys.executable, *launcher, str(path), *arguments]
    shown = [without_secrets(word) for word in without_token_arguments(arguments)]
    print(shlex.join(["python", *launcher, f"training_scripts/{script}", *shown]), flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        raise RuntimeError(f"training_scripts/{script} ended with exit code {code}; its messages are above")


def prepared(published: Mapping[str, Any], output_dir: Path) -> tuple[str, list[str], int]:
    """Script, arguments and processes of a published run, for a folder that holds nothing yet.

    Raises:
        ValueError: the run cannot be repeated here, or the folder has files that it might replace.
    """
    script, arguments = published_command(published)
    processes, most = published.get("processes") or 1, max(os.cpu_count() or 1, torch.cuda.device_count())
    if not 1 <= processes <= most:
        raise ValueError(f"the run was made with {processes} processes, and this machine has room for {most}")
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise ValueError(f"{output_dir} is there and not empty; pass a new folder as --output-dir")
    return script, [*arguments, "--output_dir", str(output_dir)], processes


def reproduce(
    source: str,
    output_dir: str | os.PathLike[str],
    extra: Sequence[str] = (),
    *,
    revision: str | None = None,
    api: HfApi | None = None,
) -> list[tuple[str, Any, Any]]:
    """Run a published run's command again and print both results side by side.

    Args:
        source: a repository on the Hub, or a run's folder.
        output_dir: for the repeated run; `reproduction.json` in it has both.
        extra: arguments of the script that win over the published ones, such as the place of a local file.
        revision: of the repository.
        api: a client with an endpoint and token of its own.

    Returns:
        Name, published and repeated value of every metric.

    Raises:
        ValueError: the run cannot be repeated; the message says why.
        ConnectionError: the Hub failed.
        RuntimeError: the script failed.
    """
    published = published_results(source, revision=revision, api=api)
    output_dir = Path(output_dir)
    script, arguments, processes = prepared(published, output_dir)
    for line in differences(published):
        print(line)
    run_script(script, [*arguments, *extra], processes)
    repeated = read_results(output_dir)
    keys = list(dict.fromkeys([*published["metrics"], *repeated["metrics"]]))
    rows = [(key, published["metrics"].get(key), repeated["metrics"].get(key)) for key in keys]
    record = {"source": public(source), "published": published["metrics"], "repeated": repeated["metrics"]}
    write_text(output_dir / "reproduction.json", json.dumps(record, indent=2) + "\n")
    print(comparison(rows))
    return rows


def differences(published: Mapping[str, Any]) -> list[str]:
    """Where this machine is not that of a published run, a sentence each: equal bits are not to be expected then."""
    on_cpu = {"--cpu", "--use_cpu"} & {word.partition("=")[0] for word in str(published.get("command")).split()}
    here, found = environment(torch.device("cpu") if on_cpu else None), []
    for key in ("device", "torch_threads", "system"):
        if published.get(key) not in (None, here[key]):
            found.append(f"{key}: published {one_line(published[key])}, here {here[key]}")
    for name, version in (published.get("versions") or {}).items():
        if here["versions"].get(name) != version:
            here_too = here["versions"].get(name, "not installed")
            found.append(f"{one_line(name)}: published {one_line(version)}, here {here_too}")
    return found


def comparison(rows: Sequence[tuple[str, Any, Any]]) -> str:
    """A Markdown table of published and repeated metrics."""
    lines = ["| metric | published | repeated | difference |", "| --- | ---: | ---: | ---: |"]
    for name, one, other in rows:
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (one, other))
        shown = [
            "–" if value is None else f"{value:.6g}" if isinstance(value, float) else one_line(value)
            for value in (one, other)
        ]
        lines.append(f"| {one_line(name)} | {shown[0]} | {shown[1]} | {f'{other - one:+.3g}' if numbers else '–'} |")
    return "\n".join(lines)


def resume(
    repo_id: str,
    output_dir: str | os.PathLike[str],
    extra: Sequence[str] = (),
    *,
    revision: str | None = None,
    api: HfApi | None = None,
) -> None:
    """Train on from a published checkpoint: the same bits as resuming from it where it was made.

    The state of optimizer, schedule, random numbers and data comes from safetensors and JSON; nothing from outside is
    unpickled.

    Args:
        repo_id: on the Hub, pushed with its training state.
        output_dir: for the run; the checkpoint is put into it.
        extra: arguments of the script that win over the published ones, such as a larger number of epochs.
        revision: of the repository.
        api: a client with an endpoint and token of its own.

    Raises:
        ValueError: the run cannot be resumed; the message says why.
        ConnectionError: the Hub failed.
        RuntimeError: the script failed.
    """
    output_dir = Path(output_dir)
    if Path(repo_id).is_dir():
        raise ValueError(
            f"{repo_id} is a folder here; run its own command again, with more epochs and --resume_from_checkpoint latest"
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        download_run(
            repo_id, folder, lambda n: n == "results.json" or n.startswith((f"{FOLDER}/", "tokenizer/")),
            revision=revision, api=api,
        )  # fmt: skip
        if not (folder / "results.json").exists():
            raise ValueError(f"{repo_id} has no results.json: it was not published by agr_hf")
        results = read_results(folder)
        if not (folder / FOLDER).is_dir():
            raise ValueError(
                f"{repo_id} was published without its training state; push it with --with-training-state, or start from "
                "its weights"
            )
        script, arguments, processes = prepared(results, output_dir)
        checkpoint = import_checkpoint(folder / FOLDER, output_dir)
        if (folder / "tokenizer").is_dir():
            shutil.copytree(folder / "tokenizer", output_dir / "tokenizer")
    run_script(script, [*arguments, "--resume_from_checkpoint", str(checkpoint), *extra], processes)
