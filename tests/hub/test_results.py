"""results.json of a stranger: every place in it may hold anything, and only a run's passes."""

import json
import re

import pytest
import torch
from example_runs import made_up
from huggingface_hub.errors import StrictDataclassError

from agr_hf.errors import UserError
from agr_hf.experiments.leaderboard import collect, leaderboard
from agr_hf.hub.cards import draw_curves, evaluation_file, model_card
from agr_hf.tasks.record import RunRecord, argument_words, make_record, read_record

VALUES = [None, True, 3, -1, 0.5, "text", [], [1], {}, {"a": 1}, [{}], [[]], {"a": {}}, {"overall": 1}, "1e-3", [None]]


def places(value, path=()):
    """Every place of a nested value, as its keys."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from places(entry, (*path, key))


def with_value(value, path, new):
    """A copy with another value at a place."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = with_value(value[path[0]], path[1:], new)
    return copy


def test_any_value_at_any_place_is_refused_with_a_sentence_or_shown(tmp_path):
    run = made_up(tmp_path / "runs" / "run")
    results = json.loads((run / "results.json").read_text())
    refused = shown = 0
    for path in places(results):
        for value in VALUES:
            try:
                found = read_record(json.dumps(with_value(results, path, value)).encode())
            except ValueError as error:
                assert str(error).startswith("results.json"), (path, value)
                assert "\n" not in str(error)
                refused += 1
                continue
            if found.task == "image-classification":
                assert model_card(found, "tester/run").startswith("---\n")
                evaluation_file(found)
                assert leaderboard([found, read_record(run)])
                if path[:1] == ("epochs",) and path[1:2] != (1,):  # one row is as good as the other
                    draw_curves(found, tmp_path / "curves.png")
            shown += 1
    print(f"\n{refused} refused, {shown} shown")
    assert refused > 300
    assert shown > 300


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("NaN", "seconds is nan, which is no finite number"),
        ("-Infinity", "seconds is -inf, which is no finite number"),
        ("1e999", "seconds is inf, which is no finite number"),
        ("1" + "0" * 400, "seconds has more than 64 bits"),
        ("1" + "0" * 5000, "is no JSON"),
        ('1, "details": [{"a": ' + "[" * 50 + "]" * 50 + "}]", "nested too deeply"),
        ('"a\\ud800"', "Field 'seconds' with value 'a"),
        ('1, "commit": "a\\ud800"', "surrogates not allowed"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('"\udcff"', "codec can't decode"),
        ("", "is no JSON"),
    ],
    ids=range(11),
)
def test_what_is_no_value_of_a_run_is_said(text, message, tmp_path):
    run = made_up(tmp_path / "run")
    whole = (run / "results.json").read_text()
    spoiled = whole.replace('"seconds": 12.5', f'"seconds": {text}').encode("utf-8", errors="surrogateescape")
    (run / "results.json").write_bytes(spoiled)
    with pytest.raises(ValueError, match=message) as error:
        read_record(run)
    assert str(error.value).startswith(str(run / "results.json"))


def test_results_with_a_command_are_of_an_older_version_and_say_so(tmp_path):
    run = made_up(tmp_path / "run", command="python training_scripts/train_albert.py --seed 1")
    assert read_record(run).seed == 0  # beside the arguments it is one more entry, and means nothing
    results = json.loads((run / "results.json").read_text())
    del results["script"], results["arguments"]
    with pytest.raises(UserError, match="is of an older agr_hf, which kept a shell command .*; run that command again"):
        read_record(json.dumps(results).encode())
    for other in ([], 3, None, {"task": "ddpm"}):
        with pytest.raises(UserError, match="has no script, arguments"):
            read_record(json.dumps(other).encode())


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("seed",), True), (("seconds",), "1"), (("metrics", "accuracy"), [1]), (("arguments", "x"), {}),
        (("arguments", "x"), [[1]]), (("arguments", "x"), [None]), (("epochs", 0, "epoch"), None), (("epochs", 0), 1),
        (("dataset", "files"), ["a", 1]), (("dataset", "complete"), 1), (("gradients", "layers"), {"a": {"b": True}}),
        (("optimizer_groups", 0, "tensors"), 1.5), (("versions", "torch"), 2), (("config", "model_name"), 3),
        (("details",), [1]), (("config", "x"), 2**63), (("script",), ["train_albert.py"]),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused_and_named(place, value, tmp_path):
    results = json.loads((made_up(tmp_path / "run") / "results.json").read_text())
    results["arguments"]["x"] = results["config"]["x"] = 1
    results["dataset"]["files"], results["details"] = [], []
    assert read_record(json.dumps(results).encode()).arguments["x"] == 1
    with pytest.raises(UserError, match=f"{place[-1] if isinstance(place[-1], str) else place[0]}|Epoch") as error:
        read_record(json.dumps(with_value(results, place, value)).encode())
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_tables_name_may_be_of_any_length(tmp_path):
    results = json.loads((made_up(tmp_path / "run") / "results.json").read_text())
    with pytest.raises(UserError) as error:
        read_record(json.dumps({**results, "metrics": {"a\n" * 100_000: [1]}}).encode())
    assert len(str(error.value)) < 400


