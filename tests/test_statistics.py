"""What AGR does to a gradient, against Psi itself and against hand-computed values."""

import math

import pytest
import torch

from agr_hf import agr
from agr_hf.optim.statistics import gradient_statistics


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_effect_is_what_psi_takes_away(scale, dtype):
    g = scale * torch.randn(30, 40, dtype=dtype) ** 3
    (found, overall) = gradient_statistics([("w", g)]).values()
    exact = g.double()
    assert found.effect == pytest.approx(((agr(exact) - exact).norm() / exact.norm()).item(), rel=1e-5)
    assert found.largest_share == pytest.approx((exact.abs().max() / exact.abs().sum()).item(), rel=1e-5)
    assert found.l1_norm == pytest.approx(exact.abs().sum().item(), rel=1e-6)
    assert found.log_mean == pytest.approx(exact.abs().log().mean().item(), rel=1e-5, abs=1e-5)
    assert found.log_std == pytest.approx(exact.abs().log().std(correction=0).item(), rel=1e-3)
    assert overall == found


def test_values_computed_by_hand():
    """Shares of (3, -1, 0, 0) are 3/4 and 1/4; Psi takes 9/4 and 1/4 away: sqrt(81 + 1)/4 of a length sqrt(10)."""
    found = gradient_statistics([("w", torch.tensor([3.0, -1.0, 0.0, 0.0]))])["w"]
    assert found.effect == pytest.approx(math.sqrt(82) / 4 / math.sqrt(10))
    assert found.largest_share == pytest.approx(0.75)
    assert (found.l1_norm, found.zeros) == (4.0, 0.5)
    assert found.log_mean == pytest.approx(math.log(3) / 2)
    assert found.log_std == pytest.approx(math.log(3) / 2)


def test_overall_is_of_all_gradients_together():
    grads = {"a": torch.randn(10, 10), "b": 5 * torch.randn(3, 3), "one": torch.ones(1), "empty": torch.zeros(0, 2)}
    found = gradient_statistics(grads.items())
    assert list(found) == ["a", "b", "one", "overall"]
    flat = torch.cat([g.flatten() for g in grads.values()])
    taken = torch.cat([(agr(g) - g).flatten() for g in grads.values()])
    assert found["overall"].effect == pytest.approx((taken.norm() / flat.norm()).item(), rel=1e-5)
    assert found["overall"].l1_norm == pytest.approx(flat.abs().sum().item(), rel=1e-6)
    assert found["one"].effect == 0.0


def test_zero_gradients_have_no_effect_and_no_logarithm():
    found = gradient_statistics([("w", torch.zeros(4, 4))])["w"]
    assert (found.effect, found.largest_share, found.l1_norm, found.zeros) == (0.0, 0.0, 0.0, 1.0)
    assert math.isnan(found.log_mean)
    assert math.isnan(found.log_std)
    assert gradient_statistics([]) == {}
