"""What torch's generic optimizer tests ask of every optimizer of torch's (its test/test_optim.py), asked of ours.

Where a claim means something for torch.optim.AdamW too, the test runs on it beside ours: that checks the test, and what
AdamW does otherwise is said where it shows.
"""

import copy
import functools
import gc
import pickle
import threading
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
from oracle import OURS, WITH_AGR
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from agr_hf.optim.registry import OPTIMIZERS

STOCK = "torch.optim.AdamW"
FUSED = ["agr_adamw", "agr_adam", "adal"]
every_optimizer = pytest.mark.parametrize("name", OURS)
beside_torch = pytest.mark.parametrize("name", [*OURS, STOCK])
unpickled = pytest.param(lambda optimizer: pickle.loads(pickle.dumps(optimizer)), id="pickle")
copied = pytest.mark.parametrize("copied", [pytest.param(copy.deepcopy, id="deepcopy"), unpickled])


def class_of(name):
    return torch.optim.AdamW if name == STOCK else OPTIMIZERS[name].cls


def make(name, params, **options):
    return class_of(name)(params, **options)


def ways(name):
    """Every way to ask for the same step; the first is the plainest."""
    choices = [{"foreach": False}, {}, {"foreach": True}]
    if name in FUSED or name == STOCK:
        choices.append({"fused": True})
    if name != STOCK:  # which has no capturable step on the CPU, see below
        choices.append({"capturable": True})
    return choices


def rules(name):
    """Options that change what is computed."""
    choices = [{}, {"weight_decay": 0.1, "maximize": True}]
    if name != STOCK:
        choices.append({"weight_decay": 0.1, "max_grad_norm": 0.5})
    if name in WITH_AGR:
        choices += [{"second_moment": "regularized", "weight_decay": 0.1}, {"min_ndim": 0}, {"agr_steps": 2}]
    if "adan" in name:
        choices.append({"proximal": False, "weight_decay": 0.1})
    if name == "adal":
        choices.append({"decoupled": True, "weight_decay": 0.1})
    if name == "nosadam":
        choices.append({"gamma": 0.0})
    return choices


def every_way_and_rule(names):
    return pytest.mark.parametrize(
        ("name", "options"),
        [
            pytest.param(name, {**rule, **way}, id=f"{name}-{rule}-{way}")
            for name in names
            for rule in rules(name)
            for way in ways(name)
        ],
    )


def weight_and_bias(holes=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    weight, bias = (torch.randn(*shape, 2, generator=generator, dtype=dtype) for shape in ((10, 5), (10,)))
    return [Parameter(t[..., 0] if holes else t[..., 0].contiguous()) for t in (weight, bias)]


def regression(optimizer, weight, bias):
    x = torch.linspace(-1, 1, 5, dtype=weight.dtype)

    def closure():
        optimizer.zero_grad()
        loss = (weight.mv(x) + bias).square().sum()
        loss.backward()
        return loss

    return closure


def filled(params, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)
    return params


def trained(name, steps=2, shapes=((3, 4), (4,)), dtype=torch.float32, **options):
    params = [Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    optimizer = make(name, params, **options)
    for seed in range(steps):
        filled(params, seed)
        optimizer.step()
    return params, optimizer


def flat_state(optimizer):
    """Everything in the state by position of its parameter and key, whatever the parameters are."""
    return {(i, key): value for i, entry in optimizer.state_dict()["state"].items() for key, value in entry.items()}


def assert_same_state(one, other, **tolerances):
    one, other = flat_state(one), flat_state(other)
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, **tolerances)


def without_ways(group):
    return {key: value for key, value in group.items() if key not in ("foreach", "fused", "capturable", "params")}


# ---- what may be given to a constructor


@beside_torch
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (lambda p, q: p, TypeError, "iterable of Tensors or dicts"),
        (lambda p, q: [], ValueError, "empty parameter list"),
        (lambda p, q: iter(()), ValueError, "empty parameter list"),
        (lambda p, q: ["weight"], TypeError, "can only optimize Tensors"),
        (lambda p, q: [{"params": {p, q}}], TypeError, "sets"),
        (lambda p, q: [p * 2], ValueError, "non-leaf"),
        (lambda p, q: [{"params": [p]}, {"params": [p]}], ValueError, "more than one parameter group"),
        (lambda p, q: [("weight", p), q], ValueError, "names"),
        (lambda p, q: [{"params": [p]}, {"params": [("weight", q)]}], ValueError, "names"),
    ],
)
def test_what_holds_no_parameters_is_refused_as_torch_refuses_it(name, given, error, message):
    p, q = (Parameter(torch.ones(2, 2)) for _ in range(2))
    with pytest.raises(error, match=message):
        make(name, given(p, q))


@beside_torch
def test_a_parameter_listed_twice_in_a_group_is_warned_of_and_ours_refuse_it(name):
    """AdamW steps it twice."""
    p = Parameter(torch.ones(2, 2))
    refused = nullcontext() if name == STOCK else pytest.raises(ValueError, match="share memory")
    with pytest.warns(UserWarning, match="duplicate parameters"), refused:
        make(name, [p, p])


