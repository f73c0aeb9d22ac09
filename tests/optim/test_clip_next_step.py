"""Clipping asked for one step: what the integrations rely on."""

import copy
import math
import pickle

import pytest
import torch
from oracle import OURS, gradients, initial

from agr_hf.optim.registry import OPTIMIZERS


def pair(name, **options):
    """Two optimizers of the same kind on parameters of their own."""
    both = []
    for _ in range(2):
        params = [torch.nn.Parameter(theta.clone()) for theta in initial()]
        both.append((params, OPTIMIZERS[name].cls(params, lr=1e-2, eps=1e-2, **options)))
    return both


def step(params, optimizer, grads, clip=None, by_torch=None):
    """One step; the norm found before clipping."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    norm = torch.nn.utils.get_total_norm([param.grad for param in params])
    found = None if clip is None else optimizer.clip_next_step(clip)
    if by_torch is not None:
        torch.nn.utils.clip_grad_norm_(params, by_torch)
    optimizer.step()
    if found is not None:
        assert found.dtype == torch.float32
        assert found.shape == ()
        torch.testing.assert_close(found.double(), norm.double(), rtol=1e-6, atol=0)
    return norm


def assert_alike(params, others):
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}], ids=["plain", "decay"])
@pytest.mark.parametrize("name", OURS)
def test_a_step_clips_as_clip_grad_norm_before_it_and_the_next_does_not(name, options):
    (params, optimizer), (others, other) = pair(name, **options)
    for i, grads in enumerate(gradients(6)):
        limit = 0.5 if i % 2 == 0 else None
        norm = step(params, optimizer, grads, clip=limit)
        step(others, other, grads, by_torch=limit)
        assert norm > 0.5
        assert_alike(params, others)


def test_an_infinite_limit_measures_alone_and_gradients_with_an_infinity_stay_as_they_are():
    (params, optimizer), (others, other) = pair("agr_adamw")
    first, second = gradients(2)
    second[0].view(-1)[0] = math.inf
    for grads in (first, second):
        step(params, optimizer, grads, clip=math.inf)
        step(others, other, grads)
    for param, expected in zip(params, others, strict=True):
        assert torch.equal(param.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize(("asked", "own"), [(0.5, 2.0), (2.0, 0.5), (math.inf, 0.5)])
def test_of_two_limits_the_smaller_counts_and_clips_once(asked, own):
    (params, optimizer), (others, other) = pair("agr_adamw", max_grad_norm=own)
    other.param_groups[0]["max_grad_norm"] = None
    for grads in gradients(3):
        assert step(params, optimizer, grads, clip=asked) > 2
        step(others, other, grads, by_torch=min(asked, own))
    assert_alike(params, others)


def test_the_last_of_several_calls_counts():
    (params, optimizer), (others, other) = pair("agr_adamw")
    (grads,) = gradients(1)
    optimizer.clip_next_step(0.1)
    step(params, optimizer, grads, clip=0.5)
    step(others, other, grads, by_torch=0.5)
    assert_alike(params, others)


def test_gradients_are_not_changed_and_the_norm_is_nan_until_the_step():
    ((params, optimizer), _) = pair("agr_adamw")
    (grads,) = gradients(1)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    norm = optimizer.clip_next_step(0.5)
    assert norm.isnan()
    optimizer.step()
    assert norm > 0.5
    assert all(torch.equal(param.grad, grad) for param, grad in zip(params, grads, strict=True))


def test_a_step_without_gradients_has_the_norm_zero_and_uses_the_request_up():
    (params, optimizer), (others, other) = pair("agr_adamw")
    norm = optimizer.clip_next_step(0.5)
    optimizer.step()
    assert norm == 0
    (grads,) = gradients(1)
    step(params, optimizer, grads)
    step(others, other, grads)
    assert_alike(params, others)


def test_the_norm_of_half_precision_gradients_is_not_rounded_to_it():
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.zeros(100, 100, dtype=torch.bfloat16))
    param.grad = torch.randn(100, 100).bfloat16()
    optimizer = OPTIMIZERS["agr_adamw"].cls([param])
    norm = optimizer.clip_next_step(1.0)
    optimizer.step()
    torch.testing.assert_close(norm.double(), param.grad.double().norm(), rtol=1e-6, atol=0)
    assert norm != norm.bfloat16()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_request_is_no_state(copied):
    ((params, optimizer), _) = pair("agr_adamw")
    before = str(optimizer.state_dict())
    optimizer.clip_next_step(1e-6)
    assert str(optimizer.state_dict()) == before
    other = copied(optimizer)
    plain = copied(
        OPTIMIZERS["agr_adamw"].cls([torch.nn.Parameter(p.detach().clone()) for p in params], 1e-2, eps=1e-2)
    )
    ends = []
    (grads,) = gradients(1)
    for made in (other, plain):
        for param, grad in zip(made.param_groups[0]["params"], grads, strict=True):
            param.grad = grad.clone()
        made.step()
        ends.append(made.param_groups[0]["params"])
    assert_alike(*ends)


@pytest.mark.parametrize("limit", [0, -1.0, math.nan])
def test_a_limit_that_is_no_number_above_zero_gets_a_sentence(limit):
    ((_, optimizer), _) = pair("agr_adamw")
    with pytest.raises(ValueError, match=f"max_norm={limit!r} is not allowed; it must be a number > 0"):
        optimizer.clip_next_step(limit)
