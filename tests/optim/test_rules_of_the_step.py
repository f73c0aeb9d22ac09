"""The rules that design promises of every optimizer's step, each with a test that fails without it."""

import copy
import math
import pickle

import pytest
import torch
from oracle import OURS, WITH_AGR, as_parameters, gradients, initial, run_optimizer

from agr_hf import AGRAdamW, agr
from agr_hf.optim import part, state
from agr_hf.optim.backends.capture import untraced
from agr_hf.optim.registry import OPTIMIZERS
from agr_hf.optim.shards import widest

every_optimizer = pytest.mark.parametrize("name", OURS)
variants = pytest.mark.parametrize(
    "variant", [{}, {"foreach": True}, {"foreach": False}, {"capturable": True}], ids=str
)


def make(name, params, **options):
    return OPTIMIZERS[name].cls(params, lr=options.pop("lr", 1e-2), **options)


def one_step(name, grad, **options):
    param = torch.nn.Parameter(torch.ones_like(grad))
    param.grad = grad.clone()
    optimizer = make(name, [param], **options)
    optimizer.step()
    return param, optimizer


@every_optimizer
@variants
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "max_grad_norm": 0.1, "maximize": True}], ids=str)
def test_gradients_are_never_changed(name, variant, options):
    params = as_parameters(initial(), torch.float32)
    optimizer = make(name, params, **variant, **options)
    for grads in gradients(3):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.float()
        optimizer.step()
        for param, grad in zip(params, grads, strict=True):
            assert torch.equal(param.grad, grad.float())


@every_optimizer
@variants
def test_zero_gradients_and_zero_learning_rate_make_no_nan(name, variant):
    """timm's ResNets start with residual branches of exactly zero gradient; DCP steps once with zeros and lr 0."""
    for lr in (0.0, 1e-2):
        param, optimizer = one_step(name, torch.zeros(3, 4), lr=lr, **variant)
        assert torch.equal(param.detach(), torch.ones(3, 4)) or name == "agr_adamw"  # which decays
        param.grad = torch.zeros(3, 4)
        optimizer.step()
        assert param.isfinite().all()


@pytest.mark.parametrize("name", WITH_AGR)
@variants
def test_one_element_tensors_are_not_regularized(name, variant):
    param, optimizer = one_step(name, torch.full((1, 1), 3.0), min_ndim=0, **variant)
    plain, _ = one_step(name, torch.full((1, 1), 3.0), agr=False, **variant)
    assert torch.equal(param, plain)
    assert optimizer.state[param]["exp_avg"] != 0


@pytest.mark.parametrize("name", ["agr_adamw", "agr_adam"])
@variants
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nan_or_inf_element_does_what_it_does_in_torch(name, variant, bad):
    grad = torch.randn(5, 6)
    grad[2, 3] = bad
    param, optimizer = one_step(name, grad, **variant)
    like = torch.nn.Parameter(torch.ones(5, 6))
    like.grad = grad.clone()
    torchs = OPTIMIZERS[name.removeprefix("agr_")].cls([like], lr=1e-2)
    torchs.step()
    torch.testing.assert_close(param, like, equal_nan=True, rtol=1e-6, atol=1e-7)
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(optimizer.state[param][key], torchs.state[like][key], equal_nan=True)


@pytest.mark.parametrize("name", ["agr_adan", "adal", "adan", "acprop", "nosadam"])
@variants
def test_a_nan_element_stays_where_it_is_unless_the_rule_spreads_it(name, variant):
    grad = torch.randn(5, 6)
    grad[2, 3] = math.nan
    param, _ = one_step(name, grad, **variant)
    # AdaL multiplies the whole tensor by its norm, which is NaN: as Adam on such a gradient would.
    assert param.isnan().sum() == (30 if name == "adal" else 1)


