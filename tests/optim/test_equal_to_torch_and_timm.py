"""With AGR off the optimizers are torch's Adam and AdamW and timm's Adan: which of them to the bit is said here."""

import inspect
import sys

import pytest
import torch
from oracle import as_parameters, gradients, initial, run_optimizer

from agr_hf import Adan, AGRAdam, AGRAdamW, AGRAdan

STEPS = 50


def trained(make, memory_format=torch.contiguous_format, **options):
    params = as_parameters(initial(), torch.float32, memory_format)
    run_optimizer(make(params, lr=1e-2, **options), params, gradients(STEPS))
    return params


def assert_same_bits(params, others):
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("options", [{}, {"maximize": True, "weight_decay": 0.1}], ids=str)
def test_agr_adamw_without_agr_is_torch_adamw_to_the_bit(foreach, options):
    ours = trained(AGRAdamW, agr=False, foreach=foreach, **options)
    assert_same_bits(ours, trained(torch.optim.AdamW, foreach=foreach, **options))


def test_default_agr_adamw_without_agr_is_torch_fused_adamw_to_one_ulp():
    """Both compute in one pass, with multiply-adds fused where the compiler put them: 1 ulp in a step, at most 50 in 50."""
    ours = trained(AGRAdamW, agr=False, weight_decay=0.1)
    torchs = trained(torch.optim.AdamW, fused=True, weight_decay=0.1)
    for p, q in zip(ours, torchs, strict=True):
        torch.testing.assert_close(p, q, rtol=STEPS * 2**-23, atol=STEPS * 2**-24)


def test_agr_adam_without_agr_is_torch_adam_to_the_bit():
    ours = trained(AGRAdam, agr=False, foreach=True, weight_decay=0.1)
    assert_same_bits(ours, trained(torch.optim.Adam, foreach=True, weight_decay=0.1))


@pytest.mark.parametrize(("ours", "options"), [(Adan, {}), (AGRAdan, {"agr": False})])
@pytest.mark.parametrize("proximal", [True, False])
@pytest.mark.parametrize("fused", [None, False])
def test_adan_is_timm_adan_to_the_bit_in_lists_and_to_rounding_in_the_native_step(ours, options, proximal, fused):
    """Older timm (1.0.20) updates its mean with mul and add, not lerp: one rounding more in a step, 2e-5 in 50."""
    timm = pytest.importorskip("timm.optim", reason="timm is missing: pip install 'agr-hf[train]'")
    params = trained(ours, weight_decay=0.1, proximal=proximal, fused=fused, **options)
    timms = trained(timm.Adan, weight_decay=0.1, no_prox=not proximal, foreach=False, betas=(0.98, 0.92, 0.99))
    if fused is False and "lerp_(grad" in inspect.getsource(sys.modules[timm.Adan.__module__]):
        assert_same_bits(params, timms)
    for p, q in zip(params, timms, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5)


def test_clipping_inside_the_step_is_clip_grad_norm_before_it():
    params = as_parameters(initial(), torch.float32)
    optimizer = torch.optim.AdamW(params, lr=1e-2, foreach=False)
    for grads in gradients(STEPS):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.float()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
    ours = trained(AGRAdamW, agr=False, max_grad_norm=1.0, foreach=False)
    for p, q in zip(ours, params, strict=True):  # not to the bit: torch adds up its norm in another order
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)
