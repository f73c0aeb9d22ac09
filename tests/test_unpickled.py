"""Values without pickle: the bits come back, and what is no such value is refused."""

import json
import math

import numpy as np
import pytest
import torch

from agr_hf import unpickled


def same(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and (one == other).all()
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or (one != one and other != other))


def test_values_come_back_to_the_bit(tmp_path):
    values = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(3, 4)}, 7: {"m": torch.randn(2).bfloat16()}},
        "groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "agr": [True, False], "name": None}],
        "a.b": torch.zeros(2),
        "a": {"b": torch.ones(2)},
        1: torch.full((2,), 2.0),
        "1": torch.full((2,), 3.0),
        "1#0": torch.full((2,), 4.0),
        "random": ("MT19937", np.arange(624, dtype=np.uint32), 624, 0, 0.0),
        "odd": [math.inf, -0.0, math.nan, 2**70, "ü\n", True, torch.zeros(0), torch.tensor([1, 2], dtype=torch.uint8)],
    }
    unpickled.save(values, tmp_path / "x")
    assert same(unpickled.load(tmp_path / "x"), values)


def test_a_value_without_tensors_has_no_tensor_file(tmp_path):
    unpickled.save({"epoch": 1}, tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert unpickled.load(tmp_path / "x") == {"epoch": 1}


def test_what_needs_pickle_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"\.a\.1 is a object, which cannot be written without pickle"):
        unpickled.save({"a": [1, object()]}, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "table",
    [{"eval": "1"}, {"tensor": "missing"}, {"dict": [[1]]}, {"tensor": "a", "b": 1}, {"dict": 3}, {"dict": [[[], 1]]}],
)
def test_foreign_tables_are_refused(table, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="not a value written by agr_hf"):
        unpickled.load(tmp_path / "x")


def test_damaged_tensors_are_said(tmp_path):
    unpickled.save(torch.randn(10), tmp_path / "x")
    path = tmp_path / "x.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged"):
        unpickled.load(tmp_path / "x")