@beside_torch
@pytest.mark.parametrize(
    "given",
    [
        lambda ps: (p for p in ps),
        lambda ps: tuple(ps),
        lambda ps: {"a": ps[0], "b": ps[1]}.values(),
        lambda ps: [{"params": (p for p in ps)}],
        lambda ps: [{"params": ps[0]}, {"params": ps[1:]}],
        lambda ps: iter([{"params": ps}]),
        lambda ps: torch.nn.ParameterList(ps).parameters(),
    ],
)
def test_parameters_may_come_from_anything_that_yields_them_in_order(name, given):
    params, others = weight_and_bias(), weight_and_bias()
    optimizer, listed = make(name, given(params)), make(name, others)
    for seed in range(2):
        filled(params, seed)
        filled(others, seed)
        optimizer.step()
        listed.step()
    assert [p for group in optimizer.param_groups for p in group["params"]] == params
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@every_optimizer
def test_differentiable_is_no_option_and_no_key(name):
    """torch's has it; an optimizer of ours that took it would not be differentiated, without a word."""
    params, optimizer = trained(name)
    with pytest.raises(TypeError, match="differentiable"):
        make(name, params, differentiable=True)
    assert "differentiable" not in optimizer.defaults
    assert all("differentiable" not in group for group in optimizer.state_dict()["param_groups"])


# ---- what is computed, in every way


@every_way_and_rule([*OURS, STOCK])
def test_the_loss_falls_and_with_maximize_it_rises(name, options):
    for holes in (False, True):
        if options.get("fused") and holes:
            continue  # ours refuse it, and AdamW walks memory as if there were none, without a word (torch 2.14)
        weight, bias = weight_and_bias(holes)
        optimizer = make(name, [weight, bias], **options)
        closure = regression(optimizer, weight, bias)
        start = closure().item()
        for _ in range(5):
            optimizer.step(closure)
        assert (closure().item() > start) == options.get("maximize", False)


def five_steps(name, grouped, options, dtype):
    """A layer, a scalar and an empty tensor beside it, and a step on which nobody has a gradient."""
    torch.manual_seed(1)
    layer = torch.nn.Linear(2, 3).to(dtype)
    scalar, empty = Parameter(torch.zeros((), dtype=dtype)), Parameter(torch.zeros(0, dtype=dtype))
    params = [layer.weight, layer.bias, scalar, empty]
    groups = [{"params": params[:2], "lr": 0.02}, {"params": params[2:], "weight_decay": 0.01, "eps": 1e-6}]
    optimizer = make(name, groups if grouped else params, **options)
    x = torch.linspace(0.1, 0.6, 6, dtype=dtype).view(3, 2)
    for i in range(5):
        optimizer.zero_grad()
        if i != 2:
            (layer(x).sigmoid().sum() * (1 + scalar) + empty.sum()).backward()
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize(
    ("name", "rule"), [pytest.param(n, rule, id=f"{n}-{rule}") for n in [*OURS, STOCK] for rule in rules(n)]
)
@pytest.mark.parametrize(("grouped", "dtype"), [(False, torch.float64), (True, torch.float32)], ids=str)
def test_every_way_makes_the_same_five_steps(name, rule, grouped, dtype):
    first, *others = [
        five_steps(name, grouped, {**rule, **way}, dtype)
        for way in ways(name)
        if not (way.get("fused") and dtype == torch.float64 and name != STOCK)  # no kernel: refused
    ]
    # float32: torch's own tolerance, scaled to five steps of 1e-2 on weights of 1.
    tolerances = {"rtol": 1e-7, "atol": 1e-7} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    for params, optimizer in others:
        for p, q in zip(first[0], params, strict=True):
            torch.testing.assert_close(q, p, **tolerances)
        assert_same_state(first[1], optimizer, **tolerances)
    assert all(entry["step"] == 4 for entry in first[1].state_dict()["state"].values())


@beside_torch
def test_dtypes_may_be_mixed_in_one_list_and_none_disturbs_another(name):
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float32]
    for way in ways(name):
        if way.get("fused"):
            continue  # ours refuse the float64 one; AdamW refuses nothing, but its half-precision moments are its own rule
        options = {"lr": 0.01, "eps": 1e-4, **way}  # 1e-8 is zero in float16, in which AdamW computes
        mixed = [Parameter(torch.linspace(-1, 1, 12).view(3, 4).to(dtype)) for dtype in dtypes]
        alone = [Parameter(p.detach().clone()) for p in mixed]
        together = make(name, mixed, **options)
        apart = [make(name, [p], **options) for p in alone]
        for seed in range(3):
            filled(mixed, seed)
            for p, q in zip(mixed, alone, strict=True):
                q.grad = p.grad.clone()
            together.step()
            for optimizer in apart:
                optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(mixed, alone, strict=True)), way


@beside_torch
@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_the_default_dtype_is_no_business_of_the_step(name, default):
    """torch keeps `step` in float64 where that is the default; no parameter may notice."""
    expected, _ = trained(name, 3)
    torch.set_default_dtype(default)
    try:
        for way in ways(name):
            params, optimizer = trained(name, 3, **way)
            for p, q in zip(params, expected, strict=True):
                assert p.dtype == torch.float32
                torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
            assert optimizer.state[params[0]]["step"].dtype in (torch.float32, torch.float64)
    finally:
        torch.set_default_dtype(torch.float32)


