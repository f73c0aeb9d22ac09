"""A push: what it puts there, in one commit; and every fault at every request of it."""

import errno
import json
import os

import pytest
import torch
from example_runs import contents, made_up
from huggingface_hub import HfApi, snapshot_download
from server import FAULTS
from transformers import TrainingArguments

from agr_hf.hub import retry
from agr_hf.hub.push import push_finished, push_run, take_over_push
from agr_hf.hub.training_state import export_checkpoint

REPO = "tester/run"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(retry.time, "sleep", lambda seconds: None)


def test_a_push_is_one_commit_with_the_published_files_only(hub, tmp_path):
    run = made_up(tmp_path / "run")
    before = contents(run)
    url = push_run(run, REPO, api=hub.api())
    assert url.startswith(f"{hub.endpoint}/{REPO}/commit/")
    files = hub.files(REPO)
    assert set(files) - {".gitattributes"} == {
        "README.md", "curves.png", "results.json", "config.json", "model.safetensors", "samples/epoch-0001.png",
        ".eval_results/agr_hf.yaml",
    }  # fmt: skip
    for name in ("results.json", "config.json", "model.safetensors", "samples/epoch-0001.png"):
        assert files[name] == before[name]
    commits = hub.commits(REPO)
    assert len(commits) == 2  # the Hub's own first one, and ours
    assert commits[0].title == "Upload a run of agr_adamw (image-classification) with agr_hf"
    assert contents(run) == before


def test_a_second_push_replaces_what_the_first_one_put_there_and_nothing_else(hub, tmp_path):
    api = hub.api()
    push_run(made_up(tmp_path / "one"), REPO, api=api)
    old = (
        "model-00001-of-00002.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "vocab.txt",
    )
    for name in old:
        api.upload_file(path_or_fileobj=b"old", path_in_repo=name, repo_id=REPO)
    mine = (
        "LICENSE",
        "notes.txt",
        "requirements.txt",
        "labels.json",
        "ema.safetensors",
        "docs/picture.png",
        "banner.png",
    )
    for name in mine:
        api.upload_file(path_or_fileobj=b"mine", path_in_repo=name, repo_id=REPO)
    push_run(made_up(tmp_path / "two", 2.0), REPO, api=api)
    files = hub.files(REPO)
    assert "samples/epoch-0001.png" not in files
    assert "samples/epoch-0002.png" in files
    assert not files.keys() & set(old)
    assert all(files[name] == b"mine" for name in mine)
    assert json.loads(files["config.json"]) == {"value": 2.0}
    assert len(hub.commits(REPO)) == 3 + len(mine) + len(old)


def test_the_same_push_again_makes_no_commit(hub, tmp_path):
    run = made_up(tmp_path / "run")
    push_run(run, REPO, api=hub.api())
    commits = hub.commits(REPO)
    push_run(run, REPO, api=hub.api())
    assert [c.oid for c in hub.commits(REPO)] == [c.oid for c in commits]


def test_private_repositories_organisations_and_bare_names(hub, tmp_path):
    run = made_up(tmp_path / "run")
    push_run(run, "lab/run", private=True, api=hub.api())
    assert hub.api().repo_info("lab/run").private
    push_run(run, "bare", api=hub.api())
    assert b"agr-hf reproduce tester/bare" in hub.files("tester/bare")["README.md"]


def test_a_branch_is_made_and_main_stays(hub, tmp_path):
    push_run(made_up(tmp_path / "one"), REPO, api=hub.api())
    main = hub.files(REPO)
    push_run(made_up(tmp_path / "two", 2.0), REPO, revision="seed-2", api=hub.api())
    assert hub.files(REPO) == main
    assert json.loads(hub.files(REPO, "seed-2")["config.json"]) == {"value": 2.0}


def test_a_pull_request_leaves_main_as_it_is(hub, tmp_path):
    push_run(made_up(tmp_path / "one"), REPO, api=hub.api())
    main = hub.files(REPO)
    url = push_run(made_up(tmp_path / "two", 2.0), REPO, create_pr=True, api=hub.api())
    assert url.endswith("/discussions/1")
    assert hub.files(REPO) == main
    assert json.loads(hub.files(REPO, "refs/pr/1")["config.json"]) == {"value": 2.0}


