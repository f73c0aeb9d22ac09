"""The Hub for tests is one to the real client, and its faults are as it says."""

import hashlib
import http.client
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, constants
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import get_hf_file_metadata
from huggingface_hub.utils import _http
from server import FAULTS, LFS_SIZE, Hub, Repository

REPO = "tester/model"
CARD = b"---\nlicense: mit\n---\n# A model\n"
WEIGHTS = bytes(range(256)) * 40
LostConnection = getattr(_http, "httpx2", getattr(_http, "httpx", None)).RemoteProtocolError


@pytest.fixture
def api(hub):
    api = hub.api()
    api.create_repo(REPO)
    return api


@pytest.fixture
def folder(tmp_path):
    files = {
        "README.md": CARD,
        "config.json": b"{}",
        "model.safetensors": WEIGHTS,
        "logs/über uns.txt": b"x",
        "no": b"",
    }
    for name, content in files.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "folder"


def content(folder):
    files = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(".cache/")}


def pushed(hub, repo_id=REPO, **where):
    """Without what the Hub itself puts into a new repository."""
    return {name: data for name, data in hub.files(repo_id, **where).items() if name != ".gitattributes"}


def push(api, files, **options):
    operations = [CommitOperationAdd(name, data) for name, data in files.items()]
    return api.create_commit(options.pop("repo_id", REPO), operations, commit_message="push", **options)


def sent(hub, start=0):
    """The requests from number `start` on: their methods and the last two parts of their paths."""
    return [f"{r.method} {'/'.join(r.path.split('/')[-2:])}" for r in hub.requests[start:]]


def ask(hub, method, path, body=None, **headers):
    """One request without the real client: status, headers and body of the answer."""
    connection = http.client.HTTPConnection(hub.endpoint.removeprefix("http://"), timeout=10)
    connection.request(method, path, body, {"Authorization": f"Bearer {hub.token}", **headers})
    answer = connection.getresponse()
    try:
        return answer.status, dict(answer.headers), answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize("repo_type", ["model", "dataset", "space"])
def test_a_folder_comes_back_as_it_was_pushed(repo_type, hub, folder, tmp_path):
    (folder / "large.txt").write_bytes(b"1" * LFS_SIZE)
    api, at = hub.api(), {"repo_type": repo_type}
    api.create_repo(REPO, space_sdk="static" if repo_type == "space" else None, **at)
    pushed_commit = api.upload_folder(repo_id=REPO, folder_path=folder, commit_description="why", **at)
    assert pushed(hub, **at) == content(folder)
    newest = hub.commits(REPO, **at)[0]
    assert (newest.title, newest.description) == (pushed_commit.commit_message, "why")
    assert newest.oid == pushed_commit.oid == api.repo_info(REPO, **at).sha
    puts = {request.path.split("/")[-1] for request in hub.requests if request.method == "PUT"}
    assert puts == {hashlib.sha256(data).hexdigest() for data in (WEIGHTS, b"1" * LFS_SIZE)}

    snapshot = api.snapshot_download(REPO, cache_dir=tmp_path / "cache", **at)
    assert content(snapshot) == hub.files(REPO, **at)
    local = api.hf_hub_download(REPO, "logs/über uns.txt", local_dir=tmp_path / "local", **at)
    assert Path(local).read_bytes() == b"x"


def test_a_folder_is_pushed_by_upload_large_folder(hub, api, folder, monkeypatch):
    workers = pytest.importorskip("huggingface_hub._upload_large_folder", reason="huggingface_hub 2 has it no more")
    monkeypatch.setattr(workers, "WAITING_TIME_IF_NO_TASKS", 0.01)
    with pytest.warns(FutureWarning, match="DEPRECATED"):
        api.upload_large_folder(REPO, folder, repo_type="model", num_workers=2, print_report=False)
    assert pushed(hub) == content(folder)


def test_what_is_there_is_not_uploaded_again(hub, api, folder):
    api.upload_folder(repo_id=REPO, folder_path=folder)
    start, commits = len(hub.requests), len(hub.commits(REPO))
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert len(hub.commits(REPO)) == commits
    push(api, {"copy.safetensors": WEIGHTS})
    assert hub.files(REPO)["copy.safetensors"] == WEIGHTS
    assert not [line for line in sent(hub, start) if line.startswith("PUT")]


