"""State round trips: with itself, with torch's optimizers in mid-run, and with files of older versions."""

import io

import pytest
import torch
from oracle import OURS, WITH_AGR, as_parameters, gradients, initial, run_optimizer

from agr_hf import ACProp, AdaL, Adan, AGRAdam, AGRAdamW, AGRAdan, NosAdam
from agr_hf.optim.registry import OPTIMIZERS

every_optimizer = pytest.mark.parametrize("name", OURS)


def through_a_file(state):
    """As Trainer does it: nothing but what `weights_only=True` accepts."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def continued(make, params, state, steps):
    clones = [torch.nn.Parameter(param.detach().clone()) for param in params]
    optimizer = make(clones)
    optimizer.load_state_dict(state)
    run_optimizer(optimizer, clones, steps)
    return clones, optimizer


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capturable", [False, True])
def test_a_resumed_run_has_the_bits_of_one_never_stopped(name, dtype, capturable):
    def make(params):
        options = {"max_grad_norm": 1.0, "weight_decay": 0.1, "capturable": capturable}
        if name in WITH_AGR and not capturable:
            options["agr_steps"] = 5
        return OPTIMIZERS[name].cls(params, lr=1e-2, **options)

    steps = list(gradients(8))
    params = as_parameters(initial(), dtype)
    optimizer = make(params)
    run_optimizer(optimizer, params, steps[:4])
    clones, resumed = continued(make, params, through_a_file(optimizer.state_dict()), steps[4:])
    run_optimizer(optimizer, params, steps[4:])
    assert all(torch.equal(p, q) for p, q in zip(params, clones, strict=True))
    for p, q in zip(params, clones, strict=True):
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, resumed.state[q][key])
            assert value.dtype == resumed.state[q][key].dtype


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("ours", "torchs"), [(AGRAdamW, torch.optim.AdamW), (AGRAdam, torch.optim.Adam)])
def test_a_run_moves_from_torch_to_agr_and_back(ours, torchs, fused):
    steps = list(gradients(9))
    params = as_parameters(initial(), torch.float32)
    optimizer = torchs(params, lr=1e-2, weight_decay=0.1, fused=fused)
    run_optimizer(optimizer, params, steps[:3])
    state = through_a_file(optimizer.state_dict())

    clones, agr = continued(lambda p: ours(p, foreach=False), params, state, steps[3:6])
    group = agr.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (1e-2, 0.1)
    assert (group["agr"], group["min_ndim"], group["foreach"], group["fused"]) == (True, 2, False, None)
    assert group["agr_step"] == 6  # steps of the run, AGR's or not: a suspension counts epochs of training
    assert agr.state[clones[0]]["step"] == 6

    back, torch_again = continued(
        lambda p: torchs(p, foreach=False), clones, through_a_file(agr.state_dict()), steps[6:]
    )
    assert torch_again.state[back[0]]["step"] == 9
    assert torch_again.param_groups[0].get("decoupled_weight_decay", ours is AGRAdamW) == (ours is AGRAdamW)
    # With AGR off the round trip is torch's own run.
    plain, _ = continued(lambda p: ours(p, foreach=False, agr=False), params, state, steps[3:6])
    alone, _ = continued(lambda p: torchs(p, foreach=False), params, {**state, "param_groups": [
        {**state["param_groups"][0], "fused": None, "foreach": False}]}, steps[3:6])  # fmt: skip
    assert all(torch.equal(p, q) for p, q in zip(plain, alone, strict=True))


@pytest.mark.parametrize("name", WITH_AGR)
def test_state_dicts_without_the_new_keys_keep_this_optimizers_options(name):
    steps = list(gradients(4))
    params = as_parameters(initial(), torch.float32)
    optimizer = OPTIMIZERS[name].cls(params, lr=1e-2)
    run_optimizer(optimizer, params, steps[:2])
    state = optimizer.state_dict()
    for key in ("agr", "agr_steps", "agr_step", "min_ndim", "second_moment", "max_grad_norm", "maximize", "foreach"):
        del state["param_groups"][0][key]
    for entry in state["state"].values():
        entry.pop("pre_l1_norm", None)
    _, resumed = continued(
        lambda p: OPTIMIZERS[name].cls([{"params": p, "agr": False}], min_ndim=1), params, state, steps[2:]
    )
    assert resumed.param_groups[0]["agr"] is False
    assert resumed.param_groups[0]["min_ndim"] == 1
    assert resumed.param_groups[0]["second_moment"] == "raw"
    assert resumed.param_groups[0]["lr"] == 1e-2


@every_optimizer
def test_moments_of_half_precision_parameters_come_back_in_float32_unrounded(name):
    params = as_parameters(initial(), torch.bfloat16)
    optimizer = OPTIMIZERS[name].cls(params, lr=1e-2)
    run_optimizer(optimizer, params, gradients(3))
    clones, resumed = continued(OPTIMIZERS[name].cls, params, optimizer.state_dict(), [])
    for p, q in zip(params, clones, strict=True):
        for key, value in optimizer.state[p].items():
            assert resumed.state[q][key].dtype == value.dtype
            assert torch.equal(resumed.state[q][key], value)


def test_the_given_state_dict_is_left_alone_by_loading_and_by_later_steps():
    params = as_parameters(initial(), torch.bfloat16)
    optimizer = AGRAdamW(params, lr=1e-2)
    run_optimizer(optimizer, params, gradients(2))
    state = through_a_file(optimizer.state_dict())
    kept = through_a_file(state)
    continued(AGRAdamW, params, state, list(gradients(2)))
    for i, entry in state["state"].items():
        assert all(torch.equal(value, kept["state"][i][key]) for key, value in entry.items())
    assert state["param_groups"] == kept["param_groups"]


def test_state_of_another_memory_format_is_laid_out_again():
    """safetensors keeps no strides, and a model may become channels_last after it was saved."""
    steps = list(gradients(6))
    params = as_parameters(initial(), torch.float64)
    optimizer = AGRAdamW(params, lr=1e-2)
    run_optimizer(optimizer, params, steps[:3])
    state = through_a_file(optimizer.state_dict())
    nhwc = as_parameters([p.detach() for p in params], torch.float64, torch.channels_last)
    resumed = AGRAdamW(nhwc, lr=1e-2)
    resumed.load_state_dict(state)
    run_optimizer(resumed, nhwc, steps[3:])
    run_optimizer(optimizer, params, steps[3:])
    for p, q in zip(params, nhwc, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)
    # The format changes in mid-run, under the optimizer's feet.
    params[0].data = params[0].data.to(memory_format=torch.channels_last)
    run_optimizer(optimizer, params, steps)
    run_optimizer(resumed, nhwc, steps)
    torch.testing.assert_close(params[0], nhwc[0], rtol=1e-12, atol=1e-12)


def test_load_hooks_of_users_are_heard():
    params = as_parameters(initial()[:1], torch.bfloat16)
    optimizer = AGRAdamW(params, lr=1e-2)
    run_optimizer(optimizer, params, [[torch.ones(8, 4, 3, 3)]])
    other = AGRAdamW(params)
    other.register_load_state_dict_pre_hook(
        lambda _, state: {**state, "state": {0: {**state["state"][0], "exp_avg": torch.full((8, 4, 3, 3), 7.001)}}}
    )
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.state[params[0]]["exp_avg"], torch.full((8, 4, 3, 3), 7.001))


@pytest.mark.parametrize(
    ("saved", "loading"),
    [
        (torch.optim.SGD, AGRAdamW),
        (torch.optim.AdamW, AGRAdan),
        (torch.optim.AdamW, ACProp),
        (torch.optim.RMSprop, AdaL),
        (Adan, AGRAdamW),  # its keys are all there, its betas are three
        (AGRAdamW, NosAdam),
        (NosAdam, AGRAdam),
        (AdaL, AGRAdamW),  # the same keys, of gradients of another scale
        (torch.optim.Adam, AdaL),
    ],
)
def test_a_state_of_another_kind_is_refused_before_anything_changes(saved, loading):
    params = as_parameters(initial(), torch.float32)
    foreign = saved(params, lr=1e-2, **({"momentum": 0.9} if saved is torch.optim.SGD else {}))
    run_optimizer(foreign, params, gradients(1))
    optimizer = loading(params)
    with pytest.raises(ValueError, match="saved by another optimizer"):
        optimizer.load_state_dict(foreign.state_dict())
    assert not optimizer.state
    optimizer.step()


def test_amsgrad_is_refused_by_name():
    params = as_parameters(initial(), torch.float32)
    foreign = torch.optim.AdamW(params, amsgrad=True)
    run_optimizer(foreign, params, gradients(1))
    with pytest.raises(ValueError, match="amsgrad=True"):
        AGRAdamW(params).load_state_dict(foreign.state_dict())


def test_keys_of_the_user_and_of_schedulers_survive():
    params = as_parameters(initial(), torch.float32)
    optimizer = AGRAdamW([{"params": params, "name": "everything"}], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    run_optimizer(optimizer, params, gradients(1))
    scheduler.step()
    other = AGRAdamW(params)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert (other.param_groups[0]["name"], other.param_groups[0]["initial_lr"]) == ("everything", 1.0)
    assert other.param_groups[0]["lr"] == 0.5


def test_a_state_of_other_shapes_is_refused_by_both_shapes():
    """The fused kernel trusts lengths: unchecked, this was a segmentation fault."""
    small, large = (torch.nn.Parameter(torch.zeros(n)) for n in (8, 200_000))
    small.grad, large.grad = torch.ones(8), torch.ones(200_000)
    saved, optimizer = AGRAdamW([small]), AGRAdamW([large])
    saved.step()
    with pytest.raises(ValueError, match=r"exp_avg has the shape \(8,\) and its parameter \(200000,\)"):
        optimizer.load_state_dict(saved.state_dict())
    optimizer.step()


@every_optimizer
def test_a_parameter_that_grows_in_mid_run_is_refused_before_the_step(name):
    param = torch.nn.Parameter(torch.zeros(2, 2))
    param.grad = torch.ones(2, 2)
    optimizer = OPTIMIZERS[name].cls([param])
    optimizer.step()
    param.data = torch.zeros(300, 300)
    param.grad = torch.ones(300, 300)
    with pytest.raises(ValueError, match=r"exp_avg has the shape \(2, 2\) and its parameter \(300, 300\)"):
        optimizer.step()
    assert optimizer.state[param]["step"] == 1


def test_a_file_with_the_step_elsewhere_is_refused():
    params = as_parameters(initial(), torch.float32)
    optimizer = AGRAdamW(params)
    run_optimizer(optimizer, params, gradients(1))
    state = optimizer.state_dict()
    for entry in state["state"].values():
        del entry["step"]
    with pytest.raises(ValueError, match="needs step, exp_avg"):
        AGRAdamW(params).load_state_dict(state)


def test_adan_and_agr_adan_take_each_others_state():
    for saved, loading in ((Adan, AGRAdan), (AGRAdan, Adan)):
        params = as_parameters(initial(), torch.float32)
        optimizer = saved(params)
        run_optimizer(optimizer, params, gradients(2))
        clones, resumed = continued(loading, params, optimizer.state_dict(), list(gradients(2)))
        assert resumed.state[clones[0]]["step"] == 4


def test_steps_made_by_torch_in_between_count_for_the_suspension():
    params = as_parameters(initial(), torch.float32)
    ours, torchs, again = AGRAdamW(params), torch.optim.AdamW(params), AGRAdamW(params)
    run_optimizer(ours, params, gradients(2))
    torchs.load_state_dict(ours.state_dict())
    run_optimizer(torchs, params, gradients(3))
    again.load_state_dict(torchs.state_dict())
    assert again.param_groups[0]["agr_step"] == 5


def test_numbers_of_numpy_load_with_weights_only():
    numpy = pytest.importorskip("numpy", reason="numpy is missing: pip install numpy")
    optimizer = AGRAdamW(as_parameters(initial()), lr=numpy.float64(0.1), betas=(numpy.float32(0.5), 0.9))
    assert through_a_file(optimizer.state_dict())["param_groups"][0]["lr"] == 0.1


def test_users_post_hooks_have_the_last_word():
    params = as_parameters([torch.ones(2, 3)], torch.float32)
    saved = AGRAdamW(params)
    run_optimizer(saved, params, [[torch.ones(2, 3)]])

    def hook(optimizer):
        optimizer.param_groups[0]["foreach"] = False
        optimizer.state[params[0]]["exp_avg"].fill_(7.0)

    other = AGRAdamW(params)
    other.register_load_state_dict_post_hook(hook)
    other.load_state_dict(saved.state_dict())
    assert other.param_groups[0]["foreach"] is False
    assert torch.equal(other.state[params[0]]["exp_avg"], torch.full((2, 3), 7.0))


def test_an_untrained_state_of_adal_leaves_nothing_behind():
    params = as_parameters(initial(), torch.float32)
    optimizer = AGRAdamW(params)
    optimizer.load_state_dict(AdaL(params).state_dict())
    assert "decoupled" not in optimizer.param_groups[0]
    run_optimizer(optimizer, params, gradients(1))
    AGRAdamW(params).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("saved", "loading", "message"),
    [
        (torch.optim.AdamW, AGRAdam, "that is decoupled, and that of AGRAdam is L2; load it into AGRAdamW"),
        (torch.optim.Adam, AGRAdamW, "that is L2, and that of AGRAdamW is decoupled; load it into AGRAdam,"),
    ],
)
def test_the_other_kind_of_weight_decay_is_refused(saved, loading, message):
    params = as_parameters(initial(), torch.float32)
    with pytest.raises(ValueError, match=message):
        loading(params).load_state_dict(saved(params, weight_decay=0.1).state_dict())
    loading(params).load_state_dict(saved(params, weight_decay=0.0).state_dict())


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, {"second_moment": "bogus"}, "second_moment='bogus' is not allowed"),
        ({}, {"agr": [True]}, "agr=.True. is not allowed"),
        ({}, {"lr": float("nan")}, "lr=nan is not allowed"),
        ({"foreach": True}, {"agr_steps": -5}, "agr_steps=-5 is not allowed"),
    ],
)
def test_options_of_a_loaded_state_are_checked_before_anything_changes(options, change, message):
    params = as_parameters(initial(), torch.float32)
    saved = AGRAdamW(params).state_dict()
    saved["param_groups"][0].update(change)
    optimizer = AGRAdamW(params, lr=0.5, **options)
    with pytest.raises(ValueError, match=f"the state that AGRAdamW loads: {message}"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["second_moment"] == "raw"


def test_the_kind_of_weight_decay_goes_with_the_state_of_ours_too():
    params = as_parameters(initial(), torch.float32)
    ours = AGRAdamW(params, weight_decay=0.1)
    with pytest.raises(ValueError, match="that is decoupled, and that of AGRAdam is L2"):
        AGRAdam(params).load_state_dict(ours.state_dict())
    stock = torch.optim.Adam(params)
    stock.load_state_dict(ours.state_dict())  # torch's Adam then decays as AdamW
    assert stock.param_groups[0]["decoupled_weight_decay"]
    for decoupled in (True, False):
        adal = AdaL(params, weight_decay=0.1, decoupled=decoupled)
        other = AdaL(params, decoupled=not decoupled)
        other.load_state_dict(adal.state_dict())  # the option is among what is loaded
        assert other.param_groups[0]["decoupled"] == other.param_groups[0]["decoupled_weight_decay"] == decoupled