def test_what_is_written_is_checked_too(tmp_path):
    run = read_record(made_up(tmp_path / "run"))
    with pytest.raises(StrictDataclassError, match="seconds"):
        run.seconds = "1"
    with pytest.raises(StrictDataclassError, match="nan"):
        RunRecord(script="x.py", arguments={}, task="ddpm", optimizer="adal", config={}, epochs=[],
                  metrics={"loss": float("nan")})  # fmt: skip
    run.write(tmp_path)
    assert read_record(tmp_path) == run


def test_a_record_says_what_the_run_is_and_not_where_it_went(monkeypatch):
    monkeypatch.setenv("PLANTED_TOKEN", "sesame-sesame")
    given = {
        "learning_rate": 0.002, "train_file": "/srv/alice/train.parquet", "lr_milestones": [60, 120], "use_cpu": True,
        "output_dir": "/srv/alice/run", "hub_token": "x", "push_to_hub_token": "x", "push_to_hub": True,
        "note": "sesame-sesame",
        "hub_model_id": "me/x", "report_to": ["wandb"], "run_name": "n", "resume_from_checkpoint": "latest",
    }  # fmt: skip
    run = make_record(
        script="/srv/alice/train_albert.py", arguments=given, config=given, device=torch.device("cpu"), task="albert",
        optimizer="adal", epochs=[], metrics={"loss": float("inf")},
    )  # fmt: skip
    kept = {"learning_rate": 0.002, "train_file": "train.parquet", "lr_milestones": [60, 120], "use_cpu": True}
    assert run.arguments == run.config == {**kept, "note": "<secret>"}
    assert (run.script, run.metrics) == ("train_albert.py", {"loss": None})
    assert run.command == (
        "python training_scripts/train_albert.py --learning_rate 0.002 --train_file train.parquet --lr_milestones 60 120 "
        "--use_cpu true --note '<secret>' --output_dir runs/train_albert"
    )
    run.processes = 2
    assert run.command.startswith("torchrun --nproc_per_node 2 training_scripts/train_albert.py ")


def test_words_of_arguments_keep_every_digit_and_no_value_becomes_an_argument():
    assert argument_words({"a": 1e-08, "b": 3.0, "c": False, "d": "--x", "e": [-1.5, 2], "f": "x y"}) == [
        "--a", "1e-08", "--b", "3", "--c", "false", "--d=--x", "--e=-1.5", "2", "--f", "x y",
    ]  # fmt: skip
    assert float(argument_words({"a": 0.1 + 0.2})[1]) == 0.1 + 0.2


def test_a_bad_run_among_good_ones_is_left_out_of_the_table(tmp_path, caplog):
    made_up(tmp_path / "runs/good")
    made_up(tmp_path / "runs/bad", config={"learning_rate": [1]})
    table = leaderboard(collect([str(tmp_path / "runs")]))
    assert len(table.splitlines()) == 3
    assert "Field 'learning_rate' with value [1] doesn't match any type in (" in caplog.text


def test_texts_of_others_are_no_markup_in_the_leaderboard(tmp_path):
    made_up(tmp_path / "a", config={"model_name": "<b>|[x](javascript:y)", "learning_rate": 1.0})
    table = leaderboard(collect([str(tmp_path / "a")]))
    assert len(table.splitlines()) == 3
    assert "&lt;b&gt;\\|\\[x\\](javascript:y)" in table


def test_a_failed_seed_is_counted_and_does_not_change_what_is_compared(tmp_path):
    for seed, metrics in enumerate(({"accuracy": None, "loss": 500.0}, {"accuracy": 0.9, "loss": 0.4})):
        made_up(tmp_path / f"a{seed}", seed=seed, metrics=metrics, config={"model_name": "mlp", "learning_rate": 1.0})
    made_up(tmp_path / "b", metrics={"accuracy": 0.95, "loss": 0.3}, config={"model_name": "mlp", "learning_rate": 0.1})
    made_up(
        tmp_path / "c", metrics={"accuracy": None, "loss": None}, config={"model_name": "mlp", "learning_rate": 9.0}
    )
    rows = leaderboard(collect([str(tmp_path)])).splitlines()[2:]
    assert [row.split("|")[9].strip() for row in rows] == ["0.95", "0.9 (1 of 2 runs)", "– (0 of 1 runs)"]