def test_a_lost_answer_does_not_open_a_second_pull_request(hub, tmp_path):
    push_run(made_up(tmp_path / "one"), REPO, api=hub.api())
    run = made_up(tmp_path / "two", 2.0)
    commit = requests_of(hub, lambda: push_run(run, REPO, create_pr=True, message="first", api=hub.api())).index(
        "commit"
    )
    hub.fail(commit, "drop_after", times=1)
    url = push_run(run, REPO, create_pr=True, message="second", api=hub.api())
    assert url.endswith("/discussions/2")
    titles = [d.title for d in hub.api().get_repo_discussions(REPO, discussion_type="pull_request")]
    assert sorted(titles) == ["first", "second"]


def test_a_script_that_cannot_push_says_how_to_publish_its_run(hub, tmp_path, capsys):
    run = made_up(tmp_path / "my run")
    push_finished(run, REPO, api=hub.api())
    assert capsys.readouterr().out.startswith(f"published: {hub.endpoint}/{REPO}/commit/")
    with pytest.raises(SystemExit) as error:
        push_finished(run, "nobody/run", private=True, revision="seed-1", with_training_state=False, api=hub.api())
    assert "nobody/run was not pushed" in str(error.value)
    assert str(error.value).endswith(f"agr-hf push '{run}' --repo-id nobody/run --private --revision seed-1")