@every_optimizer
def test_state_and_parameters_of_half_precision_are_float32_and_half(name):
    param, optimizer = one_step(name, torch.randn(4, 5).bfloat16())
    assert param.dtype == torch.bfloat16
    tensors = {key: value for key, value in optimizer.state[param].items() if value.ndim}
    assert tensors
    assert {value.dtype for value in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("name", WITH_AGR)
def test_psi_acts_on_bfloat16_gradients_though_their_precision_cannot_hold_it(name):
    grad = torch.randn(100, 100).bfloat16()
    param, optimizer = one_step(name, grad)
    _, plain = one_step(name, grad, agr=False)
    plain_param = plain.param_groups[0]["params"][0]
    assert not torch.equal(optimizer.state[param]["exp_avg"], plain.state[plain_param]["exp_avg"])


@every_optimizer
def test_state_is_lazy_and_frozen_parameters_have_none(name):
    params = as_parameters(initial()[:3], torch.float32)
    params[1].requires_grad_(False)
    optimizer = make(name, params)
    assert not optimizer.state
    params[0].grad = torch.ones_like(params[0])
    before = params[1].clone()
    optimizer.step()
    assert set(optimizer.state) == {params[0]}
    assert torch.equal(params[1], before)


@every_optimizer
@variants
def test_a_late_parameter_trains_as_if_its_own_first_step_were_the_first(name, variant):
    steps = list(gradients(6))
    late, alone = (as_parameters(initial(), torch.float64) for _ in range(2))
    optimizer = make(name, late, **variant)
    for i, grads in enumerate(steps):
        for j, (param, grad) in enumerate(zip(late, grads, strict=True)):
            param.grad = grad if i >= 3 or j != 2 else None
        optimizer.step()
    run_optimizer(make(name, alone, **variant), alone, steps[3:])
    torch.testing.assert_close(late[2], alone[2], rtol=1e-13, atol=1e-13)
    assert not torch.equal(late[0], alone[0])


@every_optimizer
@variants
def test_empty_tensors_step_and_keep_their_shape(name, variant):
    param, optimizer = one_step(name, torch.zeros(0, 7), **variant)
    assert optimizer.state[param]["step"] == 1
    assert optimizer.state[param][optimizer.state_keys[0]].shape == (0, 7)


@every_optimizer
def test_complex_parameters_are_refused_with_the_way_out(name):
    with pytest.raises(ValueError, match="complex64.*view_as_real"):
        make(name, [torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))])


