"""Runs of others, run again: from the start and compared, or on from where they ended."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import logging
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from agr_hf.environment import environment
from agr_hf.errors import UserError
from agr_hf.files import write_text
from agr_hf.hub.download import download_run, published_record
from agr_hf.hub.training_state import FOLDER, import_checkpoint, newest_checkpoint
from agr_hf.integrations.run import run_own_script
from agr_hf.tasks.arguments import ScriptParser
from agr_hf.tasks.recipes import given_arguments
from agr_hf.tasks.record import RunRecord, argument_words, read_record
from agr_hf.tasks.runs import plain
from agr_hf.texts import one_line, public, without_secrets

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

# The scripts whose runs are repeated for others.
SCRIPTS = ("train_image_classifier.py", "train_albert.py", "train_ddpm.py")
# A published record is a stranger's. Of transformers' TrainingArguments only these are taken over: they say how to train,
# and none can write elsewhere, send anything, or name code. The scripts' own arguments say so themselves (ScriptParser).
TRAINER_ARGUMENTS = frozenset(
    """
    optim optim_args learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm num_train_epochs max_steps
    lr_scheduler_type lr_scheduler_kwargs warmup_steps per_device_train_batch_size per_device_eval_batch_size
    gradient_accumulation_steps gradient_checkpointing seed data_seed bf16 fp16 use_cpu full_determinism
    label_smoothing_factor eval_strategy eval_steps eval_on_start save_strategy save_steps save_total_limit
    logging_strategy logging_steps dataloader_drop_last dataloader_num_workers disable_tqdm
    """.split()
)
LONGEST = 10_000  # characters of all values
# Published files are known by their names: a path or an address is not of our making.
ELSEWHERE = re.compile(r"[A-Za-z][\w+.\-]*://")
TRUST = "if you trust it, run the script yourself"
# Arguments that hold a token, also abbreviated.
TOKEN_ARGUMENTS = re.compile(r"--(push_to_)?hub_t\w*")


@functools.cache
def script_parser(script: str) -> ScriptParser:
    """The parser of a script of the package, which raises UserError where it refuses a command line."""
    parser: ScriptParser = runpy.run_path(str(script_path(script)))["make_parser"]()

    def refuse(message: str) -> None:
        raise UserError(f"the published arguments are not those of {script}: {one_line(message)[:300]}")

    parser.error = refuse  # type: ignore[method-assign, assignment]
    return parser


def published_arguments(run: RunRecord) -> list[str]:
    """The arguments of a published run, as words for its script.

    Raises:
        UserError: the run is of no script of agr_hf, or has an argument or a value that is not repeated for others; the
            message names it.
    """
    if run.script not in SCRIPTS:
        raise UserError(
            f"{one_line(run.script)[:100]!r} is not one of agr_hf's scripts ({', '.join(SCRIPTS)}); run your copy of it "
            "with the arguments that the run's card shows"
        )
    length = sum(map(len, argument_words(run.arguments)))
    if length > LONGEST:
        raise UserError(f"the published arguments have {length:,} characters; no run's have over {LONGEST:,}")
    parser = script_parser(run.script)
    of_trainer = {of.name for of in dataclasses.fields(TrainingArguments)}
    for name, value in run.arguments.items():
        allowed = name in TRAINER_ARGUMENTS if name in of_trainer else parser.repeatable.get(name, False)
        if not allowed:
            raise UserError(
                f"the published run has --{one_line(name)[:100]}, which is not repeated for others; {TRUST}"
            )
        for text in map(str, value if isinstance(value, list) else [value]):
            code = (name == "optim" and ":" in text) or (isinstance(allowed, str) and not re.fullmatch(allowed, text))
            if code or ELSEWHERE.search(text) or public(text) != text:
                what = "would load code or files" if code else "is a place outside"
                raise UserError(f"the published run has --{name} {one_line(text)[:200]!r}, which {what}; {TRUST}")
    words = argument_words(run.arguments)
    # What the parser does not read back as it was is no value of this argument, or another argument in disguise.
    read = plain(given_arguments(parser, [*words, "--output_dir", "x"]))
    if read != {**run.arguments, "output_dir": "x"}:
        raise UserError(f"the published arguments are not those of {run.script}: {one_line(shlex.join(words))[:300]}")
    return words


def without_token_arguments(argv: Sequence[str]) -> list[str]:
    """The arguments of a command but for `--hub_token` and its likes, however they are written."""
    words, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, _ = word.partition("=")
        if not TOKEN_ARGUMENTS.fullmatch(name.replace("-", "_").replace("__", "--", 1)):
            words.append(word)
        elif not equals and rest:
            rest.pop(0)
    return words


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


def prepare_rerun(published: RunRecord, output_dir: Path) -> tuple[list[str], int]:
    """Arguments and processes of a published run, for a folder that holds nothing yet.

    Raises:
        UserError: the run cannot be repeated here, or the folder has files that it might replace.
    """
    arguments = published_arguments(published)
    processes, most = published.processes or 1, max(os.cpu_count() or 1, torch.cuda.device_count())
    if not 1 <= processes <= most:
        raise UserError(f"the run was made with {processes} processes, and this machine has room for {most}")
    refuse_filled(output_dir)
    return [*arguments, "--output_dir", str(output_dir)], processes


def refuse_filled(output_dir: Path) -> None:
    """Raise UserError where a folder has files that a published run might replace."""
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise UserError(f"{output_dir} is there and not empty; pass a new folder as --output-dir")


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
        UserError: the run cannot be repeated; the message says why.
        ConnectionError: the Hub failed.
        RuntimeError: the script failed.
    """
    published = published_record(source, revision=revision, api=api)
    output_dir = Path(output_dir)
    arguments, processes = prepare_rerun(published, output_dir)
    for line in differences(published):
        print(line)
    files = published.dataset.get("files") or []
    if files and not any("file" in word or "data" in word for word in extra if word.startswith("--")):
        print(
            f"the run read files of its author ({one_line(', '.join(files))}): pass yours behind --, as --train_file PATH"
        )
    run_script(published.script, [*arguments, *extra], processes)
    repeated = read_record(output_dir)
    for line in other_data(published, repeated):
        print(line)
    keys = list(dict.fromkeys([*published.metrics, *repeated.metrics]))
    rows = [(key, published.metrics.get(key), repeated.metrics.get(key)) for key in keys]
    record = {"source": public(source), "published": published.metrics, "repeated": repeated.metrics}
    write_text(output_dir / "reproduction.json", json.dumps(record, indent=2) + "\n")
    print(comparison(rows))
    return rows