@pytest.mark.parametrize("raised", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_whatever_ends_a_push_the_run_is_said_to_be_whole(raised, hub, tmp_path, monkeypatch):
    def ends(*args, **kwargs):
        raise raised

    monkeypatch.setattr("agr_hf.hub.push.prepare", ends)
    with pytest.raises(SystemExit, match="(No space left|stopped)\n?.*The run is finished, and whole in"):
        push_finished(made_up(tmp_path / "run"), REPO, api=hub.api())


def requests_of(hub, push):
    """The requests that a push makes: the last part of their paths."""
    before = len(hub.requests)
    push()
    return [
        "commit" if "/commit/" in request.path else request.path.partition("?")[0].rsplit("/", 1)[-1]
        for request in hub.requests[before:]
    ]


@pytest.mark.parametrize("times", [1, None], ids=["once", "for_good"])
@pytest.mark.parametrize("kind", FAULTS)
def test_any_fault_at_any_request_leaves_the_old_revision_or_the_new_one(kind, times, hub, tmp_path, capsys):
    """Each request of a push fails in turn, once or ever after: the push ends well, or with a sentence; never a mixture."""
    one_epoch = [{"epoch": 1, "loss": 1.0}]  # no curves to draw, 300 times
    old_run = made_up(tmp_path / "old", epochs=one_epoch)
    new_run = made_up(tmp_path / "new", 2.0, epochs=one_epoch)
    push_run(old_run, "tester/clean", api=hub.api())
    count = len(requests_of(hub, lambda: push_run(new_run, "tester/clean", api=hub.api())))
    local = contents(new_run)
    completed = 0
    for number in range(count):
        repo = f"tester/case-{number}"
        push_run(old_run, repo, api=hub.api())
        old = hub.files(repo)
        hub.fail(number, kind, times=times)
        met = hub.faults_met
        try:
            push_run(new_run, repo, api=hub.api())
            done = True
        except ConnectionError as error:
            done = False
            assert str(error).startswith(f"{repo} was not pushed: ")
            assert hub.token not in str(error)
        assert hub.faults_met > met
        hub.clear()
        files = hub.files(repo)
        if done or files != old:
            assert json.loads(files["config.json"]) == {"value": 2.0}
            assert {n: files.get(n) for n in local if n in PUBLISHED} == {n: local[n] for n in local if n in PUBLISHED}
            assert "samples/epoch-0001.png" not in files
            assert f"reproduce {repo}".encode() in files["README.md"]
        assert contents(new_run) == local
        completed += done
        # What is wrong is over: the same push again completes.
        push_run(new_run, repo, api=hub.api())
        assert json.loads(hub.files(repo)["config.json"]) == {"value": 2.0}
        assert len(hub.commits(repo)) == 3
    with capsys.disabled():
        print(f"\n{kind}, {'once' if times else 'for good'}: {count} cases, {completed} completed, "
              f"{count - completed} ended with a sentence")  # fmt: skip
    if times == 1 and kind != "expired":
        assert completed == count


PUBLISHED = ("results.json", "config.json", "model.safetensors", "samples/epoch-0002.png")


def test_a_fault_of_this_machine_is_not_put_on_the_hub(hub, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub.api().__class__, "create_repo", full)
    with pytest.raises(ConnectionError, match="No space left on device") as error:
        push_run(made_up(tmp_path / "run"), REPO, api=hub.api())
    assert "the Hub failed" not in str(error.value)


def test_a_title_is_one_line_and_a_repository_has_a_name(hub, tmp_path):
    run = made_up(tmp_path / "run", optimizer="evil\n\nSigned-off-by: x")
    push_run(run, REPO, api=hub.api())
    assert hub.commits(REPO)[0].title == "Upload a run of evil Signed-off-by: x (image-classification) with agr_hf"
    for name in ("lab/x\n", "a/b/c", ""):
        with pytest.raises(ValueError, match="Repo id must"):
            push_run(run, name, api=hub.api())


def test_without_a_token_nothing_is_tried_again_and_no_training_begins(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ConnectionError, match="the token is missing, wrong or expired; log in with `hf auth login`"):
        push_run(made_up(tmp_path / "run"), "bare", api=HfApi(endpoint=hub.endpoint))
    assert not hub.requests
    args = TrainingArguments(str(tmp_path), push_to_hub=True, report_to="none")
    with pytest.raises(ValueError, match="push_to_hub needs a token of the Hub: log in with `hf auth login`"):
        take_over_push(args)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    args = TrainingArguments(str(tmp_path / "lr=1e-3"), push_to_hub=True, report_to="none")
    with pytest.raises(ValueError, match="Repo id must use alphanumeric chars"):
        take_over_push(args)
    args = TrainingArguments(str(tmp_path), push_to_hub=True, hub_revision="a" * 40, report_to="none")
    with pytest.raises(ValueError, match="is a commit; name a branch to push to"):
        take_over_push(args)
    args = TrainingArguments(str(tmp_path), push_to_hub=True, save_strategy="no", report_to="none")
    with pytest.raises(ValueError, match="publishes the last checkpoint, and save_strategy is no; set epoch or steps"):
        take_over_push(args, with_training_state=True)


def test_an_interrupted_upload_is_taken_up_again(hub, tmp_path):
    """Weights that reached the Hub before the fault are not sent a second time."""
    run = made_up(tmp_path / "run")
    requests = requests_of(hub, lambda: push_run(run, "tester/clean", api=hub.api()))
    other = made_up(tmp_path / "other", 2.0)
    hub.fail(requests.index("commit"), "500", times=None)
    with pytest.raises(ConnectionError, match="push again later"):
        push_run(other, REPO, api=hub.api())
    hub.clear()
    before = len(hub.requests)
    push_run(other, REPO, api=hub.api())
    assert not [request for request in hub.requests[before:] if request.method == "PUT"]


def test_what_a_token_may_not_do_is_said(hub, tmp_path):
    run = made_up(tmp_path / "run")
    hub.expire_token()
    with pytest.raises(ConnectionError, match="the token is missing, wrong or expired; log in with `hf auth login`"):
        push_run(run, REPO, api=hub.api())


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda run: (run / "results.json").unlink(), "results.json"),
        (lambda run: (run / "model.safetensors").unlink(), "has no model"),
        (lambda run: (run / "results.json").write_text("{"), "is no JSON"),
        (lambda run: (run / "config.json").write_text('{"half": '), "cut short"),
        (lambda run: (run / "model.safetensors").write_bytes(b""), "model.safetensors is cut short"),
        (lambda run: cut_in_half(run / "model.safetensors"), "model.safetensors is cut short"),
        (
            lambda run: (run / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model-1.safetensors"}}'
            ),
            "names model-1.safetensors, which is missing",
        ),
        (lambda run: (run / "model_index.json").write_text("{}"), "unet has no weights"),
        (lambda run: (run / os.fsdecode(b"\xff.json")).write_text("{}"), "'.udcff.json' is no name in UTF-8"),
        (lambda run: (run / "link.json").symlink_to("/etc/hostname"), "link.json is a link, which is not followed"),
        (lambda run: (run / f"hf_{'a' * 34}.json").write_text("{}"), "<secret>.json holds an access token"),
        (lambda run: (run / "config.json").write_text('{"x": "hf_' + "a" * 34 + '"}'), "holds an access token"),
        (lambda run: (run / "config.json").write_text(r'{"x": "\u0068f_' + "a" * 34 + '"}'), "holds an access token"),
    ],
)
def test_a_run_that_is_not_fit_to_publish_is_refused_before_anything_is_sent(spoil, sentence, hub, tmp_path):
    run = made_up(tmp_path / "run")
    spoil(run)
    with pytest.raises(ValueError, match=sentence):
        push_run(run, REPO, api=hub.api())
    assert not hub.requests


