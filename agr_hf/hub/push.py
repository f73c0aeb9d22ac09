"""A run on the Hub, in one commit: the old revision or the new one, never a mixture."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agr_hf.errors import UserError
from agr_hf.hub.cards import draw_curves, evaluation_file, model_card
from agr_hf.hub.contents import REPORT, is_replaced, public_bytes, refuse_secrets, run_files
from agr_hf.hub.retry import LOG_IN, retry
from agr_hf.hub.training_state import FOLDER, export_checkpoint, newest_checkpoint
from agr_hf.tasks.record import read_record
from agr_hf.texts import one_line, without_secrets

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from transformers import TrainingArguments


# What is true after every push that failed.
UNCHANGED = "The branch is as it was; push again later, what was uploaded is not sent twice"


def push_run(
    run_dir: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    with_training_state: bool = False,
    message: str | None = None,
    api: HfApi | None = None,
) -> str:
    """Publish a finished run: model, card, results, curves and samples, in one commit.

    Weights and tokenizers that this run does not have are removed in the same commit, and where a run was published before,
    files in its folders (samples, training_state, ...); what else is in the repository stays. Uploads that a failure
    interrupts are taken up again, and files that the Hub has already are not sent twice. The run's folder is only read.

    Args:
        run_dir: the --output_dir of a training script.
        repo_id: "name", "user/name" or "organisation/name"; made if it is not there.
        private: visibility of a new repository. Default: the Hub's, public or as the organisation has it.
        revision: a branch, made if it is not there. Default: main.
        create_pr: open a pull request instead of writing to the branch.
        with_training_state: publish the newest checkpoint too, without pickle, so that `agr-hf resume` can train on.
        message: first line of the commit. Default: what the run is.
        api: a client with an endpoint and token of its own. Default: the user's.

    Returns:
        URL of the commit, or of the pull request.

    Raises:
        UserError: the folder holds no finished run, or a token, or there is no such place; nothing was sent.
        ConnectionError: the Hub refused, or failed again and again; the message says what to do. The branch is as it was.
    """
    from huggingface_hub import HfApi

    api = api or HfApi()
    check_place(repo_id, revision)
    revision = revision or None
    if "/" not in repo_id:
        user = retry(f"{repo_id} was not pushed", lambda _: api.whoami()["name"], afterwards=UNCHANGED)
        repo_id = f"{user}/{repo_id}"
    with tempfile.TemporaryDirectory() as temporary:
        contents = prepare(run_dir, repo_id, Path(temporary), with_training_state)
        run = read_record(run_dir)
        title = message or f"Upload a run of {run.optimizer} ({run.task}) with agr_hf"
        title = one_line(without_secrets(title))
        digest = _digest(contents)

        def attempt(number: int) -> str:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision not in (None, "main") and not create_pr:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            # The answer to the last attempt was lost, but perhaps not its effect.
            opened = _find_pull_request(api, repo_id, title, digest) if create_pr and number > 0 else None
            if opened:
                return opened
            # What the deletions are worked out from must be what the commit is put upon: the Hub refuses it otherwise.
            parent = api.repo_info(repo_id, revision=revision).sha
            commit = api.create_commit(
                repo_id, _operations(contents, api.list_repo_files(repo_id, revision=parent)), commit_message=title,
                commit_description=f"Contents {digest}", revision=revision, create_pr=create_pr, parent_commit=parent,
            )  # fmt: skip
            return commit.pr_url or commit.commit_url

        return retry(f"{repo_id} was not pushed", attempt, afterwards=UNCHANGED)


def push_finished(run_dir: str | os.PathLike[str], repo_id: str, **options: Any) -> None:
    """`push_run` as the last act of a training script: prints the URL, or says what is left to do.

    Raises:
        SystemExit: it was not pushed. The run itself is finished, and needs no second training.
    """
    try:
        print(f"published: {push_run(run_dir, repo_id, **options)}")
    except (OSError, ValueError, RuntimeError, KeyboardInterrupt) as error:
        words = ["agr-hf", "push", str(run_dir), "--repo-id", repo_id]
        words += ["--private"] if options.get("private") else []
        words += ["--revision", options["revision"]] if options.get("revision") else []
        words += ["--with-training-state"] if options.get("with_training_state") else []
        raise SystemExit(
            f"{str(error) or 'stopped'}\nThe run is finished, and whole in {run_dir}; publish it with\n    "
            + shlex.join(words)
        ) from None


def prepare(
    run_dir: str | os.PathLike[str],
    repo_id: str,
    temporary: Path,
    with_training_state: bool = False,
    *,
    needs_model: bool = True,
) -> dict[str, bytes | Path]:
    """Everything that a push puts on the Hub, by path: contents, or where they are. Nothing is sent.

    Raises:
        UserError: see `push_run`.
    """
    run = read_record(run_dir)
    files = run_files(run_dir, needs_model=needs_model)
    if with_training_state:
        checkpoint = newest_checkpoint(run_dir)
        if checkpoint is None:
            raise UserError(
                f"{run_dir} has no complete checkpoint to publish; train with checkpoints (--save_strategy epoch), or push "
                "without the training state"
            )
        export_checkpoint(checkpoint, temporary / FOLDER)
        files = {name: path for name, path in files.items() if not name.startswith(f"{FOLDER}/")}
        files |= {f"{FOLDER}/{path.name}": path for path in sorted((temporary / FOLDER).iterdir())}
    contents = {name: public_bytes(name, path) for name, path in files.items()}
    curves = draw_curves(run, temporary / "curves.png")
    if curves:
        contents["curves.png"] = temporary / "curves.png"
    samples = sorted(name for name in files if name.startswith("samples/") and name.endswith(".png"))
    card = model_card(
        run,
        repo_id,
        curves=curves,
        samples=samples[-1] if samples else None,
        compared=all(name in contents for name in REPORT),
        resumable=any(name.startswith(f"{FOLDER}/") for name in contents),
    )
    for name, text in (("README.md", card), (".eval_results/agr_hf.yaml", evaluation_file(run))):
        if text:
            refuse_secrets(name, text.encode())
            contents[name] = text.encode()
    return contents


def _find_pull_request(api: HfApi, repo_id: str, title: str, digest: str) -> str | None:
    """The URL of an open pull request with the same title and contents."""
    for discussion in api.get_repo_discussions(repo_id, discussion_type="pull_request", discussion_status="open"):
        if discussion.title == title:
            head = api.list_repo_commits(repo_id, revision=discussion.git_reference)[0]
            if digest in head.message:
                return discussion.url
    return None


def _operations(contents: Mapping[str, bytes | Path], there: Sequence[str]) -> list[Any]:
    """What makes the files that are there those of a push."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    replaced = [name for name in there if name not in contents and is_replaced(name, of_a_run="results.json" in there)]
    return [
        *[CommitOperationAdd(name, content) for name, content in contents.items()],
        *[CommitOperationDelete(name, is_folder=False) for name in replaced],
    ]


