"""Checkpoints without pickle: there and back to the bit, and nothing hostile gets in."""

import json

import pytest
import torch
from example_runs import contents

from agr_hf.hub.training_state import INDEX, LEFT_OUT, export_checkpoint, import_checkpoint, newest_checkpoint


def checkpoint_of(trained, task):
    found = newest_checkpoint(trained[task])
    assert found is not None
    return found


@pytest.mark.parametrize("task", ["image-classification", "albert", "ddpm"])
def test_a_checkpoint_comes_back_and_no_pickle_travels(task, trained, tmp_path):
    checkpoint = checkpoint_of(trained, task)
    export_checkpoint(checkpoint, tmp_path / "published")
    assert {path.suffix for path in (tmp_path / "published").iterdir()} == {".safetensors", ".json"}
    made = import_checkpoint(tmp_path / "published", tmp_path / "run")
    assert made.name == checkpoint.name
    before, after = contents(checkpoint), contents(made)
    for name in LEFT_OUT:
        before.pop(name, None)
    assert before.keys() == after.keys()
    for name in before:
        if name.endswith((".pt", ".pth", ".bin", ".pkl")):
            one, other = (torch.load(folder / name, weights_only=False) for folder in (checkpoint, made))
            assert plain(one) == plain(other), name
        elif name != "trainer_state.json":
            assert before[name] == after[name], name


def plain(value):
    """A value with its tensors and arrays as bytes."""
    if isinstance(value, torch.Tensor):
        return (
            str(value.dtype),
            tuple(value.shape),
            value.contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else value.item(),
        )
    if hasattr(value, "tobytes"):
        return value.tobytes()
    if isinstance(value, dict):
        return [(key, plain(entry)) for key, entry in value.items()]
    return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else repr(value)


def test_a_checkpoint_with_code_in_it_is_not_published(tmp_path):
    class Code:
        def __reduce__(self):
            return print, ("run",)

    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    torch.save({"x": Code()}, folder / "optimizer.pt")
    with pytest.raises(ValueError, match=r"checkpoint-1/optimizer.pt cannot be written without pickle"):
        export_checkpoint(folder, tmp_path / "published")


@pytest.mark.parametrize(
    "index",
    [
        {"name": "../outside", "pickles": []},
        {"name": "checkpoint-1", "pickles": ["../../outside.pt"]},
        {"name": "/etc", "pickles": []},
        {"name": ".", "pickles": []},
        {"name": "src", "pickles": []},
        {"name": "notes.md", "pickles": []},
        {"name": "checkpoint-1", "pickles": ["model.safetensors"]},
        {"pickles": []},
        [],
    ],
)
def test_a_hostile_index_is_refused(index, tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names|holds no published training state"):
        import_checkpoint(folder, tmp_path / "run")
    assert {path.name for path in tmp_path.iterdir()} <= {"published", "run"}
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_published_pickles_are_left_where_they_are(tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / INDEX).write_text(json.dumps({"name": "checkpoint-1", "pickles": []}))
    (folder / "optimizer.pt").write_bytes(b"anything")
    (folder / "model.safetensors").write_bytes(b"weights")
    made = import_checkpoint(folder, tmp_path / "run")
    assert [path.name for path in made.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    "state",
    [
        "[1]",
        '{"unknown": 1}',
        '{"log_history": [1]}',
        '{"log_history": [{"loss": 1}]}',
        "{",
        "[" * 100_000,
        '{"global_step": 1, "log_history": [], "save_steps": 0}',
        '{"global_step": 1, "log_history": [], "epoch": "x"}',
        '{"global_step": 1, "log_history": [{"step": 1, "eval_loss": "x"}]}',
    ],
)
def test_a_hostile_trainer_state_is_refused(state, tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / INDEX).write_text(json.dumps({"name": "checkpoint-1", "pickles": []}))
    (folder / "trainer_state.json").write_text(state)
    with pytest.raises(ValueError, match=r"trainer_state.json is no state of a Trainer"):
        import_checkpoint(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["[]", "null", '{"dict": []}', '{"dict": [["state", {"dict": []}]]}', "[" * 100_000])
def test_hostile_optimizer_state_is_refused(value, tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / INDEX).write_text(json.dumps({"name": "checkpoint-1", "pickles": ["optimizer.pt"]}))
    (folder / "optimizer.pt.json").write_text(value)
    with pytest.raises(ValueError, match=r"optimizer.pt of the published training state is"):
        import_checkpoint(folder, tmp_path / "run")
    assert not list((tmp_path / "run").glob("*"))


def test_the_newest_complete_one_is_taken(trained, tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for task in ("image-classification", "ddpm"):
        numbers = [int(path.name.split("-")[1]) for path in trained[task].glob("checkpoint-*")]
        assert newest_checkpoint(trained[task]).name == f"checkpoint-{max(numbers)}"
