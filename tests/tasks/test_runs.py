"""What a run writes down: whose data it was trained on, and into which folder."""

import pytest

from agr_hf.tasks.runs import dataset_of, refuse_used


def test_own_files_are_not_called_as_the_default_set():
    assert dataset_of("digits", 5, ("/data/train.parquet", None))["name"] == "train"
    assert dataset_of("pydoc-topics", 5, ("wiki.train.tokens", "x.tokens")) == {
        "name": "wiki.train", "files": ["wiki.train.tokens", "x.tokens"], "examples": 5,
    }  # fmt: skip
    assert dataset_of("cifar10", 5, ("train.parquet",))["name"] == "cifar10"
    assert dataset_of("digits", 5) == {"name": "digits", "hub_id": None, "revision": None, "examples": 5}
    assert dataset_of("cifar10", 5, (), ("uoft-cs/cifar10", "abc"))["hub_id"] == "uoft-cs/cifar10"


@pytest.mark.parametrize("left", ["results.json", "checkpoint-8"])
def test_a_new_run_does_not_begin_in_the_folder_of_another(left, tmp_path):
    refuse_used(tmp_path / "new", None)
    (tmp_path / left).mkdir()
    with pytest.raises(ValueError, match="holds a run already; go on with it"):
        refuse_used(tmp_path, None)
    refuse_used(tmp_path, "latest")
