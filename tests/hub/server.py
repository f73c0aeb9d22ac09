"""A Hugging Face Hub for tests: its protocol on the loopback address, with faults on demand.

Written from what the client sends and what it reads in the answers (huggingface_hub 1.33 and 2.4). Everything is in
memory. Not offered: Xet, multipart uploads, tags, pages of long lists.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, parse_qsl, unquote

import yaml

FAULTS = ("500", "503", "429", "drop", "drop_after", "truncate", "checksum", "expired")
LFS_SIZE = 10 * 1024 * 1024  # files of this size and more are LFS files, and those with these names
LFS_SUFFIXES = (".bin", ".gz", ".h5", ".npz", ".onnx", ".parquet", ".pkl", ".pt", ".pth", ".safetensors", ".zip")
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
INVALID_TOKEN = "Invalid credentials in Authorization header"
DATE = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Request:
    """One request as it came in, whatever was answered."""

    method: str
    path: str  # as sent, so with %2F in names of branches; without the query
    query: dict[str, str]
    headers: dict[str, str]  # names in lower case; never the authorization
    body: bytes = field(repr=False)


@dataclass(frozen=True)
class File:
    content: bytes
    sha256: str | None = None  # as the client named it: an LFS file

    @property
    def blob(self) -> bytes:
        """What git has of it: the content, or LFS's pointer."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return pointer.encode() if self.sha256 else self.content

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.blob) + self.blob).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid

    @property
    def lfs(self) -> dict[str, Any]:
        """Of an LFS file, what lists say about it; they call the hash oid or sha256."""
        hashes = {"oid": self.sha256, "sha256": self.sha256}
        return {"lfs": {**hashes, "size": len(self.content), "pointerSize": len(self.blob)}} if self.sha256 else {}


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    description: str
    parent: Commit | None = field(repr=False)
    files: dict[str, File] = field(repr=False)  # all of them, not the changed ones


@dataclass
class Repository:
    type: str
    id: str
    private: bool
    refs: dict[str, Commit] = field(default_factory=dict)  # "main", "refs/pr/1"
    history: dict[str, Commit] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    discussions: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """As in addresses."""
        return self.id if self.type == "model" else f"{self.type}s/{self.id}"

    def at(self, revision: str) -> Commit:
        ref = revision.removeprefix("refs/heads/")
        if commit := self.refs.get(ref) or self.history.get(revision):
            return commit
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, ref: str, parent: Commit | None, title: str, description: str, files: dict[str, File]) -> Commit:
        content = (self.id, len(self.history), title, description, {path: file.etag for path, file in files.items()})
        commit = Commit(hashlib.sha1(repr(content).encode()).hexdigest(), title, description, parent, files)
        self.history[commit.oid] = commit
        self.refs[ref] = commit
        return commit

    def discuss(self, title: str, pull_request: bool) -> int:
        """The number of a new discussion."""
        number = len(self.discussions) + 1
        about = {"num": number, "title": title, "author": {"name": Hub.user}, "createdAt": DATE, "status": "open"}
        repo = {"repo": {"name": self.id, "type": self.type}, "changes": {"base": "refs/heads/main"}}
        rest = {"isPullRequest": pull_request, "filesWithConflicts": [], "events": []}
        self.discussions.append({**about, **repo, **rest})
        return number


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False  # half of the body, then the end of the connection


class Refused(Exception):
    """An answer that is an error, in the Hub's form."""

    def __init__(self, status: int, message: str, code: str = "", headers: Any = (), **body: str) -> None:
        super().__init__(message)
        line = message.splitlines()[0].encode("ascii", "replace").decode()
        headers = {"X-Error-Message": line, **({"X-Error-Code": code} if code else {}), **dict(headers)}
        self.answer = replace(json_answer({"error": message, **body}, status), headers=headers)