def _digest(contents: Mapping[str, bytes | Path]) -> str:
    """A fingerprint of the files of a push."""
    from huggingface_hub import CommitOperationAdd

    files = [CommitOperationAdd(name, content) for name, content in sorted(contents.items())]
    words = json.dumps([[file.path_in_repo, file.upload_info.sha256.hex()] for file in files])
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def check_place(repo_id: str, revision: str | None = None) -> None:
    """Raise UserError where nothing can be pushed to."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(str(error)) from None
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        raise UserError(f"revision={revision} is a commit; name a branch to push to, or none for main")


def check_push(repo_id: str, revision: str | None = None, token: str | None = None) -> None:
    """What can be known of a push before the training: the place, a token, a network that is not switched off.

    Raises:
        UserError: one of them is missing.
    """
    from huggingface_hub import constants, get_token

    check_place(repo_id, revision)
    if constants.HF_HUB_OFFLINE:
        raise UserError("push_to_hub needs a network, and HF_HUB_OFFLINE is set")
    if not (token or get_token()):
        raise UserError(f"push_to_hub needs a token of the Hub: {LOG_IN}")


def take_over_push(args: TrainingArguments, with_training_state: bool = False) -> dict[str, Any] | None:
    """Trainer's `--push_to_hub` and `--hub_*` as arguments of `push_run`; None where nothing is to be pushed.

    Trainer pushes at every save, and its own card. From here on it does not: a script pushes once, when the run is whole.

    Raises:
        UserError: see `check_push`; or the training state is to be pushed, and none will be saved.
    """
    if not args.push_to_hub:
        return None
    if with_training_state and args.save_strategy == "no":
        raise UserError(
            "push_training_state publishes the last checkpoint, and save_strategy is no; set epoch or steps"
        )
    from huggingface_hub import HfApi

    repo_id = args.hub_model_id or Path(args.output_dir or ".").resolve().name
    check_push(repo_id, args.hub_revision, args.hub_token)
    args.push_to_hub = False
    return {
        "repo_id": repo_id,
        "private": args.hub_private_repo,
        "revision": args.hub_revision,
        "with_training_state": with_training_state,
        "api": HfApi(token=args.hub_token) if args.hub_token else None,
    }