def test_lists_say_what_is_there(hub, api, folder):
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert set(api.list_repo_files(REPO)) == hub.files(REPO).keys()
    names = [(entry.path, hasattr(entry, "tree_id")) for entry in api.list_repo_tree(REPO)]
    assert ("logs", True) in names
    assert ("README.md", False) in names
    assert not [name for name, _ in names if name.startswith("logs/")]
    assert [entry.path for entry in api.list_repo_tree(REPO, "logs")] == ["logs/über uns.txt"]
    weights, card = api.get_paths_info(REPO, ["model.safetensors", "README.md", "missing"])
    assert weights.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert (weights.size, card.lfs) == (len(WEIGHTS), None)
    assert card.blob_id == hashlib.sha1(b"blob %d\0" % len(CARD) + CARD).hexdigest()
    for entry in api.repo_info(REPO, files_metadata=True).siblings:
        metadata = get_hf_file_metadata(f"{hub.endpoint}/{REPO}/resolve/main/{entry.rfilename}")
        assert metadata.etag == (entry.lfs.sha256 if entry.lfs else entry.blob_id)
        assert metadata.size == entry.size
        assert metadata.commit_hash == hub.commits(REPO)[0].oid
    assert api.file_exists(REPO, "model.safetensors")
    assert not api.file_exists(REPO, "model.bin")


def test_files_and_folders_are_deleted(hub, api):
    push(api, {"a": b"a", "logs/b": b"b", "logs/deep/c": b"c", "logs.txt": b"d"})
    api.delete_file("a", REPO)
    assert pushed(hub).keys() == {"logs/b", "logs/deep/c", "logs.txt"}
    api.delete_folder("logs", REPO)
    assert pushed(hub).keys() == {"logs.txt"}
    assert [commit.title for commit in api.list_repo_commits(REPO)] == [c.title for c in hub.commits(REPO)]
    with pytest.raises(EntryNotFoundError, match="doesn't exist"):
        api.delete_file("a", REPO)


def test_repositories_are_created_once_for_the_user_and_the_organization(hub, api):
    assert api.whoami()["name"] == hub.user
    assert [organization["name"] for organization in api.whoami()["orgs"]] == ["lab"]
    assert api.create_repo("model", exist_ok=True).repo_id == REPO
    assert api.create_repo("lab/model", repo_type="dataset").repo_id == "lab/model"
    with pytest.raises(HfHubHTTPError, match="You already created this model repo") as refused:
        api.create_repo(REPO)
    assert refused.value.response.status_code == 409
    with pytest.raises(HfHubHTTPError, match="rights") as refused:
        api.create_repo("others/model")
    assert refused.value.response.status_code == 403
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO)


def test_a_private_repository_is_there_for_its_user_only(hub, api, tmp_path):
    api.create_repo("lab/secret", private=True)
    push(api, {"a": b"a"}, repo_id="lab/secret")
    assert api.repo_info("lab/secret").private
    assert not api.repo_info(REPO).private
    assert Path(api.hf_hub_download("lab/secret", "a", cache_dir=tmp_path)).read_bytes() == b"a"
    for repo_id in ("lab/secret", "lab/none"):
        with pytest.raises(RepositoryNotFoundError) as refused:
            api.repo_info(repo_id, token=False)
        assert refused.value.response.status_code == 401
    assert api.repo_info(REPO, token=False).sha


def test_who_has_no_valid_token_cannot_write(hub, api):
    before = hub.commits(REPO)
    for token in (False, "hf_wrong"):
        with pytest.raises(HfHubHTTPError) as refused:
            push(api, {"a": b"a"}, token=token)
        assert refused.value.response.status_code == 401
    hub.expire_token()
    for call in (
        api.whoami,
        lambda: push(api, {"a": b"a"}),
        lambda: api.repo_info(REPO),
        lambda: api.create_branch(REPO, branch="b"),
    ):
        with pytest.raises(HfHubHTTPError) as refused:
            call()
        assert refused.value.response.headers["X-Error-Message"] == "Invalid credentials in Authorization header"
    assert hub.commits(REPO) == before
    assert hub.branches(REPO).keys() == {"main"}
    assert not [request for request in hub.requests if "authorization" in request.headers]