@every_optimizer
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_tensor_learning_rate_is_the_number_in_it_in_every_way(name, shape):
    """AdamW refuses foreach=True with one unless it is capturable, and takes 1-element tensors of any shape since 2.10."""
    for way in ways(name):
        expected, _ = trained(name, 3, lr=0.25, weight_decay=0.5, **way)
        rate = torch.full(shape, 0.25)  # which float32 holds exactly
        params, optimizer = trained(name, 3, lr=rate, weight_decay=0.5, **way)
        assert optimizer.param_groups[0]["lr"] is rate, "a scheduler fills it in place"
        for p, q in zip(params, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@every_optimizer
def test_capturable_works_on_the_cpu(name):
    """AdamW fails an assertion about devices there."""
    params, optimizer = trained(name, 3, capturable=True)
    expected, _ = trained(name, 3)
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    assert optimizer.state[params[0]]["step"] == 3
    with pytest.raises((AssertionError, RuntimeError), match="capturable"):
        trained(STOCK, 1, capturable=True)


@every_optimizer
@pytest.mark.parametrize("kind", ["transposed", "holes", "expanded", "other strides", "offset", "negated", "zero"])
def test_gradients_may_lie_in_memory_as_they_like(name, kind):
    """AdamW(fused=True) is wrong for all but the last three, without a word, and raises for those (torch 2.14); its other
    ways are right."""
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(6, 6, 2, generator=generator)

    def laid(grad):
        return {
            "transposed": lambda: grad.t().contiguous().t(),
            "holes": lambda: torch.stack([grad, grad + 1], -1)[..., 0],
            "expanded": lambda: grad[:1].expand(6, 6),
            "other strides": lambda: torch.empty_strided((6, 6), (1, 6)).copy_(grad),
            "offset": lambda: torch.cat([torch.zeros(3), grad.flatten()])[3:].view(6, 6),
            "negated": lambda: torch._neg_view(-grad),
            "zero": lambda: torch._efficientzerotensor((6, 6)),
        }[kind]()

    for way in ways(name):
        if way.get("fused") and kind in ("negated", "zero"):
            continue  # their memory does not hold their elements: refused
        params, others = ([Parameter(torch.ones(6, 6))] for _ in range(2))
        one, other = make(name, params, **way), make(name, others, **way)
        for i in range(2):
            params[0].grad = laid(dense[..., i])
            others[0].grad = torch.zeros(6, 6).add_(params[0].grad)  # the same numbers, contiguous
            assert others[0].grad.is_contiguous()
            one.step()
            other.step()
        # Sums are taken in the order of memory.
        torch.testing.assert_close(params[0], others[0], rtol=1e-6, atol=1e-7)


@every_optimizer
def test_parameters_may_share_one_gradient_tensor(name):
    shared = torch.linspace(-1, 1, 12).view(3, 4)
    params, others = ([Parameter(torch.full((3, 4), float(i))) for i in range(2)] for _ in range(2))
    for p, q in zip(params, others, strict=True):
        p.grad, q.grad = shared, shared.clone()
    make(name, params, weight_decay=0.1, maximize=True).step()
    make(name, others, weight_decay=0.1, maximize=True).step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@beside_torch
def test_a_step_is_no_different_under_autocast_or_deterministic_algorithms(name):
    expected, _ = trained(name, 3, **({} if name == STOCK else {"max_grad_norm": 0.5}))
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = trained(name, 3, **({} if name == STOCK else {"max_grad_norm": 0.5}))
    torch.use_deterministic_algorithms(True)  # which fills memory that nobody has written with NaN
    try:
        deterministic, _ = trained(name, 3, **({} if name == STOCK else {"max_grad_norm": 0.5}))
    finally:
        torch.use_deterministic_algorithms(False)
    for p, q, r in zip(expected, cast, deterministic, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


# ---- gradients that are missing, or zero


@beside_torch
def test_a_parameter_without_a_gradient_is_left_alone_and_costs_nothing(name):
    for way in ways(name):
        params = [Parameter(torch.ones(2, 2)) for _ in range(3)]
        optimizer = make(name, params, weight_decay=0.1, **way)
        params[1].grad = torch.ones(2, 2)
        optimizer.step()
        assert [bool((p != 1).any()) for p in params] == [False, True, False]
        assert set(optimizer.state_dict()["state"]) == {1}


@beside_torch
def test_a_step_without_any_gradient_calls_the_closure_and_changes_nothing(name):
    params = [torch.ones(2, 2) for _ in range(2)]  # which never asked for a gradient
    optimizer = make(name, params, weight_decay=0.1)
    before = copy.deepcopy(optimizer.state_dict())
    assert optimizer.step(lambda: 7) == 7
    assert all(torch.equal(p, torch.ones(2, 2)) for p in params)
    assert optimizer.state_dict() == before


@beside_torch
@pytest.mark.parametrize("set_to_none", [True, False])
def test_cleared_gradients_are_none_or_zero_and_zero_is_a_gradient(name, set_to_none):
    params, optimizer = trained(name, 2, weight_decay=0.1)
    middle = [p.detach().clone() for p in params]
    grads = [p.grad for p in params]
    optimizer.zero_grad(set_to_none=set_to_none)
    if set_to_none:
        assert all(p.grad is None for p in params)
    else:
        assert all(p.grad is g and not g.any() for p, g in zip(params, grads, strict=True))
    optimizer.step()
    moved = [not torch.equal(p, m) for p, m in zip(params, middle, strict=True)]
    assert moved == [not set_to_none] * 2  # moments and decay go on
    assert optimizer.state[params[0]]["step"] == (2 if set_to_none else 3)


@beside_torch
def test_zero_grad_detaches_gradients_that_have_a_graph(name):
    p = Parameter(torch.ones(2, 2))
    optimizer = make(name, [p])
    p.pow(3).sum().backward(create_graph=True)
    assert p.grad.grad_fn is not None
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert p.grad.grad_fn is None
    assert not p.grad.any()


# ---- closures, modes, threads


@beside_torch
@pytest.mark.parametrize("result", [torch.tensor([1.0]), 3, None, "loss"], ids=str)
def test_what_the_closure_returns_comes_back_untouched(name, result):
    _, optimizer = trained(name, 1)
    assert optimizer.step(lambda: result) is result
    assert optimizer.step(closure=lambda: result) is result


@beside_torch
def test_a_closure_that_raises_changes_nothing(name):
    params, optimizer = trained(name, 1)
    before = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]

    def closure():
        raise ArithmeticError("diverged")

    with pytest.raises(ArithmeticError, match="diverged"):
        optimizer.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(params, before[1], strict=True))
    assert all(entry["step"] == 1 for entry in optimizer.state_dict()["state"].values())
    assert optimizer.state_dict()["param_groups"] == before[0]["param_groups"]