def test_secrets_of_the_environment_and_paths_of_the_machine_stay_here(hub, tmp_path, monkeypatch):
    run = made_up(tmp_path / "run")
    (run / "tokenizer_config.json").write_text(
        json.dumps({"name_or_path": str(tmp_path / "run"), "vocab": ["/", "/tmp"]})
    )
    push_run(run, REPO, api=hub.api())
    assert json.loads(hub.files(REPO)["tokenizer_config.json"]) == {"name_or_path": "run", "vocab": ["/", "/tmp"]}
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    (run / "vocab.txt").write_text("key 0123456789abcdef")
    with pytest.raises(ValueError, match=r"vocab.txt holds"):
        push_run(run, REPO, api=hub.api())


def test_a_report_beside_a_run_is_published_and_shown_in_its_card(hub, tmp_path):
    run = made_up(tmp_path / "run")
    (run / "report.html").write_text("<!doctype html>")
    (run / "differences.png").write_bytes((run / "samples" / "epoch-0001.png").read_bytes())
    (run / "other.html").write_text("<script>")
    push_run(run, REPO, api=hub.api())
    files = hub.files(REPO)
    assert files["report.html"] == b"<!doctype html>"
    assert b"](differences.png)" in files["README.md"]
    assert "other.html" not in files
    # A run without it takes it off again.
    (run / "report.html").unlink()
    push_run(run, REPO, api=hub.api())
    assert "report.html" not in hub.files(REPO)
    assert b"](differences.png)" not in hub.files(REPO)["README.md"]


def test_what_is_no_part_of_a_model_is_not_published(hub, tmp_path):
    run = made_up(tmp_path / "run")
    (run / "log.txt").write_text("saved to /srv/alice/runs")
    (run / ".env").write_text("x")
    checkpoint = run / "checkpoint-5"
    (checkpoint / "trainer_state.json").write_text("{}")
    export = tmp_path / "state"
    (checkpoint / "optimizer.pt").unlink()
    for name in (".env", "README.md", "evil.py", "events.out.tfevents.1.myhost", "scaler.pickle"):
        (checkpoint / name).write_text("x")
    (checkpoint / "link.json").symlink_to("/etc/hostname")
    export_checkpoint(checkpoint, export)
    assert {path.name for path in export.iterdir()} == {"trainer_state.json", "checkpoint.json"}
    push_run(run, REPO, api=hub.api())
    assert not {"log.txt", ".env"} & hub.files(REPO).keys()


def test_files_of_a_repository_that_held_no_run_stay(hub, tmp_path):
    api = hub.api()
    api.create_repo(REPO)
    mine = ("samples/mine.png", "scheduler/mine.json", "training_state/notes.json")
    for name in mine:
        api.upload_file(path_or_fileobj=b"mine", path_in_repo=name, repo_id=REPO)
    push_run(made_up(tmp_path / "run"), REPO, api=api)
    assert all(hub.files(REPO)[name] == b"mine" for name in mine)


def test_the_weights_load_on_the_other_side(hub, tmp_path):
    from safetensors.torch import load_file

    push_run(made_up(tmp_path / "run", 3.0), REPO, api=hub.api())
    folder = snapshot_download(REPO, endpoint=hub.endpoint, local_dir=tmp_path / "other")
    assert torch.equal(load_file(f"{folder}/model.safetensors")["weight"], torch.full((4, 3), 3.0))
