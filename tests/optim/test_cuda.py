"""On a CUDA device: the same rule, without waiting for the device."""

import pytest
import torch
from oracle import OURS, as_parameters, gradients, initial, run_optimizer, run_reference

from agr_hf import agr, l1_norms
from agr_hf.optim.registry import OPTIMIZERS

pytestmark = pytest.mark.gpu
VARIANTS = [{}, {"foreach": True}, {"foreach": False}, {"capturable": True}]


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


@pytest.mark.parametrize("name", OURS)
def test_a_state_of_torchs_fused_kernel_brings_its_step_count_to_the_host(name):
    if not name.startswith("agr_adam"):
        pytest.skip("torch has no fused kernel of this rule")
    params = on_device(initial(), torch.float32)
    fused = OPTIMIZERS[name.removeprefix("agr_")].cls(params, lr=1e-2, fused=True)
    run_optimizer(fused, params, gradients(2), layout=lambda g: g.cuda())
    optimizer = OPTIMIZERS[name].cls(params)
    optimizer.load_state_dict(fused.state_dict())
    assert all(state["step"].is_cpu for state in optimizer.state.values())
    run_optimizer(optimizer, params, gradients(2), layout=lambda g: g.cuda())
