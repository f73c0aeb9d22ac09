"""The Triton kernels under Triton's interpreter, on tensors of the CPU: run by test_triton.py in a process of its own.

`TRITON_INTERPRET=1` has to be set before anything imports Triton, and nothing else of the suite should see it.
"""

import copy

import pytest
import torch
from oracle import as_parameters, gradients, initial, run_reference
from torch.nn import Parameter

from agr_hf import AGRAdamW
from agr_hf.optim.backends import gpu, native
from agr_hf.optim.backends.gpu import GPUPart
from agr_hf.optim.registry import OPTIMIZERS
from agr_hf.optim.rounding import COMPENSATION

NAMES = [name for name, info in OPTIMIZERS.items() if getattr(info.cls, "native_rule", None)]
MIXES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
OPTIONS = [
    {},
    {"weight_decay": 0.1, "max_grad_norm": 0.5},
    {"weight_decay": 0.1, "maximize": True},
    {"capturable": True, "max_grad_norm": 0.5, "weight_decay": 0.1},
]
SHAPES = [(0, 3), (1, 1), (3, 5), (8, 4, 3, 3), (1, 128), (1, 129), (5,)]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(gpu, "DEVICES", ("cpu",))
    monkeypatch.setattr(native, "serves", lambda *_: False)
    monkeypatch.setattr(gpu, "CHUNK", 128)  # several chunks a tensor
    monkeypatch.setattr(gpu, "BLOCK", 64)


def give_gradients(params, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        if dtype != param.dtype:
            param.grad_dtype = None  # any dtype
        param.grad = (torch.randn(param.shape, generator=generator) ** 3).to(dtype)


def train(name, *, lists=False, steps=2, mix=MIXES[0], shapes=SHAPES, **options):
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator).to(mix[0])) for shape in shapes]
    optimizer = OPTIMIZERS[name].cls(params, lr=1e-2, **options, **({"foreach": False} if lists else {}))
    for seed in range(steps):
        give_gradients(params, seed, mix[1])
        optimizer.step()
    wanted = "ListsPart" if lists else "GPUPart"
    assert {type(part).__name__ for part in optimizer.plan.parts} == {wanted}
    return params, optimizer