@beside_torch
@pytest.mark.parametrize("enabled", [True, False])
def test_the_grad_mode_is_left_as_it_was(name, enabled):
    params, optimizer = trained(name, 1)
    with torch.set_grad_enabled(enabled):
        seen = []
        optimizer.step(lambda: seen.append(torch.is_grad_enabled()))
        assert seen == [True]
        assert torch.is_grad_enabled() == enabled
    assert all(p.requires_grad and p.is_leaf for p in params)
    assert not any(value.requires_grad for value in flat_state(optimizer).values())


@beside_torch
def test_optimizers_may_step_within_backward(name):
    """One optimizer a parameter, stepped by the hook that follows its gradient: no gradient outlives its turn."""
    x = torch.linspace(-1, 1, 12).view(4, 3)

    def network():
        torch.manual_seed(2)
        return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))

    inside, outside = network(), network()
    optimizers = {p: make(name, [p]) for p in inside.parameters()}

    def step(param):
        optimizers[param].step()
        optimizers[param].zero_grad()

    for p in inside.parameters():
        p.register_post_accumulate_grad_hook(step)
    whole = [make(name, [p]) for p in outside.parameters()]
    for _ in range(3):
        inside(x).square().sum().backward()
        for optimizer in whole:
            optimizer.zero_grad()
        outside(x).square().sum().backward()
        for optimizer in whole:
            optimizer.step()
    for p, q in zip(inside.parameters(), outside.parameters(), strict=True):
        assert p.grad is None
        assert torch.equal(p, q)


@beside_torch
def test_optimizers_of_several_threads_do_not_disturb_each_other(name):
    def train(ends, i):
        ends[i] = trained(name, 20, shapes=((40 + i, 30), (1000,)))[0]

    serial, parallel = {}, {}
    for i in range(3):
        train(serial, i)
    threads = [threading.Thread(target=train, args=(parallel, i)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(3):
        for p, q in zip(serial[i], parallel[i], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)  # torch divides sums by the threads there are


# ---- groups and schedulers


@beside_torch
def test_a_group_takes_what_it_does_not_say_from_the_defaults_and_leaves_them_alone(name):
    p, q = (Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = make(name, [p], lr=0.125, weight_decay=0.5)
    before = copy.deepcopy(optimizer.defaults)
    optimizer.add_param_group({"params": q, "lr": 0.25, "note": "late"})
    first, second = (without_ways(group) for group in optimizer.param_groups)
    assert second == {**first, "lr": 0.25, "note": "late"}
    assert optimizer.defaults == before
    optimizer.param_groups[1]["weight_decay"] = 0.0
    assert optimizer.param_groups[0]["weight_decay"] == optimizer.defaults["weight_decay"] == 0.5


@beside_torch
def test_a_group_added_in_mid_run_starts_then_and_the_others_go_on(name):
    for way in ways(name):
        params, late = weight_and_bias(), weight_and_bias()
        alone, late_alone = weight_and_bias(), weight_and_bias()
        optimizer = make(name, params, **way)
        references = [make(name, alone, **way), make(name, late_alone, lr=0.05, weight_decay=0.1, **way)]
        for i in range(4):
            if i == 2:
                optimizer.add_param_group({"params": late, "lr": 0.05, "weight_decay": 0.1})
            for listed in (params, late, alone, late_alone):
                filled(listed, i)
            optimizer.step()
            for reference in references[: 1 if i < 2 else 2]:
                reference.step()
        ends = zip([*params, *late], [*alone, *late_alone], strict=True)
        assert all(torch.equal(p, q) for p, q in ends), way


@beside_torch
def test_a_group_of_its_own_rate_moves_by_it_and_a_rate_of_almost_nothing_by_nothing(name):
    weight, bias = weight_and_bias()
    still = Parameter(torch.ones(2, 3))
    optimizer = make(name, [{"params": [weight, bias], "lr": 0.01}, {"params": [still]}], lr=1e-28)
    closure = regression(optimizer, weight, bias)
    start = closure().item()
    for seed in range(10):
        closure()
        filled([still], seed)
        optimizer.step()
    assert closure().item() < start
    assert torch.equal(still, torch.ones(2, 3))


SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, step_size=3, gamma=0.5),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=8),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=20),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.001, max_lr=0.01, step_size_up=3),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.PolynomialLR(o, total_iters=9)], milestones=[3]
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
}