def test_rows_say_what_differs_between_them(tmp_path):
    for steps in (4, 8):
        config = {"model_name": "mlp", "learning_rate": 1.0, "max_steps": steps, "weight_decay": 0.1}
        made_up(tmp_path / str(steps), config=config)
    made_up(tmp_path / "other", dataset={"name": "mnist"}, config={"model_name": "mlp", "weight_decay": 0.2})
    rows = leaderboard(collect([str(tmp_path)])).splitlines()[2:]
    assert sorted(row.split("|")[6].strip() for row in rows) == ["max_steps=4", "max_steps=8", "–"]


def test_a_run_given_twice_is_one(tmp_path):
    made_up(tmp_path / "a", config={"model_name": "mlp"})
    made_up(tmp_path / "b", seed=1, config={"model_name": "mlp"})
    rows = leaderboard(collect([str(tmp_path / name) for name in "aab"])).splitlines()[2:]
    assert [row.split("|")[7].strip() for row in rows] == ["2"]


def test_a_repetition_of_a_seed_is_no_second_run(tmp_path, caplog):
    """Nor is a run of two processes, with twice the batch, one more seed of a run of one."""
    made_up(tmp_path / "a", 2.0)
    made_up(tmp_path / "again", 9.0, finished="2026-11-23T00:00:00+00:00")
    made_up(tmp_path / "b", 3.0, seed=1)
    made_up(tmp_path / "two", 5.0, seed=2, processes=2)
    table = leaderboard(collect([str(tmp_path)])).splitlines()[2:]
    assert len(table) == 2
    assert "| 2 | Top-1 accuracy | 0.6 ± 0.42 |" in table[0]  # 0.9 and 0.3
    assert "processes=1" in table[0]
    assert "| 1 | Top-1 accuracy | 0.5 |" in table[1]
    assert "with seed 0 differ in nothing, finished " in caplog.text


def test_runs_without_a_seed_and_older_runs_without_processes_are_counted(tmp_path):
    made_up(tmp_path / "a", 5.0, seed=None)
    made_up(tmp_path / "b", 6.0, seed=None, processes=None)
    made_up(tmp_path / "c", 7.0, seed=1, config={"model_name": "mlp", "learning_rate": 1e-3, "channels": 3})
    (row,) = leaderboard(collect([str(tmp_path)])).splitlines()[2:]
    assert "| 3 | Top-1 accuracy | 0.6 ± 0.1 |" in row


def test_rows_that_differ_in_the_optimizer_alone_are_compared_over_the_seeds_that_both_have(tmp_path):
    config = {"model_name": "mlp", "learning_rate": 1e-3}
    values = {"adamw": (5.0, 6.0, 7.0, 8.0), "agr_adamw": (6.0, 7.1, 8.0, 8.9), "adal": (9.0,)}
    for optimizer, of in values.items():
        for seed, value in enumerate(of):
            made_up(tmp_path / "runs" / optimizer / str(seed), value, seed=seed, optimizer=optimizer,
                    config={**config, "optim": optimizer})  # fmt: skip
    made_up(tmp_path / "lower", 3.0, optimizer="adal", config={**config, "optim": "adal", "learning_rate": 1e-4})
    folders = [str(tmp_path / "runs" / name) for name in values] + [str(tmp_path / "lower")]
    *_, blank, agr, adal = leaderboard(collect(folders)).splitlines()
    assert blank == ""
    found = re.fullmatch(r"- AdamW\(AGR\) against AdamW, accuracy: better\. Mean difference \+10 points, 95% interval "
                         r"\+(\S+) to \+(\S+), 4 seeds\.", agr)  # fmt: skip
    assert found, agr
    # 10, 11, 10, 9 points: mean 10, deviation sqrt(2/3), Student's t of 3 degrees 3.182.
    half = 3.182446 * (2 / 3) ** 0.5 / 2
    assert [float(x) for x in found.groups()] == pytest.approx([10 - half, 10 + half], abs=0.06)
    assert adal.startswith("- AdaL against AdamW, accuracy: cannot tell (one seed says nothing about the next).")