def test_what_is_missing_is_told_apart(hub, api, tmp_path):
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info("tester/none")
    with pytest.raises(RevisionNotFoundError):
        api.repo_info(REPO, revision="none")
    with pytest.raises(RevisionNotFoundError):
        push(api, {"a": b"a"}, revision="none")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(REPO, "none", cache_dir=tmp_path)
    with pytest.raises(HfHubHTTPError, match="does not know GET /api/trending"):
        _http.hf_raise_for_status(_http.get_session().get(f"{hub.endpoint}/api/trending"))


def test_branches_go_their_own_ways(hub, api):
    first = push(api, {"a": b"main"}).oid
    api.create_branch(REPO, branch="run/1")
    api.create_branch(REPO, branch="old", revision=hub.commits(REPO)[-1].oid)
    api.create_branch(REPO, branch="run/1", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.create_branch(REPO, branch="run/1")
    second = push(api, {"a": b"branch"}, revision="run/1").oid
    assert hub.branches(REPO) == {"main": first, "run/1": second, "old": hub.commits(REPO)[-1].oid}
    assert {ref.name: ref.target_commit for ref in api.list_repo_refs(REPO).branches} == hub.branches(REPO)
    assert pushed(hub) == {"a": b"main"}
    assert pushed(hub, revision="run/1") == {"a": b"branch"}
    assert pushed(hub, revision=first) == {"a": b"main"}
    api.delete_branch(REPO, branch="run/1")
    assert not api.revision_exists(REPO, "run/1")


def test_a_pull_request_leaves_main_alone(hub, api):
    main = hub.commits(REPO)[0].oid
    one = push(api, {"a": b"a"}, create_pr=True)
    two = api.create_pull_request(REPO, title="two", description="d")
    push(api, {"b": b"b"}, revision=two.git_reference)
    assert (one.pr_revision, two.git_reference) == ("refs/pr/1", "refs/pr/2")
    assert pushed(hub, revision="refs/pr/1") == {"a": b"a"}
    assert pushed(hub, revision="refs/pr/2") == {"b": b"b"}
    assert hub.branches(REPO) == {"main": main}
    found = api.get_discussion_details(REPO, 1)
    assert (found.title, found.is_pull_request, found.git_reference) == ("push", True, "refs/pr/1")
    assert [discussion.num for discussion in api.get_repo_discussions(REPO)] == [1, 2]
    assert [ref.ref for ref in api.list_repo_refs(REPO, include_pull_requests=True).pull_requests] == [
        "refs/pr/1",
        "refs/pr/2",
    ]


def test_a_commit_on_an_old_parent_is_refused(hub, api):
    parent = hub.commits(REPO)[0].oid
    push(api, {"a": b"a"}, parent_commit=parent)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as refused:
        push(api, {"b": b"b"}, parent_commit=parent)
    assert refused.value.response.status_code == 412
    assert pushed(hub) == {"a": b"a"}


def test_a_commit_is_whole_or_not_at_all(hub, api):
    before = hub.commits(REPO)
    lost = CommitOperationAdd("model.safetensors", WEIGHTS)
    lost._upload_mode, lost._is_uploaded, lost._should_ignore = (
        "lfs",
        True,
        False,
    )  # as the client has it after an upload
    for last in (lost, CommitOperationDelete("none")):
        operations = [CommitOperationAdd("a", b"a"), CommitOperationDelete(".gitattributes"), last]
        with pytest.raises(BadRequestError if last is lost else EntryNotFoundError):
            api.create_commit(REPO, operations, commit_message="push")
        assert hub.commits(REPO) == before
        assert hub.files(REPO).keys() == {".gitattributes"}


@pytest.mark.parametrize("card", [b"---\ntags: [a\n---\n", b"---\n- a\n---\n", b"---\na: b: c\n---\n"])
def test_a_broken_card_is_refused(card, hub, api):
    with pytest.raises(ValueError, match=r"Invalid metadata in README.md"):
        push(api, {"README.md": card, "a": b"a"})
    assert pushed(hub) == {}
    push(api, {"README.md": b"# No metadata\n"})


def test_a_part_of_a_file_can_be_had(hub, api):
    push(api, {"a": b"0123456789"})
    path = f"/{REPO}/resolve/main/a"
    for asked, status, part in [("4-", 206, b"456789"), ("2-4", 206, b"234"), ("8-99", 206, b"89"), ("10-", 416, None)]:
        found, headers, body = ask(hub, "GET", path, Range=f"bytes={asked}")
        assert found == status
        assert part is None or (body == part and headers["Content-Range"].endswith("/10"))


# Faults


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_as_it_says_and_only_some_have_an_effect(kind, hub, api):
    hub.retry_after = 1
    hub.fail(1, kind)
    assert ask(hub, "GET", "/api/whoami-v2")[0] == 200
    effect = kind in ("drop_after", "truncate", "checksum")
    create = ("POST", "/api/repos/create", '{"name": "b"}')
    if kind in ("drop", "drop_after"):
        with pytest.raises(http.client.RemoteDisconnected):
            ask(hub, *create)
    elif kind == "truncate":
        with pytest.raises(http.client.IncompleteRead):
            ask(hub, *create)
    else:
        status, headers, body = ask(hub, *create)
        assert status == {"checksum": 200, "expired": 401}.get(kind) or status == int(kind)
        assert kind != "checksum" or body == b'{"garbage'
        assert kind != "429" or (headers["Retry-After"], headers["RateLimit"]) == ("1", '"api";r=0;t=1')
    assert hub.faults_met == 1
    assert ask(hub, *create)[0] == (409 if effect else 200)


def test_a_fault_stays_with_its_request(hub, api):
    hub.fail(1, "500", times=2)
    hub.fail(1, "503")
    hub.fail(9, "drop")
    answers = [ask(hub, "GET", f"/api/{path}")[0] for path in ["models/tester/model", *["whoami-v2"] * 2]]
    answers += [ask(hub, method, "/api/whoami-v2")[0] for method in ("POST", "GET", "GET", "GET")]
    assert answers == [200, 500, 500, 503, 200, 200, 200]


def test_a_fault_without_end_ends_when_it_is_cleared(hub, api):
    hub.fail(0, "503", times=None)
    assert [ask(hub, "GET", "/api/whoami-v2")[0] for _ in range(9)] == [503] * 9
    assert ask(hub, "GET", f"/api/models/{REPO}")[0] == 200
    hub.clear()
    assert ask(hub, "GET", "/api/whoami-v2")[0] == 200
    assert hub.faults_met == 9
    with pytest.raises(ValueError, match="kind='505' is no fault"):
        hub.fail(0, "505")


STEPS = ["validate-yaml", "preupload", "batch", "lfs-storage", "verify", "commit"]


@pytest.mark.parametrize("kind", FAULTS)
def test_a_push_under_a_fault_is_whole_or_not_at_all_and_can_be_repeated(kind, hub):
    api, files = hub.api(), {"README.md": CARD, "model.safetensors": WEIGHTS}
    for number, step in enumerate(STEPS):
        repo_id = f"tester/at-{step}"
        api.create_repo(repo_id)
        start = len(hub.requests)
        hub.fail(number, kind)
        failed = False
        try:
            push(api, files, repo_id=repo_id)
        except (HfHubHTTPError, LostConnection, ValueError, RuntimeError):
            failed = True
        assert step in hub.requests[start + number].path
        found = pushed(hub, repo_id)
        had_effect = step == "commit" and kind in ("drop_after", "truncate", "checksum")
        assert found == ({} if failed and not had_effect else files)
        push(api, files, repo_id=repo_id)
        assert pushed(hub, repo_id) == files
        assert [commit.title for commit in hub.commits(repo_id)] == ["push", "initial commit"]
    assert hub.faults_met == len(STEPS)


def test_the_client_waits_as_long_as_a_429_says(hub, api, waits):
    hub.retry_after = 3
    hub.fail(0, "429", times=2)
    push(api, {"a": b"a"})
    assert waits == [4, 4]
    assert sent(hub, 1) == [*["POST preupload/main"] * 3, "POST commit/main"]


def test_a_cut_download_is_resumed(hub, api, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # less than one chunk the client forgets
    push(api, {"model.safetensors": WEIGHTS})
    hub.fail(1, "truncate")
    assert Path(api.hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path)).read_bytes() == WEIGHTS
    assert hub.requests[-1].headers["range"] == f"bytes={len(WEIGHTS) // 2}-"
    hub.fail(0, "truncate")
    with pytest.raises(http.client.RemoteDisconnected):  # an answer without a body has nothing to cut
        ask(hub, "HEAD", f"/{REPO}/resolve/main/model.safetensors")
    assert hub.faults_met == 2


def test_a_damaged_download_has_another_byte_or_etag(hub, api, tmp_path):
    push(api, {"model.safetensors": WEIGHTS})
    hub.fail(1, "checksum")
    found = Path(api.hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path)).read_bytes()
    assert sum(a != b for a, b in zip(found, WEIGHTS, strict=True)) == 1
    hub.fail(0, "checksum")
    url = f"{hub.endpoint}/{REPO}/resolve/main/model.safetensors"
    assert get_hf_file_metadata(url).etag != get_hf_file_metadata(url).etag == hashlib.sha256(WEIGHTS).hexdigest()


