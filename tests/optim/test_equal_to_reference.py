"""Every optimizer, in every way of computing it, against the papers' rules in float64 over 100 steps."""

import functools

import pytest
import torch
from oracle import OURS, PLAIN, as_parameters, gradients, initial, run_optimizer, run_reference

from agr_hf.optim.reference import psi
from agr_hf.optim.registry import OPTIMIZERS

STEPS = 100
LR = 1e-2

# Largest difference of a parameter of size about 1 after 100 steps of 1e-2.
# float64: rounding of 100 steps, some 1e-14; a factor 100 for the cancellation in ACProp's g - m.
# float32: 100 roundings of 6e-8 make 6e-6 in the parameter; the moments' own roundings at most double that.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5}
# The reference rounds its parameters after each step as a half-precision parameter must, and maths and state of the
# optimizer are float32. What differs is which way a value half-way between two neighbours went: such a parameter is one
# neighbour off from then on. At most 2 neighbours (epsilon of the dtype, times the largest parameter, 5), and for one
# in fifty parameters at most.
HALF = {torch.bfloat16: 2**-7, torch.float16: 2**-10}

VARIANTS = {
    "default": {},
    "foreach": {"foreach": True},
    "for-loop": {"foreach": False},
    "capturable": {"capturable": True},
    "capturable-foreach": {"capturable": True, "foreach": True},
}
OPTIONS = [
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "max_grad_norm": 1.0, "maximize": True},
]
OPTIONS_OF = {
    "adal": [{"weight_decay": 0.1, "decoupled": True}],
    "adan": [{"weight_decay": 0.1, "proximal": False}],
    "nosadam": [{"gamma": 0.5}],
}
for agr_name in PLAIN:
    OPTIONS_OF[agr_name] = [
        {"second_moment": "regularized", "weight_decay": 0.1},
        {"second_moment": "regularized", "min_ndim": 0, "max_grad_norm": 1.0},
        {"min_ndim": 0},
        {"agr_steps": 30, "weight_decay": 0.1},
        {"agr": False},
        {"betas": (0.0, 0.9, 0.9) if agr_name == "agr_adan" else (0.0, 0.9)},
    ]
BASE = [(name, options, variant) for name in OURS for options in OPTIONS for variant in VARIANTS]
SPECIAL = [
    (name, options, variant)
    for name in OPTIONS_OF
    for options in OPTIONS_OF[name]
    for variant in ["default", "foreach"]
]


def difference(params, wanted):
    return torch.cat([(p.detach().double() - w).abs().flatten() for p, w in zip(params, wanted, strict=True)])


@functools.cache
def reference_run(name, options, dtype):
    """Start, gradients and end of a run; options as a tuple of pairs."""
    thetas = [theta.to(dtype).double() for theta in initial()]
    steps = [[g.to(dtype).double() for g in grads] for grads in gradients(STEPS)]
    return thetas, steps, run_reference(name, thetas, steps, lr=LR, **dict(options))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "nhwc"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("name", "options", "variant"), BASE + SPECIAL, ids=str)
def test_optimizer_equals_the_papers_rule(name, options, dtype, memory_format, variant):
    thetas, steps, wanted = reference_run(name, tuple(options.items()), dtype)
    params = as_parameters(thetas, dtype, memory_format)
    run_optimizer(OPTIMIZERS[name].cls(params, lr=LR, **options, **VARIANTS[variant]), params, steps)
    assert difference(params, wanted).max() < TOLERANCE[dtype]
    moved = difference(params, thetas)
    assert moved.median() > 100 * TOLERANCE[dtype]  # or the comparison would show nothing