@every_optimizer
def test_sparse_gradients_are_refused_with_the_way_out(name):
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = make(name, embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()


@every_optimizer
def test_fsdp1_flat_parameters_are_refused_with_the_way_out(name):
    flat = torch.nn.Parameter(torch.ones(10))
    flat._is_flat_param = True
    with pytest.raises(ValueError, match=r"fully_shard.*accelerate to-fsdp2"):
        make(name, [flat])


def test_a_flattened_group_that_never_held_matrices_is_no_reason_to_refuse():
    bias = torch.nn.Parameter(torch.ones(3))
    bias.grad = torch.ones(3)
    make("agr_adamw", [bias]).step()


@every_optimizer
def test_tied_weights_are_updated_once(name):
    embedding, head = torch.nn.Embedding(7, 5), torch.nn.Linear(5, 7, bias=False)
    head.weight = embedding.weight
    model = torch.nn.Sequential(embedding, head)
    optimizer = make(name, model.parameters())
    model(torch.arange(7)).square().sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 1
    assert optimizer.state[embedding.weight]["step"] == 1
    assert head.weight is embedding.weight


@every_optimizer
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copied_optimizer_goes_on_with_the_same_bits(name, copied):
    steps = list(gradients(6))
    params = as_parameters(initial(), torch.float32)
    optimizer = make(name, params)
    run_optimizer(optimizer, params, steps[:3])
    clone = copied(optimizer)
    clones = clone.param_groups[0]["params"]
    run_optimizer(optimizer, params, steps[3:])
    run_optimizer(clone, clones, steps[3:])
    assert all(torch.equal(p, q) and p is not q for p, q in zip(params, clones, strict=True))


@every_optimizer
@variants
def test_the_same_inputs_give_the_same_bits(name, variant):
    runs = [as_parameters(initial(), torch.float32) for _ in range(2)]
    for params in runs:
        run_optimizer(make(name, params, **variant), params, gradients(5))
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


@every_optimizer
def test_a_closure_runs_with_gradients_enabled_and_its_loss_comes_back(name):
    param = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = make(name, [param])

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4.0
    assert (param < 1).all()


@every_optimizer
@pytest.mark.parametrize("capturable", [False, True])
def test_a_tensor_learning_rate_follows_its_value(name, capturable):
    rate = torch.tensor(0.5)
    ends = []
    for lr in (rate, 0.5):
        params = as_parameters(initial(), torch.float64)
        optimizer = make(name, params, lr=lr, capturable=capturable)
        run_optimizer(optimizer, params, gradients(2))
        if lr is rate:
            rate.fill_(0.125)
        else:
            optimizer.param_groups[0]["lr"] = 0.125
        run_optimizer(optimizer, params, gradients(2, seed=5))
        ends.append(params)
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@every_optimizer
def test_schedulers_and_groups_set_each_groups_rate(name):
    slow, fast = as_parameters([torch.zeros(3, 3)] * 2, torch.float64)
    optimizer = make(name, [{"params": [slow], "lr": 1e-3}, {"params": [fast], "lr": 1e-2}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    slow.grad = fast.grad = torch.ones(3, 3, dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(10 * slow, fast)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 5e-3]


@every_optimizer
def test_hooks_and_added_groups_work_as_in_torch(name):
    param = torch.nn.Parameter(torch.ones(2, 2))
    param.grad = torch.ones(2, 2)
    optimizer = make(name, [param])
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    late = torch.nn.Parameter(torch.ones(2, 2))
    late.grad = torch.ones(2, 2)
    optimizer.add_param_group({"params": [late], "lr": 0.0})
    optimizer.step()
    assert calls == ["pre", "post"]
    assert torch.equal(late.detach(), torch.ones(2, 2))


@pytest.mark.parametrize("name", WITH_AGR)
def test_agr_steps_counts_steps_of_the_group(name):
    param = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = make(name, [{"params": [param], "agr_steps": 2}])
    for i in range(4):
        param.grad = torch.randn(3, 3)
        optimizer.step()
        assert optimizer.param_groups[0]["agr_step"] == i + 1
    param.grad = None
    optimizer.step()
    assert optimizer.param_groups[0]["agr_step"] == 4  # nothing to regularize was seen


@pytest.mark.parametrize("name", WITH_AGR)
@pytest.mark.parametrize("min_ndim", [0, 1, 2, 3])
def test_min_ndim_says_which_tensors_are_regularized(name, min_ndim):
    params, plain = as_parameters(initial(), torch.float64), as_parameters(initial(), torch.float64)
    run_optimizer(make(name, params, min_ndim=min_ndim), params, gradients(2))
    run_optimizer(make(name, plain, agr=False), plain, gradients(2))
    for p, q in zip(params, plain, strict=True):
        assert torch.equal(p, q) == (p.ndim < min_ndim or p.numel() <= 1)


@every_optimizer
def test_a_step_without_any_gradient_does_nothing(name):
    params = as_parameters(initial(), torch.float32)
    make(name, params).step()
    assert all(torch.equal(p.double(), theta.float().double()) for p, theta in zip(params, initial(), strict=True))


@every_optimizer
def test_a_nan_norm_makes_clipped_gradients_nan_as_in_torch(name):
    params = as_parameters([torch.zeros(3, 3)] * 2, torch.float32)
    params[0].grad, params[1].grad = torch.full((3, 3), math.nan), torch.ones(3, 3)
    make(name, params, max_grad_norm=1.0).step()
    assert params[1].isnan().all()


@pytest.mark.parametrize("name", WITH_AGR)
def test_a_groups_agr_may_be_told_for_each_parameter(name):
    one, split = as_parameters(initial()[:3]), as_parameters(initial()[:3])
    flags = [True, False, True]
    run_optimizer(make(name, [{"params": one, "agr": flags}]), one, [g[:3] for g in gradients(3)])
    groups = [{"params": [p], "agr": flag} for p, flag in zip(split, flags, strict=True)]
    run_optimizer(make(name, groups), split, [g[:3] for g in gradients(3)])
    assert all(torch.equal(p, q) for p, q in zip(one, split, strict=True))
    with pytest.raises(ValueError, match="agr="):
        make(name, [{"params": one, "agr": [True]}])


@every_optimizer
def test_a_refused_step_does_not_count(name):
    weight, embedding = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Embedding(4, 5, sparse=True)
    weight.grad = torch.ones(2, 2)
    embedding(torch.tensor([1])).sum().backward()
    optimizer = make(name, [weight, embedding.weight])
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    embedding.weight.grad = None
    optimizer.step()
    alone = torch.nn.Parameter(torch.zeros(2, 2))
    alone.grad = torch.ones(2, 2)
    make(name, [alone]).step()
    assert torch.equal(weight, alone)
    assert optimizer.state[weight]["step"] == 1


@pytest.mark.parametrize("beta1", [1e-8, 1e-4, 0.05, 0.2])
def test_small_beta1_keeps_psi(beta1):
    """What the fused kernel would round away at small beta1 is computed without it."""
    grad = torch.tensor([[3.0, 1.0], [1.0, 1.0]])
    param, optimizer = one_step("agr_adamw", grad, betas=(beta1, 0.999))
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], (1 - beta1) * agr(grad), rtol=1e-5, atol=0)


@every_optimizer
def test_the_step_compiles(name):
    params, others = as_parameters(initial()[2:4], torch.float32), as_parameters(initial()[2:4], torch.float32)
    steps = [grads[2:4] for grads in gradients(3)]
    optimizer = make(name, params)
    optimizer.step = torch.compile(optimizer.step, backend="aot_eager")
    run_optimizer(optimizer, params, steps)
    run_optimizer(make(name, others), others, steps)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_what_is_untraced_stays_out_of_a_compiled_graph():
    traced = []

    def keep(module, inputs):
        traced.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    def look(x):
        return x.square()

    def step(x, looked):
        return looked(x + 1) * 2

    x = torch.ones(2)
    for looked, expected in ((untraced(look), False), (look, True)):
        traced.clear()
        assert torch.equal(torch.compile(step, backend=keep)(x, looked), torch.full((2,), 8.0))
        assert any("add" in name for name in traced)
        assert any("square" in name for name in traced) == expected


def test_groups_that_the_user_edits_go_on():
    a, b = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    a.grad, b.grad = torch.ones(2, 2), torch.ones(2, 2)
    optimizer = AGRAdamW([{"params": [a]}, {"params": [b]}])
    optimizer.param_groups.pop()
    optimizer.step()
    linear = torch.nn.Linear(3, 3)
    optimizer = AGRAdamW(linear.parameters())
    optimizer.param_groups[0]["params"] = [linear.bias]
    linear.bias.grad = torch.ones(3)
    optimizer.step()
    flagged = AGRAdamW([{"params": [a], "agr": [True]}])
    flagged.param_groups[0]["params"].append(b)
    with pytest.raises(ValueError, match="has 2 parameters and an `agr` for 1"):
        flagged.step()


@every_optimizer
@pytest.mark.parametrize("capturable", [False, True])
def test_a_learning_rate_of_one_element_may_have_dimensions(name, capturable):
    params, others = as_parameters(initial()), as_parameters(initial())
    options = {"capturable": capturable, "weight_decay": 0.1}
    run_optimizer(make(name, params, lr=torch.tensor([[1e-2]]), **options), params, gradients(2))
    run_optimizer(make(name, others, lr=torch.tensor(1e-2), **options), others, gradients(2))
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@every_optimizer
@pytest.mark.parametrize(
    ("before", "after"), [("float32", "float64"), ("float64", "bfloat16"), ("float32", "bfloat16")]
)
def test_a_model_may_change_its_precision_in_mid_run(name, before, after):
    before, after = getattr(torch, before), getattr(torch, after)
    model = torch.nn.Linear(4, 3).to(before)
    optimizer = make(name, model.parameters())
    for dtype in (before, after):
        model.to(dtype)
        model.zero_grad()
        model(torch.randn(5, 4, dtype=dtype)).square().sum().backward()
        optimizer.step()
    state = optimizer.state[model.weight]
    assert state["step"] == 2
    assert state[optimizer.state_keys[0]].dtype == torch.promote_types(after, torch.float32)
    assert model.weight.isfinite().all()


@every_optimizer
def test_the_default_device_is_no_business_of_the_step(name):
    params = as_parameters(initial(), torch.float32)
    optimizer = make(name, params, max_grad_norm=1.0)
    for grads in gradients(2):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.float()
        with torch.device("meta"):
            optimizer.step()
    assert all(param.isfinite().all() for param in params)


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"capturable": True}], ids=str)
def test_fused_is_refused_where_it_would_not_be_used(options):
    with pytest.raises(ValueError, match="fused=True"):
        AGRAdamW(as_parameters(initial()), fused=True, **options)