@every_optimizer
@pytest.mark.parametrize(
    ("scheduler", "tensor"), [*((key, False) for key in SCHEDULERS), ("exponential", True), ("one cycle", True)]
)
def test_schedulers_set_rates_and_betas_as_they_set_those_of_torch(name, scheduler, tensor):
    """Cyclic ones change the first beta too."""

    def run(name):
        weight, bias = weight_and_bias()
        rate = torch.tensor(0.02) if tensor else 0.02
        optimizer = make(name, [{"params": [weight]}, {"params": [bias], "lr": copy.copy(rate) * 0.5}], lr=rate)
        closure = regression(optimizer, weight, bias)
        start, seen = closure().item(), []
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of steps in the wrong order: the scheduler must see ours
            schedule = SCHEDULERS[scheduler](optimizer)
            for _ in range(9):
                optimizer.step(closure)
                schedule.step(*([1.0] if scheduler == "plateau" else []))
                seen.append([(float(group["lr"]), float(group["betas"][0])) for group in optimizer.param_groups])
        assert closure().item() < start
        assert all(len(group["betas"]) == len(optimizer.defaults["betas"]) for group in optimizer.param_groups)
        return seen

    ours, torchs = run(name), run(STOCK)
    if "adan" in name and scheduler != "one cycle" and scheduler != "cyclic":
        torchs = [[(rate, 0.98) for rate, _ in step] for step in torchs]
    assert [[r for r, _ in step] for step in ours] == [[r for r, _ in step] for step in torchs]
    assert [[b for _, b in step] for step in ours] == [[b for _, b in step] for step in torchs]


@beside_torch
def test_a_scheduler_that_steps_first_is_warned_of(name):
    _, optimizer = trained(name, 0)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        scheduler.step()


# ---- hooks


@beside_torch
def test_step_hooks_run_around_the_step_in_torchs_order_and_can_be_removed(name):
    params, optimizer = trained(name, 0)
    filled(params)
    calls = []

    def hook(label):
        return lambda *_: calls.append((label, torch.equal(params[0], torch.ones(3, 4))))

    handles = [
        optimizer.register_step_pre_hook(hook("pre")),
        optimizer.register_step_post_hook(hook("post")),
        register_optimizer_step_pre_hook(hook("global pre")),
        register_optimizer_step_post_hook(hook("global post")),
    ]
    try:
        optimizer.step()
        assert calls == [("global pre", True), ("pre", True), ("post", False), ("global post", False)]
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert len(calls) == 4


@beside_torch
def test_a_pre_hook_may_change_the_arguments_and_a_post_hook_sees_what_was_done(name):
    params, optimizer = trained(name, 0)
    filled(params)
    seen = []

    def before(opt, args, kwargs):
        assert args[0] is opt is optimizer  # torch hands on the bound arguments
        return args, {"closure": lambda: "of the hook"}

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(
        lambda opt, args, kwargs: seen.append((sorted(kwargs), float(opt.state[params[0]]["step"])))
    )
    assert optimizer.step() == "of the hook"
    assert seen == [(["closure"], 1.0)]


@beside_torch
def test_a_hook_that_raises_stops_the_step_before_it_counts(name):
    params, optimizer = trained(name, 0)
    filled(params)

    def refuse(*_):
        raise RuntimeError("not now")

    optimizer.register_step_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="not now"):
        optimizer.step()
    assert not optimizer.state_dict()["state"]
    assert torch.equal(params[0], torch.ones(3, 4))


@beside_torch
@pytest.mark.parametrize("prepend", [False, True])
def test_state_dict_hooks_run_in_order_and_the_last_word_is_returned(name, prepend):
    _, optimizer = trained(name, 1)
    calls = []
    for label in ("first", "second"):
        optimizer.register_state_dict_pre_hook(lambda opt, label=label: calls.append(label), prepend=prepend)
    optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "note": "one"}, prepend=prepend)
    optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "note": "two"}, prepend=prepend)
    state = optimizer.state_dict()
    assert calls == (["second", "first"] if prepend else ["first", "second"])
    assert state["note"] == ("one" if prepend else "two")
    assert set(state) == {"state", "param_groups", "note"}


@beside_torch
@pytest.mark.parametrize("prepend", [False, True])
def test_loading_hooks_run_in_order_before_and_after_the_load_and_once_each(name, prepend):
    _, saved = trained(name, 2)
    _, optimizer = trained(name, 0)
    calls = []

    def label(text):
        return lambda opt, *given: calls.append((text, len(opt.state)))

    for text in ("pre 1", "pre 2"):
        optimizer.register_load_state_dict_pre_hook(label(text), prepend=prepend)
    for text in ("post 1", "post 2"):
        optimizer.register_load_state_dict_post_hook(label(text), prepend=prepend)
    for _ in range(2):
        calls.clear()
        optimizer.state.clear()
        optimizer.load_state_dict(saved.state_dict())
        texts = ["pre 2", "pre 1", "post 2", "post 1"] if prepend else ["pre 1", "pre 2", "post 1", "post 2"]
        assert calls == list(zip(texts, [0, 0, 2, 2], strict=True))


