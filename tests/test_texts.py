"""What may be published of a text, and how a text of others is shown."""

import json

import pytest

from agr_hf.tasks.runs import plain
from agr_hf.texts import markdown, one_line, public, secret_in

PATHS = {
    "/srv/alice/runs/lr=1e-3": "lr=1e-3",
    "/srv/alice/runs/": "runs",
    "//srv/alice/x": "x",
    "/srv/alice smith/my runs/z": "z",
    "~/x": "x",
    "~alice/x": "x",
    "../alice/x": "x",
    "..": "",
    "/": "",
    "data/../../alice/x": "x",
    " /srv/alice/x": " x",
    "--train_file=/srv/alice/date=2024-01-01/x.parquet": "--train_file=x.parquet",
    "resnet20:/srv/alice/w.th": "resnet20:w.th",
    "a=b=/srv/alice/x": "a=b=x",
    "file:///srv/alice/x": "x",
    '{"p": "/srv/alice/x"}': '{"p": "x"}',
    "C:\\Users\\alice\\x": "x",
    "D:/alice/x": "x",
    "///srv/alice/x": "x",
    "/+tmp/alice/x": "x",
    "/(alice)/y": "y",
    "FILE:///srv/alice/x": "x",
    "\\Users\\alice\\x": "x",
    "\\\\?\\C:\\alice\\x": "x",
    "see `/srv/alice/x`": "see `x`",
    "\\\\server\\alice\\x": "x",
}
NO_PATHS = [
    "uoft-cs/cifar10", "https://huggingface.co/a/b", "s3://bucket/x", "image/png", "3 s / step", "and/or", "+/-", "runs/x",
    "layer.0/conv", "...", "x..y", "~5 minutes", "torch==2.9", "NVIDIA H100 80GB HBM3", "12:30",
    "my data (v2)/t.parquet", "C++/x", "{a,b}/x", "données!/x", "[1]/x", '{"a": 1}', "a=1,b=2", "timm/vit_tiny.augreg_in21k",
]  # fmt: skip
TOKENS = [
    "hf_" + "a" * 34, "x_hf_" + "a" * 34, "hf_" + "a" * 34 + "_v2", "hf_jwt_eyJhbGciOi.J9eyJz-dWIi", "hf_oauth_" + "e" * 20,
    "api_org_" + "b" * 34,
]  # fmt: skip


@pytest.mark.parametrize("text", PATHS, ids=range(len(PATHS)))
def test_of_a_path_of_the_machine_the_last_part_is_published(text):
    assert public(text) == PATHS[text]
    assert plain({text: [text]}) == {PATHS[text]: [PATHS[text]]}


@pytest.mark.parametrize("text", NO_PATHS)
def test_what_only_looks_like_a_path_stays(text):
    assert public(text) == text


@pytest.mark.parametrize("token", TOKENS)
def test_tokens_are_seen_in_texts_and_files(token):
    assert token not in public(f"x {token} y")
    assert secret_in(b"\x00\xff" + token.encode() + b"\n") == "an access token"


def test_secrets_of_the_environment_are_seen_as_json_writes_them(monkeypatch):
    secret = 'pa"ss\\word-é1'
    monkeypatch.setenv("MY_PASSWORD", secret)
    assert public(f"x {secret}") == "x <secret>"
    for ascii_only in (True, False):
        found = secret_in(json.dumps({"x": secret}, ensure_ascii=ascii_only).encode())
        assert found == "the value of the environment's MY_PASSWORD"
    assert secret_in(b"model_hf_hub, agr_hf/experiments and other words") is None


def test_what_is_only_named_like_a_secret_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENIZERS_CACHE", "datasets")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))
    assert public("data/datasets/x") == "data/datasets/x"
    assert secret_in(str(tmp_path).encode()) is None


@pytest.mark.timeout(60)  # in time that grows with the square it would be hours
@pytest.mark.parametrize("part", ["!/", "(/", "a/", "../", "=/", "~/", "\\"])
def test_a_long_text_takes_no_time(part):
    public(part * 400_000)


def test_a_text_of_others_is_one_line_and_moves_no_cursor():
    assert one_line("a\x1b[2J\nb\u202ec\u2066") == "a [2J b c"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("weight_decay=2e-4", "weight_decay=2e-4"),
        ("_one_ __two__", "\\_one\\_ \\_\\_two\\_\\_"),
        ("a | b\n# c", "a \\| b \\# c"),
        ("<b>[x](y)*`~$", "&lt;b&gt;\\[x\\](y)\\*\\`\\~\\$"),
    ],
)
def test_a_text_of_others_is_no_markup_in_markdown(text, shown):
    assert markdown(text) == shown
