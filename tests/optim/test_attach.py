"""Psi in front of any torch optimizer."""

import sys

import pytest
import torch
from oracle import as_parameters, gradients, initial, run_optimizer

from agr_hf import AGRAdamW, agr, agr_param_groups, attach_agr

HOSTS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2),
    "lion": lambda p: pytest.importorskip("timm.optim", reason="timm is missing").Lion(p, lr=1e-3),
}


@pytest.mark.parametrize("host", HOSTS)
def test_attached_psi_is_psi_of_the_gradients_before_the_step(host):
    attached, by_hand = as_parameters(initial()), as_parameters(initial())
    optimizer = HOSTS[host](attached)
    attach_agr(optimizer)
    run_optimizer(optimizer, attached, gradients(20))
    psis = [[agr(g) if g.ndim >= 2 else g for g in grads] for grads in gradients(20)]
    run_optimizer(HOSTS[host](by_hand), by_hand, psis)
    assert all(torch.equal(p, q) for p, q in zip(attached, by_hand, strict=True))


def test_muon_takes_psi():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon (2.9 and later do)")
    ends = []
    for attach in (True, False):
        params = as_parameters([initial()[2]], torch.float32)
        optimizer = torch.optim.Muon(params, lr=1e-2)
        if attach:
            attach_agr(optimizer)
        run_optimizer(optimizer, params, [[g[2]] for g in gradients(3)])
        ends.append(params[0].detach())
    assert not torch.equal(*ends)
    assert ends[0].isfinite().all()


def test_adamw_with_attached_psi_is_the_authors_variant():
    attached, ours = as_parameters(initial()), as_parameters(initial())
    optimizer = torch.optim.AdamW(attached, lr=1e-2)
    attach_agr(optimizer, min_ndim=0)
    run_optimizer(optimizer, attached, gradients(20))
    run_optimizer(AGRAdamW(ours, lr=1e-2, second_moment="regularized", min_ndim=0), ours, gradients(20))
    for p, q in zip(attached, ours, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_remove_ends_it_and_may_be_called_twice():
    params = as_parameters(initial()[:3])
    optimizer = torch.optim.SGD(params, lr=1.0)
    handle = attach_agr(optimizer)
    handle.remove()
    handle.remove()
    run_optimizer(optimizer, params, [g[:3] for g in gradients(1)])
    for p, theta, g in zip(params, initial(), next(gradients(1)), strict=False):
        torch.testing.assert_close(p.detach(), theta - g, rtol=0, atol=0)


def test_an_expanded_gradient_is_replaced():
    param, expanded = torch.nn.Parameter(torch.zeros(3, 4)), torch.ones(1, 4).expand(3, 4)
    optimizer = torch.optim.SGD([param], lr=1.0)
    attach_agr(optimizer)
    param.grad = expanded
    optimizer.step()
    torch.testing.assert_close(-param.detach(), agr(torch.ones(3, 4)))
    assert (expanded == 1).all()


def test_suspension_is_counted_in_the_state_dict():
    params = as_parameters(initial()[:1])
    optimizer = torch.optim.SGD(params, lr=0.0)
    attach_agr(optimizer, steps=3)
    run_optimizer(optimizer, params, [g[:1] for g in gradients(2)])
    resumed = torch.optim.SGD(params, lr=0.0)
    attach_agr(resumed, steps=3)
    resumed.load_state_dict(optimizer.state_dict())
    changed = []
    for grad, *_ in gradients(3):
        params[0].grad = grad.clone()
        resumed.step()
        changed.append(not torch.equal(params[0].grad, grad))
    assert changed == [True, False, False]


def test_groups_marked_agr_false_are_left_alone():
    model = torch.nn.Sequential(torch.nn.Embedding(4, 3), torch.nn.Linear(3, 2))
    optimizer = torch.optim.SGD(agr_param_groups(model), lr=0.0)
    attach_agr(optimizer, min_ndim=0)
    model(torch.arange(4)).square().sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    changed = [not torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True)]
    assert changed == [False, True, False]