def test_a_client_that_dies_in_a_request_made_none(hub, api):
    before = hub.requests
    connection = http.client.HTTPConnection(hub.endpoint.removeprefix("http://"))
    connection.putrequest("PUT", f"/{REPO}/lfs-storage/{'0' * 64}")
    connection.putheader("Content-Length", "100")
    connection.endheaders(b"half")
    connection.close()
    assert ask(hub, "GET", "/api/whoami-v2")[0] == 200
    assert len(hub.requests) == len(before) + 1


def test_of_commits_on_the_same_parent_one_wins(hub, api, monkeypatch):
    at = Repository.at  # slow, so that all requests are inside the Hub at once
    monkeypatch.setattr(Repository, "at", lambda repo, revision: (at(repo, revision), time.sleep(0.01))[0])
    parent = hub.commits(REPO)[0].oid
    outcomes = []

    def run(name):
        try:
            outcomes.append(push(api, {name: b"1"}, parent_commit=parent).oid)
        except HfHubHTTPError as error:
            outcomes.append(error.response.status_code)

    threads = [threading.Thread(target=run, args=(f"{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(412) == 7
    assert [commit.oid for commit in hub.commits(REPO)][1:] == [parent]
    assert hub.commits(REPO)[0].oid in outcomes
    assert len(hub.requests) == 1 + 2 * 8


def test_the_hub_stops_at_once_and_prints_nothing(capfd):
    with Hub() as hub:
        address = hub.endpoint.removeprefix("http://")
        dropped, kept = (http.client.HTTPConnection(address, timeout=10) for _ in range(2))
        hub.fail(0, "drop")
        dropped.request("GET", "/api/whoami-v2")
        with pytest.raises(http.client.RemoteDisconnected):
            dropped.getresponse()
        kept.request("GET", "/api/none")
        assert kept.getresponse().read()
        start = time.monotonic()
    assert time.monotonic() - start < 1
    assert kept.sock.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        http.client.HTTPConnection(address, timeout=10).request("GET", "/")
    assert capfd.readouterr() == ("", "")


# Both libraries, like the client, read their settings when they are imported.
JOB = """
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from transformers import BertConfig, BertModel

torch.set_num_threads(1)
torch.manual_seed(0)


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 16}
model = BertModel(BertConfig(**sizes)).eval()
model.push_to_hub("bert", private=True)
assert same(model, BertModel.from_pretrained("tester/bert"))

blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
unet = UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=4, **blocks)
DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=7)).push_to_hub("lab/ddpm")
pipeline = DDPMPipeline.from_pretrained("lab/ddpm")
assert same(unet, pipeline.unet)
assert pipeline.scheduler.config.num_train_timesteps == 7
print("as it was")
"""


def test_transformers_and_diffusers_push_to_it_and_load_from_it(hub, tmp_path):
    environment = {**os.environ, **hub.environment(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", JOB], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "as it was\n"
    assert hub.files("tester/bert").keys() >= {"config.json", "model.safetensors", "README.md"}
    assert hub.files("lab/ddpm").keys() >= {"model_index.json", "unet/diffusion_pytorch_model.safetensors"}
    assert all(request.method != "PUT" or request.body for request in hub.requests)
    assert (tmp_path / "hub" / "models--tester--bert").is_dir()
