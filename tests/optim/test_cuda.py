"""On a CUDA device: the same rule, without waiting for the device."""

import pytest
import torch
from oracle import OURS, as_parameters, gradients, initial, run_optimizer, run_reference

from agr_hf import agr, l1_norms
from agr_hf.optim.registry import OPTIMIZERS

pytestmark = pytest.mark.gpu
VARIANTS = [{}, {"foreach": True}, {"foreach": False}, {"capturable": True}, {"foreach": False, "capturable": True}]
WITH_KERNELS = [name for name in OURS if getattr(OPTIMIZERS[name].cls, "native_rule", None)]


def on_device(thetas, dtype):
    return [torch.nn.Parameter(p.detach().cuda()) for p in as_parameters(thetas, dtype, torch.channels_last)]


def stepped(name, dtype, options, steps):
    params = on_device(initial(), dtype)
    optimizer = OPTIMIZERS[name].cls(params, lr=1e-2, **options)
    run_optimizer(optimizer, params, steps, layout=lambda g: g.cuda())
    return params, optimizer


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-5)], ids=str)
@pytest.mark.parametrize("options", [{"weight_decay": 0.1}, {"weight_decay": 0.1, "max_grad_norm": 1.0}], ids=str)
@pytest.mark.parametrize("name", OURS)
def test_cuda_equals_the_papers_rule(name, options, dtype, tolerance, variant):
    thetas = [theta.to(dtype).double() for theta in initial()]
    steps = [[g.to(dtype).double() for g in grads] for grads in gradients(100)]
    wanted = run_reference(name, thetas, steps, lr=1e-2, **options)
    params, _ = stepped(name, dtype, {**options, **variant}, steps)
    for p, w in zip(params, wanted, strict=True):
        torch.testing.assert_close(p.detach().cpu().double(), w, rtol=0, atol=tolerance)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", OURS)
def test_a_step_never_waits_for_the_device(name, variant):
    _, optimizer = stepped(name, torch.float32, {"max_grad_norm": 1.0, **variant}, gradients(2))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["agr_adamw", "agr_adam"])
def test_unusable_norms_do_what_torch_does(name, value):
    grad = torch.randn(5, 6, device="cuda")
    grad = torch.zeros_like(grad) if value == 0 else grad.index_fill(0, torch.tensor([2], device="cuda"), value)
    ends = []
    for cls in (OPTIMIZERS[name].cls, OPTIMIZERS[name.removeprefix("agr_")].cls):
        param = torch.nn.Parameter(torch.ones(5, 6, device="cuda"))
        param.grad = grad.clone()
        cls([param], lr=1e-2).step()
        ends.append(param.detach())
    torch.testing.assert_close(*ends, equal_nan=True)


def test_norms_of_half_precision_on_the_device():
    g = torch.full((3000, 300), 10.0, dtype=torch.float16, device="cuda")
    (norm,) = l1_norms([g])
    assert norm.device == g.device
    assert norm == 9_000_000
    on_device = torch.randn(50, 50, device="cuda", dtype=torch.float64)
    torch.testing.assert_close(agr(on_device).cpu(), agr(on_device.cpu()), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["agr_adamw", "adal"])
def test_a_captured_graph_repeats_the_step(name):
    params, optimizer = stepped(name, torch.float32, {"capturable": True}, gradients(3))
    others, other = stepped(name, torch.float32, {"capturable": True}, gradients(3))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(3):
        graph.replay()
        other.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", WITH_KERNELS)
def test_triton_takes_two_launches_a_step(name):
    _, optimizer = stepped(name, torch.float32, {}, gradients(3))
    assert {type(part).__name__ for part in optimizer.plan.parts} == {"GPUPart"}
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    launches = [
        event.key for event in profile.key_averages() if event.key.endswith("_kernel") for _ in range(event.count)
    ]
    assert sorted(launches) == (["update_kernel"] if name == "adan" else ["sums_kernel", "update_kernel"])


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
@pytest.mark.parametrize("name", WITH_KERNELS)
def test_low_precision_rounds_as_on_the_cpu(name, rounding, state_dtype):
    generator = torch.Generator().manual_seed(0)
    start, *grads = [torch.randn(70, 1000, generator=generator).bfloat16() for _ in range(4)]
    ends = []
    for device in ("cpu", "cuda"):
        param = torch.nn.Parameter(start.to(device))
        optimizer = OPTIMIZERS[name].cls([param], lr=1e-3, rounding=rounding, state_dtype=state_dtype)
        for grad in grads:
            param.grad = grad.to(device)
            optimizer.step()
        ends.append(param.detach().cpu())
    assert (ends[0] != ends[1]).float().mean() < 1e-2
    torch.testing.assert_close(*ends, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("variant", [{}, {"foreach": False}], ids=["triton", "lists"])
def test_a_graph_reads_the_rate_and_ends_agr_by_itself(variant):
    ends = []
    for recorded in (True, False):
        rate = torch.tensor(0.01, device="cuda")
        param = torch.nn.Parameter(torch.ones(20, 30, device="cuda"))
        param.grad = torch.linspace(-1, 1, 600, device="cuda").view(20, 30)
        optimizer = OPTIMIZERS["agr_adamw"].cls([param], lr=rate, agr_steps=4, capturable=True, **variant)
        for _ in range(2):
            optimizer.step()
        take_step = optimizer.step
        if recorded:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            take_step = graph.replay
        for step in range(4):
            rate.fill_(0.01 / (step + 1))
            take_step()
        ends.append((param.detach(), optimizer.state[param]["step"]))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-5, atol=1e-6)
    assert ends[0][1] == ends[1][1] == 6


def test_a_graph_skips_a_step_that_overflowed():
    param = torch.nn.Parameter(torch.ones(20, 30, device="cuda"))
    param.grad = torch.linspace(-4, 4, 600, device="cuda").view(20, 30)
    optimizer = OPTIMIZERS["agr_adamw"].cls([param], lr=0.01, capturable=True, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor([4.0, 0.0], device="cuda").unbind()
    for _ in range(2):
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for overflowed in (1.0, 0.0, 1.0):
        optimizer.found_inf.fill_(overflowed)
        before = param.detach().clone()
        graph.replay()
        assert torch.equal(param, before) == bool(overflowed)
    assert optimizer.state[param]["step"] == 3


@pytest.mark.parametrize("name", ["agr_adam", "agr_adamw"])  # of whose rules torch has a fused kernel
def test_a_state_of_torchs_fused_kernel_brings_its_step_count_to_the_host(name):
    params = on_device(initial(), torch.float32)
    fused = OPTIMIZERS[name.removeprefix("agr_")].cls(params, lr=1e-2, fused=True)
    run_optimizer(fused, params, gradients(2), layout=lambda g: g.cuda())
    optimizer = OPTIMIZERS[name].cls(params)
    optimizer.load_state_dict(fused.state_dict())
    assert all(state["step"].is_cpu for state in optimizer.state.values())
    run_optimizer(optimizer, params, gradients(2), layout=lambda g: g.cuda())
