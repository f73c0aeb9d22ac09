"""The step inside of the backward pass: the same numbers as after it, and no more than one gradient at a time."""

import pytest
import torch
from oracle import OURS

from agr_hf import AGRAdamW, agr_param_groups, step_in_backward
from agr_hf.optim.registry import OPTIMIZERS


def small_model(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(12, 20), torch.nn.LayerNorm(20), torch.nn.Tanh(), torch.nn.Linear(20, 12, bias=False)
    ).to(dtype)


def loss_of(model, seed):
    weight = next(model.parameters())
    return (
        model(torch.randn(6, 12, generator=torch.Generator().manual_seed(seed)).to(weight.dtype))
        .float()
        .square()
        .mean()
    )


def take_steps(model, optimizer, seeds):
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)
    for seed in seeds:
        loss_of(model, seed).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def assert_same(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    "options",
    [{}, {"foreach": False}, {"rounding": "stochastic"}, {"rounding": "kahan", "state_dtype": torch.bfloat16}],
    ids=str,
)
@pytest.mark.parametrize("name", OURS)
def test_it_is_the_same_step_to_the_bit(name, options):
    models = [small_model(torch.bfloat16 if "rounding" in options else torch.float32) for _ in range(2)]
    optimizers = [OPTIMIZERS[name].cls(agr_param_groups(m, weight_decay=0.1), lr=1e-2, **options) for m in models]
    step_in_backward(optimizers[0])
    for model, optimizer in zip(models, optimizers, strict=True):
        take_steps(model, optimizer, range(4))
    assert_same(*models)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        for key, value in optimizers[0].state[p].items():
            assert torch.equal(value, optimizers[1].state[q][key])
    assert [g.get("agr_step") for g in optimizers[0].param_groups] == [
        g.get("agr_step") for g in optimizers[1].param_groups
    ]


def test_at_most_one_gradient_is_there_at_a_time():
    model = torch.nn.Sequential(*[torch.nn.Linear(50, 50, bias=False) for _ in range(6)])
    most = []

    def count(_):
        most.append(sum(param.grad is not None for param in model.parameters()))

    handles = [param.register_post_accumulate_grad_hook(count) for param in model.parameters()]
    step_in_backward(AGRAdamW(model.parameters()))
    model(torch.randn(3, 50)).sum().backward()
    assert most == [1] * 6
    assert all(param.grad is None for param in model.parameters())
    assert len(handles) == 6


def test_agr_ends_at_its_step_and_a_checkpoint_goes_on():
    models = [small_model() for _ in range(2)]
    optimizers = [AGRAdamW(m.parameters(), lr=1e-2, agr_steps=3, agr=[True, False, True, True, True]) for m in models]
    step_in_backward(optimizers[0])
    for model, optimizer in zip(models, optimizers, strict=True):
        take_steps(model, optimizer, range(2))
    saved = optimizers[0].state_dict()
    resumed = small_model()
    resumed.load_state_dict(models[0].state_dict())
    other = AGRAdamW(resumed.parameters())
    step_in_backward(other)
    other.load_state_dict(saved)
    other.param_groups[0]["lr"] = optimizers[1].param_groups[0]["lr"] = 1e-2
    for model, optimizer in ((resumed, other), (models[1], optimizers[1])):
        for seed in range(2, 6):
            loss_of(model, seed).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(resumed, models[1])
    assert other.param_groups[0]["agr_step"] == 6


def test_a_frozen_and_a_tied_parameter_are_as_without():
    ends = []
    for inside in (True, False):
        model = small_model()
        model[0].bias.requires_grad_(False)
        model.register_parameter("tied", model[3].weight)
        optimizer = AGRAdamW(model.parameters(), lr=1e-2)
        if inside:
            step_in_backward(optimizer)
        for seed in range(3):
            (loss_of(model, seed) + model.tied.square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(model)
    assert_same(*ends)


def test_a_layer_that_is_unfrozen_later_counts_each_step_once_and_joins():
    ends = []
    for inside in (True, False):
        model = small_model()
        model[0].weight.requires_grad_(False)
        optimizer = AGRAdamW(model.parameters(), lr=1e-2, agr_steps=4)
        if inside:
            step_in_backward(optimizer)
        for seed in range(6):
            model[0].weight.requires_grad_(seed >= 2)
            loss_of(model, seed).backward()
            assert not inside or seed < 3 or model[0].weight.grad is None
            optimizer.step()
            optimizer.zero_grad()
        ends.append(model)
        assert optimizer.param_groups[0]["agr_step"] == 6
    assert_same(*ends)


def test_the_handle_gives_the_step_back():
    models = [small_model() for _ in range(2)]
    optimizers = [AGRAdamW(m.parameters(), lr=1e-2) for m in models]
    handle = step_in_backward(optimizers[0])
    for model, optimizer in zip(models, optimizers, strict=True):
        take_steps(model, optimizer, range(2))
    handle.remove()
    handle.remove()
    for model, optimizer in zip(models, optimizers, strict=True):
        take_steps(model, optimizer, range(2))
    assert_same(*models)


def test_what_cannot_be_right_is_refused_before_anything_changes():
    with pytest.raises(TypeError, match="takes an optimizer of agr_hf, but AdamW was given"):
        step_in_backward(torch.optim.AdamW(small_model().parameters()))
    with pytest.raises(RuntimeError, match="needs all gradients before the first step"):
        step_in_backward(AGRAdamW(small_model().parameters(), max_grad_norm=1.0))
    twice = AGRAdamW(small_model().parameters())
    handle = step_in_backward(twice)
    with pytest.raises(RuntimeError, match=r"steps in the backward pass already; call \.remove\(\) on the handle"):
        step_in_backward(twice)
    handle.remove()
    step_in_backward(twice)

    model = small_model()
    optimizer = AGRAdamW(model.parameters())
    step_in_backward(optimizer)
    loss_of(model, 0).backward()
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(RuntimeError, match="got a second gradient before optimizer.step()"):
        loss_of(model, 1).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    optimizer.clip_next_step(1.0)
    with pytest.raises(RuntimeError, match="the norm of all gradients is not known yet"):
        optimizer.step()


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="in a job of 2 processes"):
        step_in_backward(AGRAdamW(small_model().parameters()))


def test_trainer_trains_with_it(tmp_path):
    from transformers import Trainer, TrainingArguments

    from agr_hf.tasks.digits import digits_model, load_digits

    def train(inside, **arguments):
        torch.manual_seed(0)
        model = digits_model(num_hidden_layers=1, hidden_size=16, intermediate_size=16)
        optimizer = AGRAdamW(model.parameters(), lr=1e-3)
        if inside:
            step_in_backward(optimizer)
        args = TrainingArguments(tmp_path / "run", max_steps=5, report_to="none", use_cpu=True, **arguments)
        Trainer(model, args, train_dataset=load_digits()["train"], optimizers=(optimizer, None)).train()
        return model

    # Not to the bit: the products of matrices at other addresses may differ in the last one. A step moves by 1e-3.
    inside, outside = (list(train(inside, max_grad_norm=0).parameters()) for inside in (True, False))
    torch.testing.assert_close(inside, outside, rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match="gradients cannot be accumulated so"):
        train(True, max_grad_norm=0, gradient_accumulation_steps=2)