@pytest.mark.parametrize("variant", ["default", "foreach", "for-loop"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "nhwc"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", OURS)
def test_half_precision_parameters_follow_the_rule_to_a_neighbouring_value(name, dtype, memory_format, variant):
    def rounded(theta):
        return theta.to(dtype).double()

    thetas = [rounded(theta) for theta in initial()]
    steps = [[rounded(g) for g in grads] for grads in gradients(STEPS)]
    wanted = run_reference(name, thetas, steps, lr=LR, weight_decay=0.1, rounded=rounded)
    params = as_parameters(thetas, dtype, memory_format)
    optimizer = OPTIMIZERS[name].cls(params, lr=LR, weight_decay=0.1, **VARIANTS[variant])
    run_optimizer(optimizer, params, steps)
    off = difference(params, wanted)
    assert off.max() <= 2 * 5 * HALF[dtype]
    assert (off > 0).double().mean() < 0.02
    assert all(
        value.dtype == torch.float32
        for state in optimizer.state.values()
        for key, value in state.items()
        if value.ndim > 0
    )


@pytest.mark.parametrize("name", OURS)
def test_large_tensors_cut_into_blocks_equal_the_rule(name, monkeypatch):
    import agr_hf.optim.backends.lists
    import agr_hf.optim.norms

    monkeypatch.setattr(
        agr_hf.optim.backends.lists, "BLOCK", 50
    )  # several blocks a tensor, and several tensors a block
    monkeypatch.setattr(agr_hf.optim.norms, "BLOCK", 50)
    steps = list(gradients(STEPS))
    wanted = run_reference(name, initial(), steps, lr=LR, weight_decay=0.1)
    params = as_parameters(initial())
    run_optimizer(OPTIMIZERS[name].cls(params, lr=LR, weight_decay=0.1), params, steps)
    assert difference(params, wanted).max() < TOLERANCE[torch.float64]


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda g: g.to(memory_format=torch.channels_last) if g.ndim == 4 else g, id="nhwc-gradient"),
        pytest.param(lambda g: g.repeat_interleave(2, -1)[..., ::2] if g.ndim else g, id="gradient-with-holes"),
        pytest.param(lambda g: g.t().contiguous().t() if g.ndim == 2 else g, id="transposed-gradient"),
    ],
)
def test_gradients_in_another_memory_order_equal_the_rule(name, layout):
    steps = list(gradients(STEPS))
    wanted = run_reference(name, initial(), steps, lr=LR)
    params = as_parameters(initial())
    run_optimizer(OPTIMIZERS[name].cls(params, lr=LR), params, steps, layout)
    assert difference(params, wanted).max() < TOLERANCE[torch.float64]


@pytest.mark.parametrize("name", OURS)
def test_parameters_that_are_strided_views_are_updated_in_place(name):
    steps = list(gradients(10))
    wanted = run_reference(name, initial(), steps, lr=LR)
    storages = [theta.repeat_interleave(2, -1) if theta.ndim else theta.clone() for theta in initial()]
    params = [torch.nn.Parameter(s[..., ::2] if s.ndim else s) for s in storages]
    run_optimizer(OPTIMIZERS[name].cls(params, lr=LR), params, steps)
    assert difference(params, wanted).max() < TOLERANCE[torch.float64]
    assert params[2].data_ptr() == storages[2].data_ptr()
    assert torch.equal(storages[2][..., 1::2], initial()[2])  # the holes belong to somebody else


def test_adal_as_printed_differs_from_the_optimizer_by_its_epsilon_only():
    from agr_hf.optim import reference

    theta, g = initial()[2], next(iter(gradients(1)))[2]
    printed = reference.adal_as_printed(theta, g, {}, 1, alpha=1e-3, betas=(0.9, 0.999), eps=0.0)
    run = reference.adal(theta, g, {}, 1, lr=1e-3, betas=(0.9, 0.999), eps=0.0, weight_decay=0.0)
    torch.testing.assert_close(printed, run, rtol=0, atol=1e-12)
    at_zero = reference.adal_as_printed(theta, 0 * g, {}, 1, alpha=1e-3, betas=(0.9, 0.999), eps=1e-8)
    assert at_zero.isnan().all()  # inf * 0, why the optimizer does not follow the print


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("size", [1e-36, 1e30])
def test_gradients_of_extreme_size_follow_the_rule(name, size):
    """At 1e-36 AGRAdamW's fold of Psi into the momentum would overflow float32; at 1e30 g^2 does, as in torch."""
    thetas, steps = initial(), [[size * g for g in grads] for grads in gradients(5)]
    options = {"lr": LR, "eps": 0.0 if size < 1 else 1e-8, "weight_decay": 0.0}
    params = as_parameters(thetas, torch.float32)
    optimizer = OPTIMIZERS[name].cls(params, **options)
    run_optimizer(optimizer, params, steps)
    plain = as_parameters(thetas, torch.float32)
    baseline = OPTIMIZERS[name].cls(plain, agr=False, **options)
    run_optimizer(baseline, plain, steps)
    # Momentum in units of the gradient: the rule's, and not the baseline's.
    want = [torch.zeros_like(theta) for theta in thetas]
    for grads in steps:
        for i, g in enumerate(grads):
            want[i] = 0.9 * want[i] + 0.1 * (psi(g) if g.ndim >= 2 else g)
    if name != "agr_adan":
        for p, w in zip(params, want, strict=True):
            torch.testing.assert_close(optimizer.state[p]["exp_avg"].double() / size, w / size, rtol=1e-4, atol=1e-4)
    weight, plain_weight = optimizer.state[params[2]]["exp_avg"], baseline.state[plain[2]]["exp_avg"]
    assert ((weight - plain_weight).abs() > 1e-3 * plain_weight.abs()).any()