def json_answer(value: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json; charset=utf-8"})


def damaged(data: bytes) -> bytes:
    """The same with one byte changed."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else b"?"


@dataclass
class Fault:
    number: int
    kind: str
    times: int | None
    target: tuple[str, str] | None = None  # method and path of the first request that met it


class Hub:
    """A Hub for the length of a with block.

    `requests` are all requests so far; `faults_met` counts those that a fault met. The client uploads with several
    threads: the order of its requests for several LFS files is open.
    """

    user = "tester"
    organization = "lab"

    def __init__(self, token: str = "hf_only_for_tests") -> None:
        self.token = token
        self.retry_after = 0  # seconds, in answers of fault "429"
        self.faults_met = 0
        self._expired = False
        self._repositories: dict[tuple[str, str], Repository] = {}
        self._requests: list[Request] = []
        self._faults: list[Fault] = []
        self._lock = threading.RLock()

    def __enter__(self) -> Hub:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        for connection in self._server.connections.copy():  # a client keeps them open, and threads wait in them
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def api(self):
        """The real client, for this Hub and its user."""
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, token=self.token)

    def environment(self, home: str | Path) -> dict[str, str]:
        """What a process needs in its environment to talk to this Hub, with its cache in the folder `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(Path(home) / "hub"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def expire_token(self) -> None:
        """From now on the token is as good as a wrong one."""
        self._expired = True

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        with self._lock:
            files = self._repositories[repo_type, repo_id].at(revision).files
            return {path: file.content for path, file in files.items()}

    def commits(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> list[Commit]:
        """Newest first."""
        with self._lock:
            commits = [self._repositories[repo_type, repo_id].at(revision)]
            while commits[-1].parent:
                commits.append(commits[-1].parent)
            return commits

    def plant(self, repo_id: str, path: str, content: bytes) -> None:
        """Put a file of any name into main, as a client that checks none could."""
        with self._lock:
            repo = self._repositories["model", repo_id]
            head = repo.at("main")
            repo.commit("main", head, "Plant a file", "", {**head.files, path: File(content)})

    def branches(self, repo_id: str, repo_type: str = "model") -> dict[str, str]:
        """The branches' names and their newest commits; without those of pull requests."""
        with self._lock:
            refs = self._repositories[repo_type, repo_id].refs
            return {name: commit.oid for name, commit in refs.items() if not name.startswith("refs/")}

    @property
    def requests(self) -> list[Request]:
        with self._lock:
            return list(self._requests)

    def fail(self, number: int, kind: str, times: int | None = 1) -> None:
        """Answer the `number`-th request from now, counted from 0, wrongly.

        So are the next `times` - 1 requests with its method and path, or all of them with times=None. One fault meets
        a request: where two are due, the second waits for the next. Kinds:

        - "500", "503", "429", "expired": an error, for expired 401. The request had no effect.
        - "drop": the connection ends without an answer. The request had no effect.
        - "drop_after": the same, but the request had its effect.
        - "truncate": the request had its effect, but half of the answer's body is missing; without a body "drop_after".
        - "checksum": an upload arrives with one byte changed, and its verification fails; a download has one byte
          changed, its HEAD another ETag; other requests have their effect, but the answer is no JSON.
        """
        if kind not in FAULTS:
            raise ValueError(f"kind={kind!r} is no fault: use one of {', '.join(FAULTS)}")
        with self._lock:
            self._faults.append(Fault(len(self._requests) + number, kind, times))

    def clear(self) -> None:
        """Forget the faults that have not been met."""
        with self._lock:
            self._faults.clear()

    def _fault(self, request: Request) -> str | None:
        number = len(self._requests)
        self._requests.append(request)
        target = (request.method, request.path)
        for fault in self._faults:
            if fault.times != 0 and (fault.target == target or (fault.target is None and fault.number <= number)):
                fault.target = target
                fault.times = None if fault.times is None else fault.times - 1
                self.faults_met += 1
                return fault.kind
        return None

    def _respond(self, request: Request, authorization: str | None) -> Answer | None:
        """The answer; None where the connection is to end without one."""
        with self._lock:  # of one request after the other: nobody sees half of a commit
            fault = self._fault(request)
            upload, download = request.method == "PUT", "/resolve/" in request.path
            try:
                if fault == "drop":
                    return None
                if fault in ("500", "503"):
                    raise Refused(int(fault), "Internal Error - We're working hard to fix this as soon as possible!")
                if fault == "429":
                    limits = {"RateLimit": f'"api";r=0;t={self.retry_after}', "Retry-After": str(self.retry_after)}
                    limits["RateLimit-Policy"] = '"fixed window";"api";q=1000;w=300'
                    raise Refused(429, "Too many requests", headers=limits)
                if fault == "expired":
                    raise Refused(401, INVALID_TOKEN)
                if fault == "checksum" and upload:
                    request = replace(request, body=damaged(request.body))
                answer = self._answer(request, authorization)
            except Refused as refused:
                answer = refused.answer
            except Exception as error:  # no status that the client would repeat the request for
                answer = Refused(501, f"The Hub for tests failed: {error!r}").answer
        has_body = bool(answer.body) and request.method != "HEAD"
        if fault == "drop_after" or (fault == "truncate" and not has_body):
            return None
        if fault == "truncate":
            return replace(answer, cut=True)
        if fault == "checksum" and download and request.method == "HEAD":
            changed = {name: '"' + "0" * 40 + '"' for name in answer.headers if name.endswith("ETag")}
            return replace(answer, headers={**answer.headers, **changed})
        if fault == "checksum" and not upload:
            return replace(answer, body=damaged(answer.body) if download else b'{"garbage')
        return answer

    def _answer(self, request: Request, authorization: str | None) -> Answer:
        method = "GET" if request.method == "HEAD" else request.method
        for route_method, pattern, access, function in _ROUTES:
            if route_method == method and (match := pattern.fullmatch(request.path)):
                groups = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                valid = authorization in (None, f"Bearer {self.token}") and not (authorization and self._expired)
                if not valid and access != "signed":
                    raise Refused(401, INVALID_TOKEN)
                if "id" in groups:
                    kind = groups.pop("kind", "models").removesuffix("s")
                    groups["repo"] = self._repository(kind, groups.pop("id"), authorization is not None, access)
                if access == "write" and authorization is None:
                    raise Refused(401, "Invalid username or password.")
                return function(self, request, **groups)
        raise Refused(501, f"The Hub for tests does not know {request.method} {request.path}")

    def _repository(self, kind: str, repo_id: str, known: bool, access: str = "read") -> Repository:
        repo = self._repositories.get((kind, repo_id))
        if repo is not None and (known or not repo.private or access == "signed"):
            return repo
        # As the Hub does: who is not logged in cannot tell a private repository from none.
        raise Refused(404 if known else 401, "Repository not found", "RepoNotFound")


class _Server(ThreadingHTTPServer):
    hub: Hub

    def __init__(self, *args: Any) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(*args)

    def process_request(self, request, client_address):
        self.connections.add(request)
        super().process_request(request, client_address)

    def handle_error(self, request, client_address):
        """A client that went away is no matter; nothing is printed."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        length = int(headers.get("content-length", 0))
        body = self.rfile.read(length)
        if len(body) < length:  # the client died in the middle of a request, which therefore was none
            self.close_connection = True
            return
        authorization = headers.pop("authorization", None)
        path, _, query = self.path.partition("?")
        request = Request(self.command, path, dict(parse_qsl(query)), headers, body)
        answer = self.server.hub._respond(request, authorization)
        if answer is None:
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: len(answer.body) // 2] if answer.cut else answer.body)
        self.close_connection |= answer.cut

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, *args: Any) -> None:
        pass


# Method, pattern of the path, access, function. Access is "read"; "write", for the user only; or "signed", for whoever
# has the address, as with S3.
_ROUTES: list[tuple[str, re.Pattern[str], str, Callable[..., Answer]]] = []
_API = r"/api/(?P<kind>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)"
_WEB = r"/(?:(?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)"
_REVISION = r"/(?P<revision>[^/]+)"


def _route(method: str, pattern: str, access: str = "read"):
    def add(function: Callable[..., Answer]) -> Callable[..., Answer]:
        _ROUTES.append((method, re.compile(pattern), access, function))
        return function

    return add


@_route("GET", "/api/whoami-v2", "write")
def whoami(hub, request):
    organizations = [{"type": "org", "name": hub.organization, "fullname": hub.organization, "roleInOrg": "admin"}]
    auth = {"type": "access_token", "accessToken": {"displayName": "tests", "role": "write"}}
    return json_answer({"type": "user", "name": hub.user, "fullname": hub.user, "orgs": organizations, "auth": auth})


@_route("POST", "/api/validate-yaml")
def validate_yaml(hub, request):
    if problem := _problem_of_card(json.loads(request.body)["content"]):
        return json_answer({"errors": [{"message": problem}], "warnings": []}, 400)
    return json_answer({"errors": [], "warnings": []})


def _problem_of_card(text: str) -> str | None:
    header = re.match(r"---\s*\n(.*?)(?:^---\s*$|\Z)", text, re.DOTALL | re.MULTILINE)
    try:
        metadata = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError as error:
        return f"Invalid YAML: {error}"
    return None if metadata is None or isinstance(metadata, dict) else "metadata must be a mapping of names to values"


@_route("POST", "/api/repos/create", "write")
def create(hub, request):
    asked = json.loads(request.body)
    kind, owner = asked.get("type") or "model", asked.get("organization") or hub.user
    if owner not in (hub.user, hub.organization):
        raise Refused(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
    private = asked.get("visibility") == "private" or asked.get("private") is True
    repo = Repository(kind, f"{owner}/{asked['name']}", private)
    url = f"{hub.endpoint}/{repo.name}"
    if (kind, repo.id) in hub._repositories:
        raise Refused(409, f"You already created this {kind} repo", url=url)
    hub._repositories[kind, repo.id] = repo
    repo.commit("main", None, "initial commit", "", {".gitattributes": File(GIT_ATTRIBUTES)})
    return json_answer({"url": url, "name": repo.id})


@_route("DELETE", "/api/repos/delete", "write")
def delete(hub, request):
    asked = json.loads(request.body)
    kind, repo_id = asked.get("type") or "model", f"{asked.get('organization') or hub.user}/{asked['name']}"
    del hub._repositories[kind, hub._repository(kind, repo_id, known=True).id]
    return Answer()


@_route("GET", rf"{_API}(?:/revision{_REVISION})?")
def info(hub, request, repo, revision="main"):
    commit = repo.at(revision)
    siblings = []
    for path, file in sorted(commit.files.items()):
        entry = {"rfilename": path}
        if "blobs" in request.query:
            entry |= {"size": len(file.content), "blobId": file.oid, **file.lfs}
        siblings.append(entry)
    found = {"id": repo.id, "author": repo.id.split("/")[0], "sha": commit.oid, "siblings": siblings}
    rest = {"private": repo.private, "gated": False, "tags": [], "createdAt": DATE, "lastModified": DATE}
    return json_answer({**found, **rest})


def _entry(commit: Commit, path: str) -> dict[str, Any] | None:
    """A file or folder as lists have it; None where there is neither."""
    if file := commit.files.get(path):
        return {"type": "file", "path": path, "size": len(file.content), "oid": file.oid, **file.lfs}
    if any(name.startswith(f"{path}/") for name in commit.files):
        return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
    return None


@_route("GET", rf"{_API}/tree{_REVISION}(?:/(?P<path>.+))?")
def tree(hub, request, repo, revision, path=""):
    commit = repo.at(revision)
    prefix = f"{path}/" if path else ""
    if path and (_entry(commit, path) or {}).get("type") != "directory":
        raise Refused(404, f"{path} does not exist on {revision}", "EntryNotFound")
    names = set()
    for name in commit.files:
        if name.startswith(prefix):
            parts = name.removeprefix(prefix).split("/")
            depth = len(parts) if request.query.get("recursive", "").lower() == "true" else 1
            names |= {prefix + "/".join(parts[: i + 1]) for i in range(depth)}
    return json_answer([_entry(commit, name) for name in sorted(names)])


@_route("POST", rf"{_API}/paths-info{_REVISION}")
def paths_info(hub, request, repo, revision):
    commit = repo.at(revision)
    entries = [_entry(commit, path) for path in parse_qs(request.body.decode()).get("paths", [])]
    return json_answer([entry for entry in entries if entry])


@_route("GET", rf"{_API}/refs")
def refs(hub, request, repo):
    listed = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    for name, commit in repo.refs.items():
        is_request = name.startswith("refs/")
        item = {"name": name, "ref": name if is_request else f"refs/heads/{name}", "targetCommit": commit.oid}
        listed["pullRequests" if is_request else "branches"].append(item)
    return json_answer(listed)


@_route("GET", rf"{_API}/commits{_REVISION}")
def commits(hub, request, repo, revision):
    found, rest = hub.commits(repo.id, revision, repo.type), {"authors": [{"user": hub.user}], "date": DATE}
    return json_answer([{"id": c.oid, "title": c.title, "message": c.description, **rest} for c in found])


@_route("POST", rf"{_API}/branch/(?P<branch>[^/]+)", "write")
def create_branch(hub, request, repo, branch):
    start = repo.at(json.loads(request.body or b"{}").get("startingPoint") or "main")
    if branch in repo.refs:
        raise Refused(409, "Reference already exists")
    repo.refs[branch] = start
    return Answer()


@_route("DELETE", rf"{_API}/branch/(?P<branch>[^/]+)", "write")
def delete_branch(hub, request, repo, branch):
    if branch == "main":
        raise Refused(403, "The main branch cannot be deleted")
    repo.at(branch)
    del repo.refs[branch]
    return Answer()


@_route("POST", rf"{_API}/preupload{_REVISION}", "write")
def preupload(hub, request, repo, revision):
    files = repo.at(revision).files
    modes = []
    for asked in json.loads(request.body)["files"]:
        path = asked["path"]
        lfs = asked["size"] >= LFS_SIZE or path.endswith(LFS_SUFFIXES)
        modes.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False})
        if path in files:
            modes[-1]["oid"] = files[path].etag
    return json_answer({"files": modes})


@_route("POST", rf"{_WEB}\.git/info/lfs/objects/batch", "write")
def lfs_batch(hub, request, repo):
    objects = []
    for asked in json.loads(request.body)["objects"]:
        answer = {"oid": asked["oid"], "size": asked["size"]}
        if len(repo.lfs.get(asked["oid"], b"")) != asked["size"]:
            address = f"{hub.endpoint}/{repo.name}"
            upload = {"href": f"{address}/lfs-storage/{asked['oid']}", "header": {}}
            verify = {"href": f"{address}.git/info/lfs/objects/verify", "header": {}}
            answer["actions"] = {"upload": upload, "verify": verify}
        objects.append(answer)
    return json_answer({"transfer": "basic", "objects": objects})


@_route("PUT", rf"{_WEB}/lfs-storage/(?P<oid>[0-9a-f]{{64}})", "signed")
def lfs_upload(hub, request, repo, oid):
    repo.lfs[oid] = request.body
    return Answer()


@_route("POST", rf"{_WEB}\.git/info/lfs/objects/verify", "write")
def lfs_verify(hub, request, repo):
    asked = json.loads(request.body)
    content = repo.lfs.get(asked["oid"], b"")
    if len(content) != asked["size"]:
        raise Refused(404, "The uploaded object is missing, or has another size")
    if hashlib.sha256(content).hexdigest() != asked["oid"]:
        del repo.lfs[asked["oid"]]
        raise Refused(422, "The uploaded object has another checksum")
    return json_answer({})


@_route("POST", rf"{_API}/commit{_REVISION}", "write")
def commit(hub, request, repo, revision):
    head = repo.at(revision)
    ref = revision.removeprefix("refs/heads/")
    if ref not in repo.refs:
        raise Refused(404, f"Not a branch: {revision}", "RevisionNotFound")
    files = dict(head.files)
    header: dict[str, str] = {}
    for line in request.body.splitlines():
        item = json.loads(line)
        key, value = item["key"], item["value"]
        path = value.get("path", "").rstrip("/")
        if key == "header":
            header = value
            if not head.oid.startswith(value.get("parentCommit", "")):
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
        elif key == "file":
            files[path] = File(base64.b64decode(value["content"]))
            if path == "README.md" and (problem := _problem_of_card(files[path].content.decode(errors="replace"))):
                raise Refused(400, problem)
        elif key == "lfsFile":
            if value["oid"] not in repo.lfs:
                raise Refused(400, f"The LFS pointer of {path} points to a file that does not exist")
            files[path] = File(repo.lfs[value["oid"]], value["oid"])
        elif key in ("deletedFile", "deletedFolder"):
            entry = _entry(replace(head, files=files), path)
            if (entry or {}).get("type") != ("file" if key == "deletedFile" else "directory"):
                raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            files = {n: f for n, f in files.items() if n != path and not n.startswith(f"{path}/")}
        else:
            raise Refused(400, f"Unknown operation {key}")
    answer: dict[str, Any] = {"success": True, "hookOutput": ""}
    if request.query.get("create_pr") == "1":
        number = repo.discuss(header["summary"], pull_request=True)
        ref = f"refs/pr/{number}"
        answer["pullRequestUrl"] = f"{hub.endpoint}/{repo.name}/discussions/{number}"
    oid = repo.commit(ref, head, header["summary"], header.get("description", ""), files).oid
    return json_answer({**answer, "commitOid": oid, "commitUrl": f"{hub.endpoint}/{repo.name}/commit/{oid}"})


@_route("GET", rf"{_API}/discussions")
def discussions(hub, request, repo):
    return json_answer({"discussions": repo.discussions, "count": len(repo.discussions), "start": 0})


@_route("POST", rf"{_API}/discussions", "write")
def create_discussion(hub, request, repo):
    asked = json.loads(request.body)
    number = repo.discuss(asked["title"], bool(asked.get("pullRequest")))
    if asked.get("pullRequest"):
        repo.refs[f"refs/pr/{number}"] = repo.at("main")
    return json_answer(repo.discussions[-1])


@_route("GET", rf"{_API}/discussions/(?P<number>\d+)")
def discussion(hub, request, repo, number):
    if not 0 < int(number) <= len(repo.discussions):
        raise Refused(404, f"No discussion {number}")
    return json_answer(repo.discussions[int(number) - 1])


@_route("GET", rf"{_WEB}/resolve{_REVISION}/(?P<path>.+)")
def resolve(hub, request, repo, revision, path):
    commit = repo.at(revision)
    headers = {"X-Repo-Commit": commit.oid}
    file = commit.files.get(path)
    if file is None:
        raise Refused(404, "Entry not found", "EntryNotFound", headers)
    size = len(file.content)
    headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    if file.sha256:
        headers |= {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(size)}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if not asked:
        return Answer(200, file.content, headers)
    start, stop = int(asked[1]), min(int(asked[2] or size) + 1, size)
    if start >= stop:
        raise Refused(416, "Range not satisfiable", headers={**headers, "Content-Range": f"bytes */{size}"})
    return Answer(206, file.content[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"})