@beside_torch
def test_a_loading_hook_that_raises_leaves_no_hook_of_ours_behind(name):
    _, saved = trained(name, 2)
    _, optimizer = trained(name, 0)
    counts = [len(optimizer._optimizer_load_state_dict_pre_hooks), len(optimizer._optimizer_load_state_dict_post_hooks)]

    def refuse(opt, state):
        raise OSError("disk")

    handle = optimizer.register_load_state_dict_pre_hook(refuse)
    with pytest.raises(OSError, match="disk"):
        optimizer.load_state_dict(saved.state_dict())
    handle.remove()
    assert not optimizer.state
    optimizer.load_state_dict(saved.state_dict())
    assert counts == [
        len(optimizer._optimizer_load_state_dict_pre_hooks),
        len(optimizer._optimizer_load_state_dict_post_hooks),
    ]


# ---- states


@beside_torch
def test_equal_runs_of_different_parameters_have_equal_state_dicts(name):
    (_, one), (_, other) = trained(name, 3), trained(name, 3)
    assert one.state_dict()["param_groups"] == other.state_dict()["param_groups"]
    assert_same_state(one, other, rtol=0, atol=0)


@beside_torch
def test_a_group_listed_twice_is_written_the_same_way_twice(name):
    _, optimizer = trained(name, 1)
    (group,) = optimizer.state_dict()["param_groups"]
    optimizer.param_groups.extend(optimizer.param_groups)
    assert optimizer.state_dict()["param_groups"] == [group, group]


@beside_torch
def test_a_state_whose_steps_are_plain_numbers_is_loaded(name):
    """Files of torch before 1.12 have them."""
    params, optimizer = trained(name, 3)
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry["step"] = 3
    other_params, other = trained(name, 3)
    other.load_state_dict(state)
    for listed, stepped in ((params, optimizer), (other_params, other)):
        filled(listed, 9)
        stepped.step()
    assert all(torch.equal(p, q) for p, q in zip(params, other_params, strict=True))
    assert isinstance(other.state[other_params[0]]["step"], torch.Tensor)
    assert other.state[other_params[0]]["step"] == 4


@beside_torch
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("way", [{}, {"foreach": True}], ids=str)
def test_loading_leaves_the_dtype_of_the_step_alone(name, dtype, way):
    """In bfloat16 it would stop at 256. (Moments: ours come back in float32, AdamW's are cast to the parameter's.)"""
    _, optimizer = trained(name, 1, dtype=dtype, **way)
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry["step"] = torch.tensor(1001.0)
    params, other = trained(name, 0, dtype=dtype, **way)
    other.load_state_dict(state)
    filled(params)
    other.step()
    assert other.state[params[0]]["step"].dtype == torch.float32
    assert other.state[params[0]]["step"] == 1002


@beside_torch
def test_unknown_keys_of_a_state_dict_and_of_its_groups_do_not_matter(name):
    _, optimizer = trained(name, 2)
    state = copy.deepcopy(optimizer.state_dict())
    state["epoch"] = 3
    state["param_groups"][0]["schedule"] = {"kind": "cosine"}
    params, other = trained(name, 0)
    other.load_state_dict(state)
    assert other.param_groups[0]["schedule"] == {"kind": "cosine"}
    assert set(other.state_dict()) == {"state", "param_groups"}
    filled(params)
    other.step()
    assert other.state[params[0]]["step"] == 3


@beside_torch
@pytest.mark.parametrize("wrong", ["groups", "sizes"])
def test_a_state_of_other_groups_is_refused_and_nothing_changes(name, wrong):
    _, saved = trained(name, 1)
    state = copy.deepcopy(saved.state_dict())
    if wrong == "groups":
        state["param_groups"].append({**state["param_groups"][0], "params": []})
    else:
        state["param_groups"][0]["params"].pop()
    _, optimizer = trained(name, 0)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="group"):
        optimizer.load_state_dict(state)
    assert optimizer.state_dict() == before


NAMES = ["layer.weight", "layer.bias"]


def named(name, names=NAMES, **options):
    params = [Parameter(torch.ones(3, 4)), Parameter(torch.ones(4))]
    given = params if names is None else list(zip(names, params, strict=True))
    return params, make(name, given, **options)


@beside_torch
def test_named_parameters_keep_their_names_in_groups_and_states(name):
    params, optimizer = named(name)
    assert optimizer.param_groups[0]["params"] == params
    assert optimizer.param_groups[0]["param_names"] == NAMES
    optimizer.add_param_group({"params": [("late", Parameter(torch.ones(2)))]})
    assert [group["param_names"] for group in optimizer.state_dict()["param_groups"]] == [NAMES, ["late"]]
    filled(params)
    optimizer.step()
    plain, without = named(name, None)
    filled(plain)
    without.step()
    assert all(torch.equal(p, q) for p, q in zip(params, plain, strict=True))
    with pytest.raises(ValueError, match="names"):
        optimizer.add_param_group({"params": [Parameter(torch.ones(2))]})
    assert len(optimizer.param_groups) == 2


@beside_torch
@copied
def test_names_survive_copies(name, copied):
    params, optimizer = named(name)
    filled(params)
    optimizer.step()
    assert copied(optimizer).param_groups[0]["param_names"] == NAMES


