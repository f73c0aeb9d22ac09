"""Runs of others: files of a repository, checked against the Hub's own checksums, kept inside the target folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

from agr_hf.errors import UserError
from agr_hf.hub.contents import is_published
from agr_hf.hub.retry import retry
from agr_hf.tasks.record import RunRecord, read_record

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile


def download_run(
    repo_id: str,
    folder: str | os.PathLike[str],
    wanted: Callable[[str], bool],
    *,
    revision: str | None = None,
    api: HfApi | None = None,
) -> str:
    """Download the published files of a run that `wanted` takes, all of one commit.

    Each file's checksum is compared with the one that the Hub keeps for it. Files of kinds that `push_run` does not publish
    are not touched, and none leaves the folder.

    Args:
        repo_id: on the Hub.
        folder: where the files go, under their paths.
        wanted: of a path in the repository, whether to download it.
        revision: branch, tag or commit. Default: main.
        api: a client with an endpoint and token of its own. Default: the user's.

    Returns:
        The commit.

    Raises:
        ConnectionError: the Hub refused, or failed again and again; the message says what to do.
        UserError: the repository names a file that would leave the folder.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = api or HfApi()
    failed = f"{repo_id} was not downloaded"
    commit = str(retry(failed, lambda _: api.repo_info(repo_id, revision=revision).sha))
    tree = retry(failed, lambda _: list(api.list_repo_tree(repo_id, recursive=True, revision=commit)))
    for entry in tree:
        if isinstance(entry, RepoFile) and is_published(entry.path) and wanted(entry.path):
            _check_name(repo_id, entry.path)
            retry(failed, partial(_download, api, repo_id, entry, commit, Path(folder)))
    return commit


def published_record(source: str, *, revision: str | None = None, api: HfApi | None = None) -> RunRecord:
    """The record of a run in a local folder or on the Hub.

    Raises:
        UserError: there is none, or it is not of a run of agr_hf.
        ConnectionError: see `download_run`.
    """
    import tempfile

    if Path(source).exists():
        return read_record(source)
    with tempfile.TemporaryDirectory() as folder:
        try:
            download_run(source, folder, lambda name: name == "results.json", revision=revision, api=api)
        except ConnectionError as error:
            raise ConnectionError(f"there is no folder {source} here, and {error}") from None
        if not (Path(folder) / "results.json").exists():
            raise UserError(f"{source} has no results.json: it was not published by agr_hf")
        return read_record((Path(folder) / "results.json").read_bytes())


def _check_name(repo_id: str, name: str) -> None:
    windows = PureWindowsPath(name)
    if windows.is_absolute() or windows.drive or ".." in windows.parts or any(ord(c) < 32 for c in name):
        raise UserError(f"{repo_id} names a file {name!r}, which would leave the folder; nothing of it was kept")


def _download(api: HfApi, repo_id: str, file: RepoFile, commit: str, folder: Path, number: int) -> Path:
    path = Path(api.hf_hub_download(repo_id, file.path, revision=commit, local_dir=folder, force_download=number > 0))
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{repo_id} names a file {file.path!r}, which would leave the folder")
    content = path.read_bytes()
    if file.lfs:
        found, expected = hashlib.sha256(content).hexdigest(), file.lfs.sha256
    else:
        found, expected = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), file.blob_id
    if found != expected:
        path.unlink()
        raise OSError(f"{file.path} arrived damaged: its checksum is {found}, and {expected} on the Hub")
    return path
