"""Bad input gets a sentence: the argument, its value, its range."""

import math

import pytest
import torch
from oracle import OURS, WITH_AGR

from agr_hf.optim.registry import OPTIMIZERS

BAD = [
    {"lr": -1e-3},
    {"lr": math.nan},
    {"lr": "0.1"},
    {"lr": None},
    {"lr": torch.tensor(-1.0)},
    {"lr": torch.tensor([1.0, 2.0])},
    {"betas": 0.9},
    {"betas": (0.9,)},
    {"betas": (1.0, 0.9, 0.9)},
    {"betas": (-0.1, 0.9, 0.9)},
    {"eps": -1e-8},
    {"eps": math.inf},
    {"weight_decay": -0.1},
    {"max_grad_norm": 0.0},
    {"max_grad_norm": -1.0},
    {"maximize": 1},
    {"capturable": "yes"},
    {"foreach": "yes"},
    {"fused": 3},
]
BAD_AGR = [
    {"agr": "yes"},
    {"agr_steps": -1},
    {"agr_steps": 2.5},
    {"agr_steps": True},
    {"min_ndim": -1},
    {"min_ndim": 1.0},
    {"second_moment": "both"},
]


def param():
    return torch.nn.Parameter(torch.ones(2, 2))


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_values_are_refused_by_name_value_and_range(name, bad):
    ((key, value),) = bad.items()
    with pytest.raises(ValueError, match=rf"{OPTIMIZERS[name].cls.__name__}: {key}=.* is not allowed; it must be") as e:
        OPTIMIZERS[name].cls([param()], **bad)
    assert repr(value) in str(e.value)
    with pytest.raises(ValueError, match=f"{key}="):  # in a group as well
        OPTIMIZERS[name].cls([{"params": [param()], **bad}])


@pytest.mark.parametrize("name", WITH_AGR)
@pytest.mark.parametrize("bad", BAD_AGR, ids=str)
def test_bad_agr_options_are_refused(name, bad):
    ((key, value),) = bad.items()
    with pytest.raises(ValueError, match=rf"{key}=.* is not allowed; it must be") as e:
        OPTIMIZERS[name].cls([param()], **bad)
    assert repr(value) in str(e.value)


@pytest.mark.parametrize(("name", "key", "value"), [
    ("nosadam", "gamma", -0.1), ("adan", "proximal", 1), ("agr_adan", "proximal", None), ("adal", "decoupled", "L2"),
])  # fmt: skip
def test_bad_options_of_single_rules_are_refused(name, key, value):
    with pytest.raises(ValueError, match=f"{key}="):
        OPTIMIZERS[name].cls([param()], **{key: value})


@pytest.mark.parametrize("name", OURS)
def test_a_refused_group_is_not_added(name):
    optimizer = OPTIMIZERS[name].cls([param()])
    with pytest.raises(ValueError, match="lr="):
        optimizer.add_param_group({"params": [param()], "lr": -1})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2, 2)
    optimizer.step()


@pytest.mark.parametrize("name", ["acprop", "nosadam"])
def test_fused_is_refused_where_there_is_no_kernel(name):
    with pytest.raises(ValueError, match="no fused kernel on cpu"):
        OPTIMIZERS[name].cls([param()], fused=True)


@pytest.mark.parametrize("name", OURS)
def test_foreach_and_fused_exclude_each_other(name):
    with pytest.raises(ValueError, match="fused=True"):
        OPTIMIZERS[name].cls([param()], foreach=True, fused=True)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantized_parameters_are_refused(name, dtype):
    with pytest.raises(ValueError, match=f"{dtype}.*leave quantized ones"):
        OPTIMIZERS[name].cls([torch.zeros(2, dtype=dtype)])


@pytest.mark.parametrize("name", OURS)
def test_numpy_numbers_are_numbers(name):
    numpy = pytest.importorskip("numpy", reason="numpy is missing: pip install numpy")
    OPTIMIZERS[name].cls([param()], lr=numpy.float32(0.1), weight_decay=numpy.float64(0.1))