@beside_torch
@pytest.mark.parametrize(
    ("saved", "own", "expected"),
    [(NAMES, NAMES, NAMES), (NAMES, None, NAMES), (None, NAMES, NAMES), (["a", "b"], NAMES, ["a", "b"]), (None,) * 3],
)
def test_states_with_and_without_names_load_into_each_other(name, saved, own, expected):
    """Loaded names win, and names that the file lacks stay."""
    params, optimizer = named(name, saved)
    filled(params)
    optimizer.step()
    others, other = named(name, own)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0].get("param_names") == expected
    filled(others)
    other.step()
    assert other.state[others[0]]["step"] == 2


# ---- copies


@beside_torch
@copied
def test_copies_have_every_public_attribute_key_and_default(name, copied):
    """Hooks are left behind, as torch leaves them, and the copy steps and takes new ones."""
    params, optimizer = trained(name, 2)
    calls = []
    handle = optimizer.register_step_post_hook(calls.append if copied is copy.deepcopy else print)
    handle.remove()
    clone = copied(optimizer)
    public = [{key for key in vars(o) if not key.startswith("_")} for o in (optimizer, clone)]
    assert public[0] == public[1]
    assert_same_state(optimizer, clone, rtol=0, atol=0)
    clone.register_step_post_hook(lambda *_: calls.append("clone"))
    clone.step()
    assert calls == ["clone"]
    assert optimizer.state[params[0]]["step"] == 2  # nothing is shared


@beside_torch
@copied
def test_a_copied_optimizer_can_be_saved_loaded_printed_and_extended(name, copied):
    _, optimizer = trained(name, 2)
    clone = copied(optimizer)
    clone.load_state_dict(optimizer.state_dict())
    late = Parameter(torch.ones(2, 2))
    clone.add_param_group({"params": [late]})
    filled([late])
    clone.step()
    assert clone.state[late]["step"] == 1
    assert repr(clone).count("Parameter Group") == 2
    assert copied(clone).state_dict()["param_groups"] == clone.state_dict()["param_groups"]


@beside_torch
def test_a_model_and_its_optimizer_copied_together_stay_together(name):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = make(name, model.parameters())
    filled(list(model.parameters()))
    optimizer.step()
    twin, other = copy.deepcopy((model, optimizer))
    filled(list(twin.parameters()))  # torch copies no gradients
    assert other.param_groups[0]["params"] == list(twin.parameters())
    before = model.weight.detach().clone()
    other.step()
    assert torch.equal(model.weight, before)
    assert not torch.equal(twin.weight, before)


# ---- memory


@beside_torch
def test_an_optimizer_is_freed_with_its_last_reference(name):
    for kind in ("stepped", "loaded"):
        params, optimizer = trained(name, 2)
        if kind == "loaded":
            optimizer.load_state_dict(optimizer.state_dict())
        gone = [weakref.ref(optimizer), *(weakref.ref(p) for p in params)]
        gc.disable()  # nobody may have to look for cycles
        try:
            del optimizer, params
            assert all(ref() is None for ref in gone)
        finally:
            gc.enable()


@beside_torch
def test_no_gradient_outlives_zero_grad(name):
    for way in ways(name):
        params, optimizer = trained(name, 2, **way)
        grads = [weakref.ref(p.grad) for p in params]
        storages = [weakref.ref(p.grad.untyped_storage()) for p in params]
        optimizer.zero_grad()
        assert all(ref() is None for ref in [*grads, *storages]), way


def peak_extra_bytes(step):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@every_optimizer
def test_a_step_needs_little_memory_and_foreach_a_few_times_the_parameters(name):
    """AdamW's foreach takes once the parameters; `foreach=True` of ours works on whole lists likewise."""
    size, limit = 8 * 2**20, 4 * 2**20 + 4096  # the design's budget, and a few numbers
    for options, allowed in [
        ({}, limit),
        ({"weight_decay": 0.1, "max_grad_norm": 1.0}, limit),
        ({"foreach": True}, 3 * size + 4096),
    ]:
        params, optimizer = trained(name, 1, shapes=((2048, 1024),), **options)
        assert params[0].numel() * 4 == size
        assert peak_extra_bytes(optimizer.step) <= allowed, options


@beside_torch
def test_parameters_and_states_may_move_to_shared_memory_in_mid_run(name):
    """Hogwild's workers share them; `share_memory_` puts the numbers at another address under the same tensors."""
    for way in ways(name):
        params, optimizer = trained(name, 2, **way)
        others, other = trained(name, 2, **way)
        for p in params:
            p.share_memory_()
            for value in optimizer.state[p].values():
                value.share_memory_()
        addresses = {key: value.data_ptr() for key, value in flat_state(optimizer).items()}
        for seed in (7, 8):
            filled(params, seed)
            filled(others, seed)
            optimizer.step()
            other.step()
        assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True)), way
        assert_same_state(optimizer, other, rtol=0, atol=0)
        assert all(p.is_shared() for p in params)
        for key, value in flat_state(optimizer).items():
            if name == STOCK or value.ndim:  # ours count the steps of all tensors in one vector of each process
                assert value.is_shared(), (way, key)
                assert value.data_ptr() == addresses[key], (way, key)