@pytest.mark.parametrize("as_keyword", [True, False])
def test_a_closures_gradients_are_regularized_after_each_evaluation(as_keyword):
    param = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    optimizer = torch.optim.LBFGS([param], lr=0.1, max_iter=3)
    attach_agr(optimizer)
    seen = []

    def closure():
        if param.grad is not None:
            seen.append(param.grad.clone())
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
    assert loss == 30.0
    assert len(seen) >= 1
    torch.testing.assert_close(seen[0], agr(torch.tensor([[2.0, 4.0], [6.0, 8.0]])))


def test_an_accelerate_wrapped_optimizer_is_unwrapped():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is missing: pip install accelerate")
    model = torch.nn.Linear(3, 2)
    prepared_model, optimizer = accelerate.Accelerator(cpu=True).prepare(
        model, torch.optim.SGD(model.parameters(), 0.0)
    )
    attach_agr(optimizer)
    prepared_model(torch.randn(5, 3)).square().sum().backward()
    before = model.weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(model.weight.grad, agr(before))


def test_what_cannot_take_it_is_refused():
    params = as_parameters(initial()[:1])
    with pytest.raises(TypeError, match="Psi twice"):
        attach_agr(AGRAdamW(params))
    with pytest.raises(TypeError, match="Linear was given"):
        attach_agr(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="steps=-1"):
        attach_agr(torch.optim.SGD(params), steps=-1)
    with pytest.raises(ValueError, match="min_ndim=None"):
        attach_agr(torch.optim.SGD(params), min_ndim=None)


def test_attaching_twice_is_refused_and_again_after_removal_is_not():
    optimizer = torch.optim.SGD(as_parameters(initial()[:1]), lr=0.1)
    handle = attach_agr(optimizer)
    with pytest.raises(RuntimeError, match="attached to this SGD already"):
        attach_agr(optimizer)
    handle.remove()
    attach_agr(optimizer)


def test_psi_is_not_put_on_psi_through_lookahead():
    timm_optim = pytest.importorskip("timm.optim", reason="timm is missing: pip install 'agr-hf[train]'")
    param = torch.nn.Parameter(torch.ones(3, 3))
    with pytest.raises(TypeError, match="AGRAdamW applies AGR itself"):
        attach_agr(timm_optim.Lookahead(AGRAdamW([param])))
    handle = attach_agr(timm_optim.Lookahead(torch.optim.SGD([param], lr=0.1)))
    handle.remove()


def test_steps_of_a_state_saved_without_agr_are_steps_of_the_run():
    params = as_parameters(initial(), torch.float32)
    stock = torch.optim.AdamW(params, lr=1e-2)
    run_optimizer(stock, params, gradients(5))
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    attach_agr(optimizer, steps=6)
    optimizer.load_state_dict(stock.state_dict())
    before = [[g.clone() for g in grads] for grads in gradients(2)]
    changed = []
    for grads in before:
        run_optimizer(optimizer, params, [grads])
        changed.append(not torch.equal(params[2].grad, grads[2].float()))
    assert changed == [True, False]  # the sixth step of the run, and no other
    assert optimizer.param_groups[0]["agr_step"] == 7


def test_flattened_layers_are_refused_with_the_way_out(monkeypatch):
    flat = torch.nn.Parameter(torch.ones(6))
    flat._is_flat_param = True
    with pytest.raises(ValueError, match=r"attach_agr needs each layer's own gradient.*FSDP2"):
        attach_agr(torch.optim.SGD([flat], lr=0.1))
    monkeypatch.setitem(sys.modules, "deepspeed", sys)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 3))], lr=0.1)
    attach_agr(optimizer)
    optimizer.param_groups[0]["params"] = [torch.nn.Parameter(torch.ones(6))]
    with pytest.raises(RuntimeError, match="finds one flat tensor of 6 elements now"):
        optimizer.step()