def assert_close(one, other, dtype):
    """Parameters and state of two runs."""
    for p, q in zip(one[0], other[0], strict=True):
        same = (p == q).float().mean().nan_to_num(1.0)
        if dtype == torch.bfloat16:
            assert same > 0.99  # a float32 that differs in its last bit may round to the other side
        rest = [run[1].state[param].get(COMPENSATION, torch.zeros(())).float() for run, param in ((one, p), (other, q))]
        torch.testing.assert_close(
            p.float() + rest[0], q.float() + rest[1], rtol=2**-7 if dtype == torch.bfloat16 else 3e-5, atol=3e-5
        )
        for key, value in one[1].state[p].items():
            if key != COMPENSATION:
                tolerance = 2**-7 if value.dtype == torch.bfloat16 else 3e-5
                torch.testing.assert_close(value, other[1].state[q][key], rtol=tolerance, atol=3e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_equal_the_lists_at_odd_sizes(name, mix, options):
    if mix[0] != mix[1] and not hasattr(Parameter(torch.ones(1)), "grad_dtype"):
        pytest.skip("this torch has no gradients of another dtype than their parameter (grad_dtype, torch 2.10)")
    assert_close(train(name, mix=mix, **options), train(name, mix=mix, lists=True, **options), mix[0])


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_round_as_the_lists_do(name, rounding, state_dtype):
    options = {"rounding": rounding, "state_dtype": state_dtype, "weight_decay": 0.1, "mix": MIXES[1]}
    assert_close(train(name, **options), train(name, lists=True, **options), torch.bfloat16)


@pytest.mark.parametrize("options", [{"weight_decay": 0.1}, {"weight_decay": 0.1, "max_grad_norm": 1.0}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_equal_the_papers_rule(name, options):
    thetas = [theta.float().double() for theta in initial()]
    steps = [[g.float().double() for g in grads] for grads in gradients(5)]
    wanted = run_reference(name, thetas, steps, lr=1e-2, **options)
    params = as_parameters(thetas, torch.float32)
    optimizer = OPTIMIZERS[name].cls(params, lr=1e-2, **options)
    for grads in steps:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.float()
        optimizer.step()
    assert isinstance(optimizer.plan.parts[0], GPUPart)
    for p, w in zip(params, wanted, strict=True):
        torch.testing.assert_close(p.detach().double(), w, rtol=0, atol=3e-5)


@pytest.mark.parametrize("second_moment", ["raw", "regularized"])
@pytest.mark.parametrize("name", ["agr_adamw", "agr_adam", "agr_adan"])
def test_the_second_moment_takes_what_it_is_told(name, second_moment):
    options = {"second_moment": second_moment, "min_ndim": 0}
    assert_close(train(name, **options), train(name, lists=True, **options), torch.float32)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", ["agr_adamw", "agr_adam", "agr_adan"])
def test_agr_is_suspended_after_its_steps(name, capturable):
    options = {"agr_steps": 2, "capturable": capturable}
    ends = [train(name, steps=5, lists=lists, **options) for lists in (False, True)]
    assert_close(*ends, torch.float32)
    assert_close(ends[0], train(name, steps=5, lists=True, agr_steps=2), torch.float32)
    never = train(name, steps=5, lists=True)
    assert not torch.allclose(never[0][2], ends[0][0][2], rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e-40, 1e20, 3e38])
@pytest.mark.parametrize("name", ["agr_adamw", "agr_adam", "adal"])
def test_extreme_gradients_do_what_they_do_in_lists(name, value):
    ends = []
    for foreach in (None, False):
        param = Parameter(torch.ones(5, 6))
        optimizer = OPTIMIZERS[name].cls([param], lr=1e-2, foreach=foreach)
        for _ in range(2):
            param.grad = torch.linspace(-1, 1, 30).view(5, 6) * (value if value else 0.0)
            optimizer.step()
        ends.append(param.detach())
    torch.testing.assert_close(*ends, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_come_and_go_and_move(name):
    ends = []
    for options in ({}, {"foreach": False}):
        params = [Parameter(torch.ones(40, 9)), Parameter(torch.ones(3, 4, 2, 2).to(memory_format=torch.channels_last))]
        optimizer = OPTIMIZERS[name].cls(params, lr=1e-2, **options)
        for seed in range(5):
            optimizer.zero_grad()
            give_gradients(params, seed, torch.float32)  # contiguous: laid otherwise than the second parameter
            if seed == 2:
                params[0].grad = None
            if seed == 3:
                params[0].data = params[0].data.clone()
            optimizer.step()
        ends.append((params, optimizer))
    assert_close(*ends, torch.float32)


def test_rates_and_scales_on_the_device_are_read_there():
    ends = []
    for lists in (True, False):
        rate = torch.tensor(0.0)
        param = Parameter(torch.ones(30, 30))
        options = {"foreach": False} if lists else {}
        optimizer = AGRAdamW([param], lr=rate, capturable=True, max_grad_norm=0.1, **options)
        for step in range(3):
            rate.fill_(0.1 / (step + 1))  # as a scheduler does
            param.grad = torch.linspace(-1, 1, 900).view(30, 30)
            optimizer.step()
        ends.append(param.detach())
    torch.testing.assert_close(*ends)


def test_a_state_goes_on_with_another_backend():
    params, optimizer = train("agr_adan", steps=2)
    others, other = train("agr_adan", steps=2, lists=True)
    saved = copy.deepcopy(optimizer.state_dict())
    other.load_state_dict(saved)
    for some, one in ((params, optimizer), (others, other)):
        give_gradients(some, 7, torch.float32)
        one.step()
    assert_close((params, optimizer), (others, other), torch.float32)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_the_device_finds_that_a_step_is_skipped_and_what_the_loss_was_scaled_by(name, max_grad_norm, monkeypatch):
    """As a recorded step must: `found_inf` and `grad_scale` change between replays, and the host reads neither."""
    monkeypatch.setattr(native, "missing_kernel", lambda *_: None)
    ends = []
    for scaled in (True, False):
        params = [Parameter(torch.ones(40, 9)), Parameter(torch.ones(5))]
        optimizer = OPTIMIZERS[name].cls(params, lr=1e-2, capturable=True, fused=True, max_grad_norm=max_grad_norm)
        for seed, (scale, overflows) in enumerate([(8.0, 1), (4.0, 0), (4.0, 0), (8.0, 2), (4.0, 0)]):
            if overflows and not scaled:
                continue
            give_gradients(params, seed, torch.float32)
            if scaled:
                for param in params:
                    param.grad.mul_(float("nan") if overflows else scale)
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(float(overflows))
                with monkeypatch.context() as trap:
                    trap.setattr(torch.Tensor, "item", lambda *_: pytest.fail("the host read a number"))
                    optimizer.step()
            else:
                optimizer.step()
        assert isinstance(optimizer.plan.parts[0], GPUPart)
        ends.append((params, optimizer))
    assert [state["step"].item() for state in ends[0][1].state.values()] == [3.0, 3.0]
    assert_close(*ends, torch.float32)
    if "agr_step" in optimizer.defaults:  # what is counted on the device alone is counted again where a state is loaded
        other = OPTIMIZERS[name].cls([Parameter(torch.ones_like(param)) for param in ends[0][0]], lr=1e-2)
        other.load_state_dict(ends[0][1].state_dict())
        assert other.param_groups[0]["agr_step"] == 3


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_a_nan_of_any_bits_stays_one(rounding):
    """With all bits set, what rounding adds to it would carry over, to a zero."""
    param = Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    param.grad = torch.ones(8, 8, dtype=torch.bfloat16)
    param.grad.view(torch.int16)[0] = 0x7FFF
    AGRAdamW([param], rounding=rounding).step()
    assert param[0].isnan().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_backward_through_the_weights_before_the_step_raises(name):
    """As after torch's own steps: its gradients would be those of weights that are gone."""
    params = [Parameter(torch.ones(3, 5)), Parameter(torch.ones(4))]
    optimizer = OPTIMIZERS[name].cls([*params, Parameter(torch.ones(2))], lr=1e-2)  # the last has no gradient
    give_gradients(params, 0, torch.float32)
    losses = [param.square().sum() for param in params]
    optimizer.step()
    assert [type(part) for part in optimizer.plan.parts] == [GPUPart]
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
