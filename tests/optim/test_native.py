"""The native step of the CPU: the same numbers as the lists, whatever the sizes, types, threads and instructions."""

import math
import multiprocessing
import os
import threading
import time
from array import array

import pytest
import torch
from oracle import run_reference

from agr_hf import AGRAdamW
from agr_hf.environment import describe_backends, explain_slow_steps
from agr_hf.optim import part
from agr_hf.optim.backends import look as looks
from agr_hf.optim.backends import native, tables
from agr_hf.optim.registry import OPTIMIZERS

pytestmark = pytest.mark.skipif(bool(native.WHY_NOT), reason=f"the native step was not built: {native.WHY_NOT}")

NAMES = [name for name, info in OPTIMIZERS.items() if getattr(info.cls, "native_rule", None)]
CHUNK, RUN = 65_536, 131_072  # of native.c
SHAPES = [
    (0, 3),
    (1, 1),
    (3, 5),
    (4, 4),
    (17, 1),
    (2, 15),
    (8, 4, 3, 3),
    (1, CHUNK - 1),
    (1, CHUNK),
    (1, CHUNK + 1),
    (5,),
]
MIXES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
OPTIONS = [{}, {"weight_decay": 0.1, "max_grad_norm": 0.5}, {"weight_decay": 0.1, "maximize": True}]