@every_optimizer
def test_a_gradient_of_another_shape_is_refused(name):
    """The fused kernel trusts lengths, and read past the end."""
    param = torch.nn.Parameter(torch.zeros(2, 2))
    param.grad = torch.ones(2, 2)
    optimizer = make(name, [param])
    param.data = torch.zeros(300, 300)
    with pytest.raises(ValueError, match=r"a gradient has the shape \(2, 2\) and its parameter \(300, 300\)"):
        optimizer.step()
    assert not optimizer.state


@every_optimizer
@pytest.mark.parametrize("device", [torch.cuda, torch.xpu], ids=["cuda", "xpu"])
def test_a_step_asks_torch_whether_it_may_be_recorded(device, name, monkeypatch):
    """Recorded into a CUDA graph without capturable, a step would repeat one step count for ever."""
    method = next(m for m in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
                  if hasattr(torch.optim.Optimizer, m))  # fmt: skip

    def refuse(self):
        raise RuntimeError("recording")

    param = torch.nn.Parameter(torch.zeros(2, 2))
    param.grad = torch.ones(2, 2)
    optimizer = make(name, [param])
    monkeypatch.setattr(torch.optim.Optimizer, method, refuse)
    monkeypatch.setattr(device, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="recording"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("name", ["agr_adan", "nosadam"])
def test_a_device_without_float64_keeps_scalars_in_float32(name, monkeypatch):
    assert widest(torch.device("mps")) == torch.float32
    assert widest(torch.device("cuda")) == torch.float64
    ends = []
    for narrow in (False, True):
        with monkeypatch.context() as patch:
            if narrow:  # as on Apple's GPUs
                for module in (part, state):
                    patch.setattr(module, "widest", lambda device: torch.float32)
            params = as_parameters(initial(), torch.float32)
            optimizer = OPTIMIZERS[name].cls(params, lr=1e-2, foreach=True)  # the path of such a device
            run_optimizer(optimizer, params, gradients(3))
            optimizer.load_state_dict(optimizer.state_dict())
            run_optimizer(optimizer, params, gradients(3))
        scalars = [optimizer.state[params[0]][key] for key in optimizer.scalar_state]
        assert {scalar.dtype for scalar in scalars} == {torch.float32 if narrow else torch.float64}
        ends.append(params)
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