def differences(published: RunRecord) -> list[str]:
    """Where this machine is not that of a published run, a sentence each: equal bits are not to be expected then."""
    on_cpu = published.arguments.get("use_cpu") or published.arguments.get("cpu")
    here, found = environment(torch.device("cpu") if on_cpu else None), []
    for key in ("device", "torch_threads", "system"):
        value = getattr(published, key)
        if value not in (None, here[key]):
            found.append(f"{key}: published {one_line(value)}, here {here[key]}")
    for name, version in published.versions.items():
        if here["versions"].get(name) != version:
            here_too = here["versions"].get(name, "not installed")
            found.append(f"{one_line(name)}: published {one_line(version)}, here {here_too}")
    return found


def other_data(published: RunRecord, repeated: RunRecord) -> list[str]:
    """Where the data of two runs are known to differ, a sentence each: their results are not of the same thing then."""
    keys = ("name", "hub_id", "revision", "config", "examples", "split", "evaluated", "sha256")
    pairs = [(key, published.dataset.get(key), repeated.dataset.get(key)) for key in keys]
    return [
        f"other data than published: {key} {one_line(one)}, here {one_line(other)}"
        for key, one, other in pairs
        if None not in (one, other) and one != other
    ]


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
    output_dir: str | os.PathLike[str] | None,
    extra: Sequence[str] = (),
    *,
    script: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    api: HfApi | None = None,
) -> None:
    """Train on from a published checkpoint: the same bits as resuming from it where it was made.

    The state of optimizer, schedule, random numbers and data comes from safetensors and JSON; nothing from outside is
    unpickled.

    Args:
        repo_id: on the Hub, pushed with its training state; with `script` also the folder of a run here, finished or not.
        output_dir: for the run; the checkpoint is put into it. May be None for a folder here, which then goes on itself.
        extra: arguments of the script that win over the published ones, such as a larger number of epochs.
        script: the user's own, for a run that is of no script of agr_hf; it gets `extra` as its arguments, and no others.
        revision: of the repository.
        api: a client with an endpoint and token of its own.

    Raises:
        UserError: the run cannot be resumed; the message says why.
        ConnectionError: the Hub failed.
        RuntimeError: the script failed.
    """
    if script is not None and not Path(script).is_file():
        raise UserError(f"there is no script {str(script)!r}; pass the path of your copy as --script")
    if script is not None and Path(repo_id).is_dir():
        _resume_folder(Path(repo_id), Path(output_dir or repo_id), script, extra)
        return
    if Path(repo_id).is_dir():
        raise UserError(
            f"{repo_id} is a folder here; run its own command again, with more epochs and --resume_from_checkpoint latest, "
            "or pass --script with the script of the run"
        )
    if output_dir is None:
        raise UserError(
            f"there is no folder {repo_id!r} here; name the folder of a run, or for a repository on the Hub pass "
            "--output-dir with a new folder too"
        )
    output_dir = Path(output_dir)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        download_run(
            repo_id, folder, lambda n: n == "results.json" or n.startswith((f"{FOLDER}/", "tokenizer/")),
            revision=revision, api=api,
        )  # fmt: skip
        if not (folder / "results.json").exists():
            raise UserError(f"{repo_id} has no results.json: it was not published by agr_hf")
        published = read_record(folder)
        if not (folder / FOLDER).is_dir():
            raise UserError(
                f"{repo_id} was published without its training state; push it with --with-training-state, or start from "
                "its weights"
            )
        if published.own_script and script is None:
            name = one_line(published.script)[:100]
            raise UserError(f"{repo_id} is a run of its author's script {name!r}; pass your copy of it as --script")
        if script is not None and not published.own_script:
            raise UserError(f"{repo_id} is a run of agr_hf's {published.script}; leave --script out")
        if script is not None:
            _refuse_several_processes(published)
            refuse_filled(output_dir)
            print(f"the arguments of the published run: {one_line(shlex.join(argument_words(published.arguments)))}")
            run_own_script(script, extra, import_checkpoint(folder / FOLDER, output_dir), output_dir)
            return
        arguments, processes = prepare_rerun(published, output_dir)
        checkpoint = import_checkpoint(folder / FOLDER, output_dir)
        if (folder / "tokenizer").is_dir():
            shutil.copytree(folder / "tokenizer", output_dir / "tokenizer")
    run_script(published.script, [*arguments, "--resume_from_checkpoint", str(checkpoint), *extra], processes)


def _resume_folder(folder: Path, output_dir: Path, script: str | os.PathLike[str], extra: Sequence[str]) -> None:
    """Train on from the newest complete checkpoint of a run here, in its folder or in another one."""
    if (folder / "results.json").exists():
        run = read_record(folder)
        _refuse_several_processes(run)
        if run.arguments and not extra:
            again = ["agr-hf", "resume", str(folder), "--script", str(script), "--", *argument_words(run.arguments)]
            raise UserError(
                f"the run of {folder} had arguments, and the script gets none but those behind --; repeat what still "
                f"holds:\n    {one_line(shlex.join(again))}"
            )
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        raise UserError(f"{folder} has no complete checkpoint to go on from; start the script again")
    if output_dir.resolve() != folder.resolve():
        refuse_filled(output_dir)
        checkpoint = Path(shutil.copytree(checkpoint, output_dir / checkpoint.name))
    run_own_script(script, extra, checkpoint, output_dir)


def _refuse_several_processes(run: RunRecord) -> None:
    if (run.processes or 1) > 1:
        raise UserError(
            f"the run was made with {run.processes} processes, and --script runs in one; start the script with torchrun, "
            "and have it pass the checkpoint to trainer.train(resume_from_checkpoint=...)"
        )