@beside_torch
def test_swapped_tensors_train_on_as_themselves(name):
    """`torch.utils.swap_tensors`, which module.to may use, refuses tensors that somebody holds a weak reference to."""
    params, optimizer = trained(name, 2)
    others, other = trained(name, 2)
    replacement = Parameter(torch.full((3, 4), 3.0))
    optimizer.zero_grad()
    torch.utils.swap_tensors(params[0], replacement)
    with torch.no_grad():
        others[0].fill_(3.0)
    filled(params, 5)
    filled(others, 5)
    optimizer.step()
    other.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    assert torch.equal(replacement.detach(), trained(name, 2)[0][0])


# ---- what others see of a step


@beside_torch
def test_profiles_name_the_step_and_zero_grad_after_the_class(name):
    params, optimizer = trained(name, 1)
    filled(params)
    with torch.autograd.profiler.profile() as profiler:
        optimizer.step()
        optimizer.zero_grad()
    cls = class_of(name).__name__
    names = [event.name for event in profiler.function_events if event.name.startswith("Optimizer.")]
    assert names == [f"Optimizer.step#{cls}.step", f"Optimizer.zero_grad#{cls}.zero_grad"]


@beside_torch
def test_printing_shows_every_option_of_every_group(name):
    p, q = (Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = make(name, [{"params": [p], "lr": 0.5}, {"params": [q]}])
    text = repr(optimizer)
    assert text.startswith(f"{class_of(name).__name__} (\nParameter Group 0\n")
    assert "Parameter Group 1" in text
    for group in optimizer.param_groups:
        for key, value in group.items():
            assert key == "params" or f"    {key}: {value}\n" in text


@every_optimizer
def test_a_grad_scaler_unscales_first_and_skips_steps_that_overflowed(name):
    weight, others = Parameter(torch.ones(3, 4)), Parameter(torch.ones(3, 4))
    optimizer, plain = make(name, [weight], lr=0.1), make(name, [others], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for i in range(4):
        factor = torch.linspace(-1, 1, 12).view(3, 4) * (float("inf") if i == 1 else 1.0)
        optimizer.zero_grad()
        scaler.scale((weight * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        if i != 1:
            others.grad = factor
            plain.step()
    assert optimizer.state[weight]["step"] == 3
    assert optimizer.param_groups[0].get("agr_step", 3) == 3
    assert torch.equal(weight, others)  # scales are powers of two


@every_optimizer
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("unscaled_before", [False, True])
def test_a_step_takes_scale_and_overflow_from_a_grad_scaler_as_torchs_fused_adamw(name, max_grad_norm, unscaled_before):
    class Fused(class_of(name)):
        _step_supports_amp_scaling = True  # what fused=True says where there is a kernel

    weights = [Parameter(torch.ones(3, 4)) for _ in range(3)]
    options = {} if max_grad_norm is None else {"max_grad_norm": max_grad_norm}
    scaled, plain = Fused([weights[0]], lr=0.1, **options), make(name, [weights[1]], lr=0.1, **options)
    torchs = torch.optim.AdamW([weights[2]], lr=0.1, fused=True)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in range(2)]
    for i in range(6):
        factor = torch.linspace(-1, 1, 12).view(3, 4) * (float("inf") if i in (1, 4) else 1.0)
        for optimizer, scaler in zip((scaled, torchs), scalers, strict=True):
            weight = optimizer.param_groups[0]["params"][0]
            optimizer.zero_grad()
            scaler.scale((weight * factor).sum()).backward()
            if unscaled_before:
                scaler.unscale_(optimizer)
            given = weight.grad.clone()
            before = weight.detach().clone()
            scaler.step(optimizer)
            if optimizer is scaled:
                assert torch.equal(weight.grad, given)  # left as it is
            assert torch.equal(weight, before) == (i in (1, 4))
            scaler.update()
        assert scaled.state[weights[0]]["step"] == torchs.state[weights[2]]["step"]
        assert (
            scaled.param_groups[0].get("agr_step", scaled.state[weights[0]]["step"]) == torchs.state[weights[2]]["step"]
        )
        if i not in (1, 4):
            weights[1].grad = factor
            plain.step()
    assert scaled.state[weights[0]]["step"] == 4
    assert torch.equal(weights[0], weights[1])  # scales are powers of two


def test_only_an_optimizer_that_was_made_fused_is_told_of_an_overflow():
    assert all(not make(name, [Parameter(torch.ones(2))])._step_supports_amp_scaling for name in OURS)
    assert make("agr_adamw", [Parameter(torch.ones(2))], fused=True)._step_supports_amp_scaling


@beside_torch
def test_averaged_models_and_optimizers_of_subclasses_work(name):
    """What reads `optimizer.param_groups`, `defaults` and `state`, and a subclass with options and a step of its own."""

    class Doubled(class_of(name)):
        def step(self, closure=None):
            super().step(closure)
            return super().step()

    model = torch.nn.Linear(3, 2)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    optimizer = Doubled(model.parameters(), lr=0.5)
    swa = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=1)
    filled(list(model.parameters()))
    optimizer.step()
    averaged.update_parameters(model)
    swa.step()
    assert optimizer.state[model.weight]["step"] == 2
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert torch.equal(averaged.module.weight, model.weight)


@beside_torch
def test_a_partial_of_the_class_is_a_class_to_whoever_makes_optimizers(name):
    params = weight_and_bias()
    optimizer = functools.partial(class_of(name), lr=0.5)(params)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.defaults["lr"] == 0.5