def parameters(shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def give_gradients(params, seed, dtype=None):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        grad = torch.randn(param.shape, generator=generator) ** 3
        if dtype is not None and dtype != param.dtype:
            param.grad_dtype = None  # any dtype
        param.grad = grad.to(dtype or param.dtype)


def train(name, shapes, *, steps=3, dtype=torch.float32, grad_dtype=None, threads=2, **options):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        params = parameters(shapes, dtype)
        optimizer = OPTIMIZERS[name].cls(params, lr=1e-2, **options)
        for seed in range(steps):
            give_gradients(params, seed, grad_dtype)
            optimizer.step()
    finally:
        torch.set_num_threads(before)
    return params, optimizer


def bits(params, optimizer):
    return [*params, *(value for state in optimizer.state.values() for value in state.values())]


def assert_same_bits(one, other):
    assert all(torch.equal(a, b) for a, b in zip(bits(*one), bits(*other), strict=True))


@pytest.mark.parametrize("instructions", ["avx512", "avx2", "baseline"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_native_step_equals_the_lists_at_odd_sizes(name, mix, options, instructions):
    dtype, grad_dtype = mix
    if grad_dtype != dtype and not hasattr(torch.nn.Parameter(torch.ones(1)), "grad_dtype"):
        pytest.skip("this torch has no gradients of another dtype than their parameter (grad_dtype, torch 2.10)")
    try:
        native.select_instructions(instructions)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        params, optimizer = train(name, SHAPES, dtype=dtype, grad_dtype=grad_dtype, **options)
    finally:
        native.select_instructions()
    assert [type(part).__name__ for part in optimizer.plan.parts] == ["NativePart"]
    lists, other = train(name, SHAPES, dtype=dtype, grad_dtype=grad_dtype, fused=False, **options)
    assert [type(part).__name__ for part in other.plan.parts] == ["ListsPart"]
    # bfloat16 has 8 bits: a parameter that lay half-way between two neighbours may be one off.
    tolerance = {"rtol": 2e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-3}
    for p, q in zip(params, lists, strict=True):
        torch.testing.assert_close(p, q, **tolerance)
    for p, q in zip(params, lists, strict=True):
        for key in optimizer.state_keys:
            wanted = other.state[q][key]
            largest = wanted.abs().max().item() if wanted.numel() else 0.0  # what cancels in a moment is of that size
            torch.testing.assert_close(optimizer.state[p][key], wanted, rtol=2e-4, atol=1e-6 * (1 + largest))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_threads_gives_the_same_bits(name, options):
    shapes = [*SHAPES, (RUN + 7, 2), (3, RUN)]  # several runs, and tensors longer than one
    one, *others = [train(name, shapes, threads=threads, steps=2, **options) for threads in (1, 2, 3, 2)]
    for other in others:
        assert_same_bits(one, other)


def test_threads_of_its_own_give_the_bits_of_openmps(monkeypatch):
    shapes = [(CHUNK, 9), *SHAPES]
    usual = train("agr_adamw", shapes, max_grad_norm=1.0)
    native._native.use_openmp(None)
    try:
        assert_same_bits(usual, train("agr_adamw", shapes, max_grad_norm=1.0))
    finally:
        native.find_openmp()


@pytest.mark.parametrize("name", NAMES)
def test_a_thousand_steps_stay_with_the_rule_in_float64(name):
    shapes, lr = [(33, 17), (17,)], 1e-3
    params = parameters(shapes)
    thetas = [param.detach().double() for param in params]

    def gradients():
        generator = torch.Generator().manual_seed(1)
        for _ in range(1000):
            yield [torch.randn(shape, generator=generator).double() for shape in shapes]

    wanted = run_reference(name, thetas, gradients(), lr=lr)
    optimizer = OPTIMIZERS[name].cls(params, lr=lr)
    for grads in gradients():
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.float()
        optimizer.step()
    off = [(p.double() - w).abs() / w.abs().clamp(min=1e-2) for p, w in zip(params, wanted, strict=True)]
    largest = max(one.max().item() for one in off)
    assert largest < 1e-4  # seen: 3e-5; a thousand roundings of 6e-8 add up to 6e-5 at the worst


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "grad",
    [
        torch.zeros(70, 3),
        torch.full((70, 3), 1e-40),  # denormal
        torch.full((70, 3), 3e38),  # whose sum leaves float32
        torch.full((70, 3), 1e20),  # whose square does, and (1 - beta2) times it does not
        torch.full((70, 3), math.inf),
        torch.tensor([[math.nan] + [1.0] * 208]),
        torch.tensor([[-math.inf] + [1.0] * 208]),
    ],
    ids=["zero", "denormal", "largest", "large square", "infinite", "one NaN", "one infinity"],
)
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_extreme_gradients_do_what_they_do_in_lists(name, grad, max_grad_norm):
    ends = []
    for fused in (None, False):
        param = torch.nn.Parameter(torch.ones_like(grad))
        optimizer = OPTIMIZERS[name].cls([param], lr=1e-2, fused=fused, max_grad_norm=max_grad_norm)
        for _ in range(3):
            param.grad = grad.clone()
            optimizer.step()
        ends.append([param, *(optimizer.state[param][key] for key in optimizer.state_keys)])
    # Lists divide by a float32: of a norm beyond its range no share is taken, here 1 in 210.
    rtol = 1e-2 if grad.abs().sum() == math.inf and grad.isfinite().all() else 1e-4
    # Of clipped gradients, Adan's difference of two equal ones is a rounding of 1/15.
    atol = 1e-8 if max_grad_norm else 1e-30
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol, equal_nan=True)


def test_the_floating_point_mode_of_the_process_is_the_callers(monkeypatch):
    """-ffast-math would set flush-to-zero for the whole process when the extension is loaded."""
    assert torch.tensor([1e-40]).mul(1.0).item() > 0
    shapes = [(CHUNK, 4)]

    def step(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        (param,) = parameters(shapes)
        param.grad = torch.full_like(param, 1e-39)
        optimizer = AGRAdamW([param], lr=1.0, eps=1e-30)
        optimizer.step()
        torch.set_num_threads(before)
        return optimizer.state[param]["exp_avg"]

    usual = [step(threads) for threads in (1, 2)]
    assert torch.equal(*usual)
    assert (usual[0] > 0).all()
    if not torch.set_flush_denormal(True):
        return  # this processor cannot
    try:
        flushed = [step(threads) for threads in (1, 2)]
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(*flushed)
    assert (flushed[0] == 0).all()


def test_optimizers_in_several_python_threads_do_not_disturb_each_other():
    shapes = [(CHUNK, 2), (64, 64)]
    alone = train("agr_adamw", shapes, steps=5)
    runs = [None] * 4

    def work(i):
        runs[i] = train("agr_adamw", shapes, steps=5)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for run in runs:
        assert_same_bits(alone, run)


def _step_in_child(queue):
    torch.get_num_threads = lambda: 2
    params, _ = train("agr_adamw", [(CHUNK, 4)], threads=1)
    torch.set_num_threads(1)
    queue.put(params[0].detach().double().sum().item())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_process_steps_with_threads_of_its_own():
    """OpenMP's threads do not survive a fork, and waiting for them would not end."""
    params, _ = train("agr_adamw", [(CHUNK, 4)])  # with OpenMP's threads, which the child does not have
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    # torch's own operations would wait in the child too: one thread for them, and two for the step.
    child = context.Process(target=_step_in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == params[0].detach().double().sum().item()
    child.join(10)


def test_the_plan_is_kept_while_gradients_come_and_go():
    params = parameters([(4, 4), (3,), (2, 2)])
    optimizer = AGRAdamW(params, lr=1e-2)
    give_gradients(params, 0)
    optimizer.step()
    plan = optimizer.plan
    for seed in range(1, 4):
        optimizer.zero_grad()
        give_gradients(params[: 1 + seed % 3], seed)
        optimizer.step()
        assert optimizer.plan is plan
    params[0].data = params[0].data.clone()
    optimizer.step()
    assert optimizer.plan is plan  # a new address is read, and needs no new plan
    params[0].data = params[0].data.t()
    optimizer.step()
    assert optimizer.plan is not plan


@pytest.mark.parametrize("name", NAMES)
def test_each_parameter_counts_the_steps_in_which_it_has_a_gradient(name):
    found = []
    for fused in (None, False):
        params = parameters([(4, 4), (3,), (2, 2)])
        optimizer = OPTIMIZERS[name].cls(params, lr=1e-2, fused=fused)
        for step in range(6):
            optimizer.zero_grad()
            give_gradients(params[: 1 + step % 3], step)
            optimizer.step()
        assert [float(optimizer.state[param]["step"]) for param in params] == [6, 4, 2]
        found.append(params)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


def test_steps_are_the_same_where_torch_offers_no_functions_to_look(monkeypatch):
    wanted = train("agr_adan", [(3, 3), (5,)])[0]
    monkeypatch.setattr(tables, "look", looks.look_in_python)
    monkeypatch.setattr(tables, "describe", looks.describe_in_python)
    monkeypatch.setattr(part, "read_grads", looks.read_grads_in_python)
    found, optimizer = train("agr_adan", [(3, 3), (5,)])
    assert [type(part).__name__ for part in optimizer.plan.parts] == ["NativePart"]
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_without_the_extension_the_lists_serve_and_it_is_said_once(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(native, "WHY_NOT", f"no compiler ({tmp_path}/backends/__init__.py)")
    monkeypatch.setattr(native, "_said", False)
    for _ in range(2):
        _, optimizer = train("agr_adamw", [(3, 3)])
        assert [type(part).__name__ for part in optimizer.plan.parts] == ["ListsPart"]
    said = [record.message for record in caplog.records if "without its native CPU step" in record.message]
    assert len(said) == 1
    assert "no compiler" in said[0]
    assert describe_backends()["native"]["available"] is False
    assert str(tmp_path) not in str(describe_backends())
    with pytest.raises(ValueError, match="it was not built"):
        AGRAdamW(parameters([(3, 3)]), fused=True)


def test_one_thread_of_a_launcher_is_named_as_the_reason_of_slow_steps(monkeypatch):
    assert describe_backends()["native"] is True
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    (note,) = explain_slow_steps()
    assert "OMP_NUM_THREADS=1" in note


def test_tables_that_do_not_fit_each_other_are_refused():
    one, two = array("q", [0]), array("q", [0, 0])
    with pytest.raises(ValueError, match="do not fit"):
        native._native.run(
            0, 2, 0, 1, one, two, one, array("d", [0.0] * 16), array("d", [0.0]), array("d", [0.0]), 0, b""
        )


def test_a_step_reads_and_adds_no_memory_of_the_size_of_the_parameters():
    params = parameters([(1024, 1024)] * 4)
    optimizer = AGRAdamW(params)
    give_gradients(params, 0)
    optimizer.step()
    started = time.perf_counter()
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    assert time.perf_counter() - started < 60
    largest = max((event.cpu_memory_usage for event in profile.key_averages()), default=0)
    assert largest < 64 * 1024
