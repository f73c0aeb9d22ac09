"""Where a step once gave a wrong answer without a word, or would if it trusted what it remembers of the step before."""

import copy
import functools
import math
import pickle
import re
import sys
import traceback
import warnings

import pytest
import torch
import torch.distributed as dist
from oracle import OURS, WITH_AGR
from ranks import spawn
from torch.nn import Parameter

from agr_hf import AdaL, AGRAdamW, NosAdam, agr, agr_param_groups, attach_agr
from agr_hf.integrations.optimizer_states import complete_flattened_state
from agr_hf.optim.registry import OPTIMIZERS

every_optimizer = pytest.mark.parametrize("name", OURS)
with_agr = pytest.mark.parametrize("name", WITH_AGR)
FUSED = ["agr_adamw", "agr_adam", "adal"]


def make(name, params, **options):
    return OPTIMIZERS[name].cls(params, **options)


def one_step(name, value=2.0, **options):
    param = Parameter(torch.ones(3, 4))
    param.grad = torch.full((3, 4), value)
    optimizer = make(name, [param], **options)
    optimizer.step()
    return param, optimizer


def reloaded(optimizer):
    other = type(optimizer)([Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]])
    other.load_state_dict(optimizer.state_dict())
    return other


COPIES = {
    "reloaded": reloaded,
    "copied": copy.deepcopy,
    "unpickled": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
}


# ---- the suspension counts steps of the group, and nothing else moves it


def grads_of_step(step, shape=(4, 5)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(step))


def run(optimizer, steps):
    for step in steps:
        for param in optimizer.param_groups[0]["params"]:
            param.grad = grads_of_step(step, param.shape)
        optimizer.step()
    return [param.detach().clone() for param in optimizer.param_groups[0]["params"]]


@with_agr
@pytest.mark.parametrize("way", COPIES)
def test_a_suspension_ends_at_the_same_step_however_the_run_was_resumed(name, way):
    """Loading took the largest `step` for the count, though no step without AGR had counted."""
    optimizer = make(name, [Parameter(torch.ones(4, 5))], lr=0.1, agr=False, agr_steps=5)
    run(optimizer, range(10))
    assert optimizer.param_groups[0]["agr_step"] == 10
    optimizer.param_groups[0]["agr"] = True
    resumed = COPIES[way](optimizer)
    assert resumed.param_groups[0]["agr_step"] == 10
    ends = [run(o, range(10, 16)) for o in (optimizer, resumed)]
    assert torch.equal(*(end[0] for end in ends))
    plain = make(name, [Parameter(torch.ones(4, 5))], lr=0.1, agr=False)
    assert torch.equal(ends[0][0], run(plain, range(16))[0])  # five steps were over long ago


@with_agr
def test_a_step_counts_where_any_parameter_has_a_gradient_and_only_there(name):
    params = [Parameter(torch.ones(2, 3)), Parameter(torch.ones(3))]
    others = [Parameter(torch.ones(2, 3))]
    for flags in (True, False, [True, False], [False, False]):
        optimizer = make(name, [{"params": params, "agr": flags}, {"params": others}])
        for i, (vector, other) in enumerate([(True, False), (False, True), (False, False), (True, True)]):
            params[1].grad = torch.ones(3) if vector else None  # a vector, which AGR leaves alone
            others[0].grad = torch.ones(2, 3) if other else None
            optimizer.step()
            assert [group["agr_step"] for group in optimizer.param_groups] == [[1, 0], [1, 1], [1, 1], [2, 2]][i]


@with_agr
@pytest.mark.parametrize("way", COPIES)
def test_a_parameter_that_seldom_has_a_gradient_does_not_move_the_count(name, way):
    optimizer = make(name, [Parameter(torch.ones(2, 2)), Parameter(torch.ones(2, 2))], agr_steps=4)
    seldom, often = optimizer.param_groups[0]["params"]
    for i in range(6):
        seldom.grad = torch.ones(2, 2) if i % 3 == 0 else None
        often.grad = torch.ones(2, 2)
        optimizer.step()
    resumed = COPIES[way](optimizer)
    assert optimizer.param_groups[0]["agr_step"] == resumed.param_groups[0]["agr_step"] == 6


def test_attached_psi_does_not_count_a_step_without_gradients():
    params = [Parameter(torch.zeros(3, 3)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [p]} for p in params], lr=1.0)
    attach_agr(optimizer, steps=2)
    optimizer.step()
    grad = grads_of_step(0, (3, 3))
    for _ in range(3):
        params[0].grad = grad.clone()
        optimizer.step()
    assert [group["agr_step"] for group in optimizer.param_groups] == [3, 0]
    torch.testing.assert_close(params[0].detach(), -(2 * agr(grad) + grad))


def test_attached_psi_counts_a_step_with_a_closure_once():
    param = Parameter(torch.ones(3, 3))
    optimizer = torch.optim.SGD([param], lr=0.1)
    attach_agr(optimizer, steps=5)

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert optimizer.param_groups[0]["agr_step"] == 2


def test_attached_psi_does_not_count_a_step_that_the_scaler_skipped():
    """A fused optimizer of torch's is called all the same, with `found_inf` set, and does nothing."""
    param = Parameter(torch.ones(3, 3))
    optimizer = torch.optim.AdamW([param], lr=0.1, fused=True)
    attach_agr(optimizer, steps=10)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    counts = []
    for i in range(4):
        optimizer.zero_grad()
        scaler.scale((param * (math.inf if i % 2 else 1.0)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        counts.append((optimizer.param_groups[0]["agr_step"], int(optimizer.state[param]["step"])))
    assert counts == [(1, 1), (1, 1), (2, 2), (2, 2)]
    for _ in range(2):  # and without a scaler again
        optimizer.step()
    assert optimizer.param_groups[0]["agr_step"] == 4


# ---- AdaL's range


def warnings_of(optimizer, grad, steps=3):
    param = optimizer.param_groups[0]["params"][0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            param.grad = grad.clone()
            optimizer.step()
    return [w for w in caught if issubclass(w.category, UserWarning)]


@pytest.mark.parametrize("size", [1e10, 1e19])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"decoupled": True}], ids=str)
def test_adal_warns_once_where_its_squares_leave_float32(size, options):
    """(20 x 1e10 x 1e10)^2 is infinite: nothing moves; from 1e19 on inf * 0 makes NaN."""
    for _ in range(2):  # each optimizer by itself
        found = warnings_of(AdaL([Parameter(torch.zeros(4, 5))], **options), torch.full((4, 5), size))
        assert len(found) == 1
        message = str(found[0].message)
        assert "AdaL" in message
        assert "unscale" in message
        assert re.search(r"\d", message), "it says where the range ends"


def test_adal_says_nothing_of_gradients_that_fit():
    for size in (1e-3, 1.0, 1e3, 1e6):
        optimizer = AdaL([Parameter(torch.zeros(4, 5))], lr=0.1)
        assert not warnings_of(optimizer, torch.full((4, 5), size))
        assert (optimizer.param_groups[0]["params"][0] < -0.2).all()
    wide = AdaL([Parameter(torch.zeros(4, 5, dtype=torch.float64))], lr=0.1)
    assert not warnings_of(wide, torch.full((4, 5), 1e19, dtype=torch.float64))
    assert (wide.param_groups[0]["params"][0] < -0.2).all()
    clipped = AdaL([Parameter(torch.zeros(4, 5))], lr=0.1, max_grad_norm=1.0)
    assert not warnings_of(clipped, torch.full((4, 5), 1e10))
    assert (clipped.param_groups[0]["params"][0] < -0.2).all()


# ---- parameters over one piece of memory


def storage(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


SHARED = {
    "the same memory": lambda s: (s, s),
    "the same memory seen otherwise": lambda s: (s, s.t()),
    "overlapping slices": lambda s: (s[0:6], s[4:8]),
    "a slice and the whole": lambda s: (s[2:3], s),
    "strided views that meet": lambda s: (s[:, ::2], s[:, ::3]),
    "the last element": lambda s: (s.flatten()[:64], s.flatten()[63:]),
}
APART = {
    "slices": lambda s: (s[0:4], s[4:8]),
    "columns": lambda s: (s[:, :3], s[:, 3:]),
    "interleaved": lambda s: (s[..., ::2], s[..., 1::2]),
    "interleaved rows": lambda s: (s[::2], s[1::2]),
    "empty ones": lambda s: (s[0:0], s[0:0]),
    "an empty one within another": lambda s: (s, s[4:4]),
    "transposed halves": lambda s: (s[:4].t(), s[4:].t()),
    "checkers": lambda s: (s[::2, ::2], s[1::2, 1::2]),
}


@every_optimizer
@pytest.mark.parametrize("views", SHARED)
def test_two_parameters_over_the_same_memory_are_refused(name, views):
    """Each would be updated from what the other has left, or both at once by two threads."""
    for dtype in (torch.float32, torch.bfloat16):
        one, other = (Parameter(view) for view in SHARED[views](storage(8, 8, dtype=dtype)))
        with pytest.raises(ValueError, match="share memory"):
            make(name, [one, other])
        with pytest.raises(ValueError, match="share memory"):
            make(name, [{"params": [one]}, {"params": [other]}])
        optimizer = make(name, [one])
        with pytest.raises(ValueError, match="share memory"):
            optimizer.add_param_group({"params": [Parameter(storage(2)), other]})
        assert len(optimizer.param_groups) == 1
        one.grad = torch.ones_like(one)
        optimizer.step()
        assert (one != 0).all()


@every_optimizer
def test_memory_shared_by_different_dtypes_is_shared(name):
    base = storage(8, 8)
    with pytest.raises(ValueError, match="share memory"):
        make(name, [Parameter(base), Parameter(base.view(torch.bfloat16)[:, :2])])


@every_optimizer
@pytest.mark.parametrize("views", APART)
def test_parameters_that_share_a_storage_but_no_element_train_as_if_apart(name, views):
    base = torch.linspace(-1, 1, 64).view(8, 8)
    params = [Parameter(view) for view in APART[views](base)]
    others = [Parameter(view.detach().clone()) for view in params]
    optimizer, reference = make(name, [{"params": [p]} for p in params]), make(name, others)
    for _ in range(2):
        for p, q in zip(params, others, strict=True):
            p.grad = grads_of_step(1, p.shape)
            q.grad = grads_of_step(1, q.shape)
        optimizer.step()
        reference.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@every_optimizer
def test_parameters_without_memory_share_none(name):
    """On the meta device all addresses are 0, and so are those of storages that FSDP and ZeRO have emptied."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    make(name, copy.deepcopy(model).to("meta").parameters())
    for param in model.parameters():
        param.untyped_storage().resize_(0)
    make(name, model.parameters())


@pytest.mark.parametrize("name", FUSED)
def test_memory_that_was_freed_is_refused_before_the_step_counts(name):
    param, optimizer = one_step(name)
    moment = next(key for key in optimizer.state[param] if key.endswith("exp_avg"))
    before = optimizer.state[param][moment].clone()
    param.data.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"a tensor has no memory \(its storage was freed\)"):
        optimizer.step()
    assert optimizer.state[param]["step"] == 1
    assert torch.equal(optimizer.state[param][moment], before)


@every_optimizer
def test_tied_modules_share_a_parameter_and_that_is_one(name):
    one, other = torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False)
    other.weight = one.weight
    optimizer = make(name, torch.nn.Sequential(one, other).parameters())
    assert optimizer.param_groups[0]["params"] == [one.weight]


@every_optimizer
def test_a_parameter_that_overlaps_itself_is_refused_and_not_counted(name):
    """torch refuses to write to it, but the step had been counted."""
    param = Parameter(torch.zeros(1, 3).expand(4, 3))
    with pytest.raises((ValueError, RuntimeError)):
        optimizer = make(name, [param])
        param.grad = torch.ones(4, 3)
        try:
            optimizer.step()
        finally:
            assert not optimizer.state
            assert optimizer.param_groups[0].get("agr_step", 0) == 0


@every_optimizer
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", "fast"), ("lr", None), ("lr", torch.ones(2)), ("betas", None), ("betas", (0.9,)), ("betas", ("a", "b", "c")),
        ("eps", None), ("weight_decay", "0.1"), ("rounding", "up"), ("state_dtype", "int8"), ("max_grad_norm", -1.0),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_user_writes_into_a_group_is_refused_before_the_step_counts(name, key, value):
    param, optimizer = one_step(name)
    before = param.detach().clone()
    optimizer.param_groups[0][key] = value
    with pytest.raises(ValueError, match=rf"{key}=.* is not allowed; it must be"):
        optimizer.step()
    assert optimizer.state[param]["step"] == 1
    assert torch.equal(param, before)


@every_optimizer
def test_a_schedule_may_end_a_rounding_error_below_zero(name):
    param, optimizer = one_step(name)
    optimizer.param_groups[0]["lr"] = -1e-20
    optimizer.step()
    assert optimizer.state[param]["step"] == 2


@every_optimizer
def test_a_lazy_parameter_is_refused_with_what_to_do(name):
    with pytest.raises(ValueError, match="no shape yet .* run the model on one batch"):
        make(name, torch.nn.LazyLinear(3).parameters())


@every_optimizer
def test_an_optimizer_without_memory_loads_its_own_state(name):
    """Shapes of a state are planned on the meta device."""
    param = Parameter(torch.ones(3, 4, device="meta"))
    param.grad = torch.ones(3, 4, device="meta")
    optimizer = make(name, [param])
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[param]["step"] == 1


# ---- a graph that the step has made stale


@every_optimizer
def test_backward_through_weights_that_have_changed_since_is_refused(name):
    """torch tells it by their versions, and torch's fused kernel (2.14) does not raise them: AdamW(fused=True) gives a wrong
    gradient here, its other ways an error."""
    for options in ({}, {"foreach": True}, {"foreach": False}, {"capturable": True}):
        for dtype in (torch.float32, torch.bfloat16):
            weight = Parameter(torch.ones(3, 3, dtype=dtype))
            x = torch.ones(3, 3, dtype=dtype, requires_grad=True)
            optimizer = make(name, [weight], lr=0.1, **options)
            loss = (x @ weight).square().sum()
            loss.backward(retain_graph=True)
            optimizer.step()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


# ---- states of others


@every_optimizer
def test_the_state_of_timms_adopt_is_refused(name):
    """Its keys are Adam's, its first moment is of gradients divided by the second's root. It has AdaL's `decoupled` too."""
    adopt = pytest.importorskip("timm.optim", reason="timm is missing: pip install 'agr-hf[train]'").Adopt
    param = Parameter(torch.ones(3, 4))
    param.grad = torch.ones(3, 4)
    saved = adopt([param])
    for _ in range(2):
        saved.step()
    optimizer = make(name, [param])
    with pytest.raises(ValueError, match="another optimizer"):
        optimizer.load_state_dict(saved.state_dict())
    assert not optimizer.state


@pytest.mark.parametrize("cls", [AdaL, NosAdam])
@pytest.mark.parametrize("stock", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("way", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_torchs_optimizers_do_not_train_on_from_moments_of_another_kind(cls, stock, way):
    """They ask for nothing but their keys, so keys that mean another thing need other names."""
    param = Parameter(torch.ones(3, 4))
    param.grad = torch.ones(3, 4)
    saved = cls([param])
    saved.step()
    assert "exp_avg_sq" not in saved.state[param]
    assert cls is NosAdam or "exp_avg" not in saved.state[param]
    other = stock([param], **way)
    with pytest.raises(KeyError):
        other.load_state_dict(saved.state_dict())
        other.step()


@every_optimizer
@pytest.mark.parametrize("capturable", [True, False])
def test_a_loaded_state_whose_step_is_zero_takes_its_first_step_as_the_first(name, capturable):
    """torch.distributed.checkpoint makes such states. ACProp divided by its empty second moment, and Adan took the whole
    gradient for a difference."""
    options = {"lr": 0.1, "capturable": capturable}
    param, optimizer = one_step(name, **options)
    state = copy.deepcopy(optimizer.state_dict())
    for key, value in state["state"][0].items():
        value.fill_(math.inf if key == "pre_l1_norm" else 0.0)
    other = Parameter(torch.ones(3, 4))
    resumed = make(name, [other], **options)
    resumed.load_state_dict(state)
    other.grad = param.grad.clone()
    resumed.step()
    assert torch.equal(other, param)
    if name == "acprop":
        torch.testing.assert_close(other.detach(), torch.full((3, 4), 0.8))
    other.grad = param.grad = torch.full((3, 4), -1.0)
    optimizer.step()
    resumed.step()
    assert torch.equal(other, param)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("betas", [(0.05, 0.999), (0.0, 0.999), (0.9, 0.0)])
def test_fused_is_the_answer_of_the_default_at_small_betas_too(name, betas):
    ends = []
    for fused in (True, None):
        optimizer = make(name, [Parameter(torch.ones(4, 5))], lr=0.1, betas=betas, fused=fused)
        ends.append(run(optimizer, range(3))[0])
    assert torch.equal(*ends)


# ---- a device without float64


@every_optimizer
def test_a_capturable_step_asks_no_device_for_more_than_it_has(name):
    """Apple's GPUs have no float64. Fake tensors stand for them here, and a trap for what is asked of them."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (list, tuple)) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.device.type == "mps" and tensor.dtype == torch.float64:
                    raise TypeError(f"{func}: this device has no float64")
            return out

    with FakeTensorMode(), NoFloat64():
        for options in ({}, {"max_grad_norm": 1.0, "weight_decay": 0.1}, {"lr": torch.tensor(0.1, device="mps")}):
            param = Parameter(torch.ones(3, 4, device="mps"))
            param.grad = torch.ones(3, 4, device="mps")
            optimizer = make(name, [param], capturable=True, **options)
            for _ in range(2):
                optimizer.step()
            assert optimizer.state[param]["step"].device.type == "mps"


ON_A_GPU = [
    {},
    {"max_grad_norm": 1.0, "weight_decay": 0.1, "maximize": True},
    {"rounding": "stochastic", "state_dtype": torch.bfloat16},
    {"rounding": "kahan"},
    {"agr_steps": 2, "second_moment": "regularized", "min_ndim": 0},
    {"foreach": True},
    {"foreach": False},
]


@every_optimizer
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "weight_decay": 0.1}, {"foreach": False}], ids=str)
def test_memory_can_be_estimated_on_fake_tensors(name, options):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = torch.nn.Linear(4, 3)
        optimizer = make(name, model.parameters(), capturable=True, **options)
        for _ in range(2):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
        state = optimizer.state[model.weight]
    assert state[optimizer.state_keys[0]].shape == (3, 4)


@every_optimizer
@pytest.mark.parametrize("options", ON_A_GPU, ids=str)
def test_a_capturable_step_reads_nothing_of_a_gpu_and_mixes_no_devices(name, options):
    """Fake tensors stand for a GPU's: `.item()` of one raises, and so does an operation on two devices."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        try:
            torch.ones(1, device="cuda").copy_(torch.ones(1, device="cuda"))
        except RuntimeError as error:
            pytest.skip(
                f"this torch copies no fake tensors of a GPU where there is no driver: {str(error).splitlines()[0]}"
            )
    options = {
        key: value for key, value in options.items() if key in OPTIMIZERS[name].cls.options or key == "weight_decay"
    }
    with FakeTensorMode():
        params = [Parameter(torch.ones(3, 4, device="cuda", dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)]
        optimizer = make(name, params, capturable=True, **options)
        for _ in range(3):
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
        for param in params:
            state = optimizer.state[param]
            assert {value.device.type for value in state.values()} == {"cuda"}


# ---- loading


@every_optimizer
@pytest.mark.parametrize("keys", [["capturable"], ["foreach"], ["fused"], ["maximize"],
                                  ["capturable", "foreach", "fused", "maximize"]], ids=str)  # fmt: skip
def test_a_state_of_a_version_without_an_option_is_loaded(name, keys):
    _, saved = one_step(name)
    state = copy.deepcopy(saved.state_dict())
    for key in keys:
        del state["param_groups"][0][key]
    param = Parameter(torch.ones(3, 4))
    optimizer = make(name, [param])
    optimizer.load_state_dict(state)
    assert {key: optimizer.param_groups[0][key] for key in keys} == {key: optimizer.defaults[key] for key in keys}
    param.grad = torch.ones(3, 4)
    optimizer.step()
    assert optimizer.state[param]["step"] == 2


@every_optimizer
def test_what_the_user_keeps_in_the_state_survives_as_torch_keeps_it(name):
    _, saved = one_step(name)
    (entry,) = saved.state.values()
    entry["my_note"] = torch.tensor([1.0, 2.0])
    entry["my_count"] = 7
    for stock in (False, True):
        param, other = one_step(name)
        if stock:  # and so does AdamW
            saved = torch.optim.AdamW([param])
            saved.step()
            saved.state[param].update(my_note=torch.tensor([1.0, 2.0]), my_count=7)
            other = torch.optim.AdamW([param])
        other.load_state_dict(saved.state_dict())
        assert torch.equal(other.state[param]["my_note"], torch.tensor([1.0, 2.0]))
        assert other.state[param]["my_count"] == 7
        other.step()
        assert torch.equal(copy.deepcopy(other).state_dict()["state"][0]["my_note"], torch.tensor([1.0, 2.0]))


@every_optimizer
def test_the_default_device_is_no_business_of_loading(name):
    param, optimizer = one_step(name)
    state = copy.deepcopy(optimizer.state_dict())
    for as_number in (False, True):
        if as_number:
            state["state"][0]["step"] = 1.0
        with torch.device("meta"):
            optimizer.load_state_dict(state)
            clone = copy.deepcopy(optimizer)
        for loaded in (optimizer, clone):
            (entry,) = loaded.state.values()
            assert {value.device.type for value in entry.values()} == {"cpu"}
    with torch.device("meta"):
        optimizer.step()
    assert param.isfinite().all()
    assert optimizer.state[param]["step"] == 2


def moment(name):
    """The key of a moment, whatever the rule calls it."""
    _, optimizer = one_step(name)
    (entry,) = optimizer.state.values()
    return next(key for key, value in entry.items() if value.shape == (3, 4))


def assert_refused_before_anything_changes(name, state):
    param, optimizer = one_step(name)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert after["state"][0].keys() == before["state"][0].keys()
    for key, value in before["state"][0].items():
        assert torch.equal(after["state"][0][key], value)
    optimizer.step()
    assert optimizer.state[param]["step"] == 2


WRONG = {
    "a list for a moment": ("moment", [1.0] * 12),
    "a number for a moment": ("moment", 0.5),
    "None for a moment": ("moment", None),
    "a word for a moment": ("moment", "ones"),
    "a sparse moment": ("moment", torch.ones(3, 4).to_sparse()),
    "a complex moment": ("moment", torch.ones(3, 4, dtype=torch.complex64)),
    "a moment without memory": ("moment", torch.ones(3, 4, device="meta")),
    "a word for the step": ("step", "three"),
    "None for the step": ("step", None),
    "a list for the step": ("step", [1.0]),
    "two steps": ("step", torch.ones(2)),
    "a step without memory": ("step", torch.ones((), device="meta")),
    "a step that is NaN": ("step", math.nan),
    "a step below zero": ("step", -1.0),
    "a list for an entry": ("entry", [1]),
    "a word for an entry": ("entry", "step"),
    "a list for the state": ("state", [1]),
    "None for the state": ("state", None),
    "a word for the state": ("state", "step"),
    "None for the groups": ("param_groups", None),
    "a number for a group": ("param_groups", [1]),
    "no groups": ("param_groups", {}),
}


@every_optimizer
@pytest.mark.parametrize("wrong", WRONG)
def test_a_state_of_wrong_types_is_refused_before_anything_changes(name, wrong):
    part, value = WRONG[wrong]
    _, saved = one_step(name)
    state = copy.deepcopy(saved.state_dict())
    if part in ("state", "param_groups"):
        state[part] = value
    elif part == "entry":
        state["state"][0] = value
    else:
        state["state"][0][moment(name) if part == "moment" else part] = value
    assert_refused_before_anything_changes(name, state)


@every_optimizer
@pytest.mark.parametrize("part", ["state", "param_groups"])
def test_a_dict_that_is_no_state_is_refused_before_anything_changes(name, part):
    _, saved = one_step(name)
    state = copy.deepcopy(saved.state_dict())
    del state[part]
    assert_refused_before_anything_changes(name, state)


@every_optimizer
@pytest.mark.parametrize("way", ["copied", "unpickled", "reloaded"])
def test_copies_have_no_key_that_their_original_lacks(name, way):
    """torch gives them `differentiable`, and a checkpoint of one would claim it."""
    _, optimizer = one_step(name)
    other = COPIES[way](optimizer)
    assert "differentiable" not in other.param_groups[0]
    assert "differentiable" not in other.defaults
    assert set(other.param_groups[0]) == set(optimizer.param_groups[0])
    assert set(other.defaults) == set(optimizer.defaults)


def test_a_flattened_state_of_adamw_loads_when_its_options_are_completed():
    """torch.distributed.checkpoint looks for `param_groups.0.weight.agr` in it, before an optimizer sees the state: a bare
    KeyError without `complete_flattened_state`."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    def trained(cls, steps=1):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        optimizer = cls(model.parameters())
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
        return model, optimizer

    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    for saved in (AGRAdamW, torch.optim.AdamW):
        model, optimizer = trained(saved, 3)
        state = get_optimizer_state_dict(model, optimizer, options=flat)
        assert "state.0.weight.exp_avg" in state
        other_model, other = trained(AGRAdamW, 0)
        complete_flattened_state(state, other_model, other)
        set_optimizer_state_dict(other_model, other, optim_state_dict=state, options=flat)
        assert other.param_groups[0]["agr"] is True
        for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
            assert other.state[q]["step"] == 3
            assert torch.equal(other.state[q]["exp_avg"], optimizer.state[p]["exp_avg"])


# ---- groups that somebody else has changed


def flattened(params):
    flat = Parameter(torch.cat([param.detach().flatten() for param in params]))
    flat.grad = torch.ones_like(flat)
    return flat


@pytest.mark.parametrize("name", [*OURS, "attached"])
def test_a_vector_that_the_user_puts_in_the_place_of_matrices_just_trains(name):
    params = [Parameter(torch.ones(2, 3)), Parameter(torch.ones(3))]
    if name == "attached":
        optimizer = torch.optim.SGD(params, lr=0.1)
        attach_agr(optimizer)
    else:
        optimizer = make(name, params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    other = Parameter(torch.ones(5))
    other.grad = torch.ones(5)
    optimizer.param_groups[0]["params"] = [other]
    optimizer.step()
    assert (other < 1).all()


@pytest.mark.parametrize("name", [*WITH_AGR, "adal", "attached"])  # others do not ask whose elements these are
@pytest.mark.parametrize("after_a_step", [False, True])
def test_layers_that_deepspeed_has_flattened_are_refused(name, after_a_step, monkeypatch):
    """Only DeepSpeed replaces layers by one flat tensor, and a process that it does so in has it imported."""
    monkeypatch.setitem(sys.modules, "deepspeed", sys)
    params = [Parameter(torch.ones(2, 3)), Parameter(torch.ones(3))]
    if name == "attached":
        optimizer = torch.optim.SGD(params, lr=0.1)
        attach_agr(optimizer)
    else:
        optimizer = make(name, params)
    if after_a_step:
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    flat = flattened(params)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match="ZeRO"):
        optimizer.step()
    assert torch.equal(flat.detach(), flattened(params).detach())
    assert flat not in optimizer.state


# ---- what two processes see


def check_a_step_refused_for_its_mesh_has_not_been_counted():
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    params = []
    for ranks in ([0], [1]):
        mesh = DeviceMesh("cpu", ranks)
        param = Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
        param.grad = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
        params.append(param)
    for name in OURS:
        optimizer = make(name, params, max_grad_norm=1.0)
        with pytest.raises(RuntimeError, match="not part of"):
            optimizer.step()
        assert not optimizer.state
        assert optimizer.param_groups[0].get("agr_step", 0) == 0
        assert torch.equal(params[dist.get_rank()].to_local().detach(), torch.ones(4, 3))


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 2))


def train(model, optimizer, steps=4):
    x = torch.linspace(-1, 1, 32).view(8, 4)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [param.detach().clone() for param in model.parameters()]


def check_a_list_of_flags_under_zero_redundancy_names_the_way_out():
    """Each rank holds a part of a group's parameters, and the list is of all of them."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = network()
    flags = [param.ndim > 1 for param in model.parameters()]
    with pytest.raises((ValueError, RuntimeError, TypeError), match="agr_param_groups"):
        optimizer = ZeroRedundancyOptimizer([{"params": list(model.parameters()), "agr": flags}], AGRAdamW, lr=0.01)
        train(model, optimizer, 1)


def check_groups_under_zero_redundancy_train_as_one_process_does():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    shared, alone = network(), network()
    for options in ({}, {"agr_steps": 2}):
        ends = [
            train(shared, ZeroRedundancyOptimizer(agr_param_groups(shared), AGRAdamW, lr=0.01, **options)),
            train(alone, AGRAdamW(agr_param_groups(alone), lr=0.01, **options)),
        ]
        for p, q in zip(*ends, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


IN_TWO_PROCESSES = [
    check_a_step_refused_for_its_mesh_has_not_been_counted,
    check_a_list_of_flags_under_zero_redundancy_names_the_way_out,
    check_groups_under_zero_redundancy_train_as_one_process_does,
]


def check_all_and_write(folder):
    for check in IN_TWO_PROCESSES:
        try:
            check()
            answer = ""
        except BaseException:  # pytest.raises fails with one that is no Exception
            answer = traceback.format_exc()
        (folder / f"{check.__name__}.{dist.get_rank()}").write_text(answer)
        dist.barrier()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each check said in each process: they take seconds to start, so all checks share them."""
    if not dist.is_available():
        pytest.skip("this torch was built without torch.distributed")
    folder = tmp_path_factory.mktemp("two_processes")
    spawn(functools.partial(check_all_and_write, folder), folder)
    return folder


@pytest.mark.parametrize("check", IN_TWO_PROCESSES, ids=lambda check: check.__name__)
def test_in_two_processes(check, two_processes):
    for rank in range(2):
        answer = (two_processes / f"{check.__name__}.{rank}").read_text()
        assert not answer, f"rank {rank}:\n{answer}"


# ---- what a step remembers of the one before


def initial_parameters():
    """Sizes around those of vectors and blocks, memory formats, and views of larger tensors."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    pair = randn(6, 8)
    tensors = [
        randn(0, 5), randn(1, 1), randn(3, 5), randn(4, 4), randn(17), randn(1, 65_537), randn(4, 3, 1, 1),
        randn(6, 4, 3, 3).to(memory_format=torch.channels_last),
        randn(6, 7, 2)[..., 0], randn(30)[3:23].view(4, 5), pair[:, ::2], pair[:, 1::2],
    ]  # fmt: skip
    return [Parameter(tensor) for tensor in tensors]


SMALL, SQUARE, LARGE, CONV = 2, 3, 5, 7


@functools.cache
def gradient_pool(step):
    generator = torch.Generator().manual_seed(100 + step)
    # Heavy tails, so that Psi is far from the identity.
    return [torch.randn(p.shape, generator=generator) ** 3 for p in initial_parameters()]


class Training:
    """Parameters, their optimizer with two groups of different options, and how gradients come."""

    def __init__(self, name, **options):
        self.params = initial_parameters()
        self.positions = {id(param): i for i, param in enumerate(self.params)}
        self.optimizer = make(
            name,
            [
                {"params": self.params[:8]},
                {"params": self.params[8:], "lr": 0.02, "weight_decay": 0.1, "max_grad_norm": 0.5},
            ],
            **{"lr": 0.01, **options},
        )
        self.laid = lambda grad: grad
        self.in_place = False
        self.missing = ()
        self.compared = False

    def gradients(self, step):
        """A gradient, or None, for each parameter of the groups in their order."""
        grads = []
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                i = self.positions.get(id(param), 0)
                grad = (
                    gradient_pool(step)[i] if param.shape == gradient_pool(step)[i].shape else torch.ones(param.shape)
                )
                grads.append(None if i in self.missing else self.laid(grad.to(param.dtype)))
        return grads

    def step(self, step, *others):
        """One step of this optimizer and of others over like parameters, with the very same gradients.

        Alone, it is compared with one that remembers nothing, once `compared` is set.
        """
        if self.compared and not others:
            fresh = fresh_one(self.optimizer)
            self.step(step, fresh)
            assert_equal_optimizers(self.optimizer, fresh)
            return
        grads = self.gradients(step)
        for optimizer in (self.optimizer, *others):
            params = [param for group in optimizer.param_groups for param in group["params"]]
            for param, grad in zip(params, grads, strict=True):
                if self.in_place and grad is not None and param.grad is not None:
                    param.grad.copy_(grad)
                else:
                    param.grad = grad.clone() if self.in_place and grad is not None else grad
            optimizer.step()


def twin(param):
    """A parameter of the same numbers, strides and offset in memory of its own."""
    memory = param.untyped_storage().clone()
    tensor = torch.empty(0, dtype=param.dtype).set_(memory, param.storage_offset(), param.shape, param.stride())
    assert torch.equal(tensor, param)
    return Parameter(tensor)


def fresh_one(optimizer):
    """An optimizer that remembers nothing, over twins of the parameters, with the state loaded."""
    groups = [
        {**{key: copy.deepcopy(value) for key, value in group.items() if key != "params"},
         "params": [twin(param) for param in group["params"]]}
        for group in optimizer.param_groups
    ]  # fmt: skip
    other = type(optimizer)(groups)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other


def assert_equal_optimizers(one, other):
    params = [[param for group in o.param_groups for param in group["params"]] for o in (one, other)]
    for i, (p, q) in enumerate(zip(*params, strict=True)):
        which = f"parameter {i} of shape {tuple(p.shape)}"
        assert p.dtype == q.dtype, which
        assert torch.equal(p, q), which
        assert p.isfinite().all(), which
        assert one.state[p].keys() == other.state[q].keys(), which
        for key, value in one.state[p].items():
            assert torch.equal(value, other.state[q][key]), f"{key} of {which}"
            assert value.dtype == other.state[q][key].dtype or not p.numel(), f"{key} of {which}"


def tensors_of(run, param):
    """The moments of a parameter, by key."""
    return {key: v for key, v in run.optimizer.state[param].items() if v.shape == param.shape and key != "step"}


# Each takes a run in the middle and changes what a kept plan might still believe.
CHANGES = {}


def change(text):
    def register(function):
        CHANGES[text] = function
        return function

    return register


change("nothing")(lambda run: None)


@change("gradients filled in place")
def _(run):
    for param in run.params:
        param.grad = param.grad.clone()  # other tests take the same ones
    run.in_place = True
    run.step(3)


@change("gradients of other strides")
def _(run):
    run.laid = lambda grad: grad.t().contiguous().t() if grad.ndim == 2 else grad


@change("gradients in channels_last")
def _(run):
    run.laid = lambda grad: grad.to(memory_format=torch.channels_last) if grad.ndim == 4 else grad


@change("gradients with holes")
def _(run):
    run.laid = lambda grad: torch.stack([grad, grad], -1)[..., 0]


@change("gradients with holes for one step, then dense ones")
def _(run):
    run.laid = lambda grad: torch.stack([grad, grad], -1)[..., 0]
    run.step(3)
    run.laid = lambda grad: grad


@change("two parameters lose their gradients for two steps")
def _(run):
    run.missing = (SMALL, LARGE)
    run.step(3)
    run.step(4)
    run.missing = ()


@change("a parameter has no gradient any more")
def _(run):
    run.missing = (CONV,)


@change("all lose their gradients for a step")
def _(run):
    run.missing = range(len(run.params))
    run.step(3)
    run.missing = ()


@change("a step is refused")
def _(run):
    param = run.params[SQUARE]
    param.grad = torch.ones_like(param).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        run.optimizer.step()


@change("a group is added")
def _(run):
    late = [Parameter(torch.ones(4, 6)), Parameter(torch.ones(3, 5))]
    run.optimizer.add_param_group({"params": late, "lr": 0.05})
    run.step(3)


@change("a state is loaded")
def _(run):
    run.step(3)
    saved = copy.deepcopy(run.optimizer.state_dict())
    run.step(4)
    run.optimizer.load_state_dict(saved)


@change("the model goes to bfloat16")
def _(run):
    for param in run.params:
        param.data = param.data.bfloat16()
    run.step(3)


@change("the model goes to bfloat16 and back")
def _(run):
    for param in run.params:
        param.data = param.data.bfloat16()
    run.step(3)
    for param in run.params:
        param.data = param.data.float()


@change("the model goes to float64")
def _(run):
    for param in run.params:
        param.data = param.data.double()
    run.step(3)


@change("the model goes to channels_last")
def _(run):
    for param in run.params:
        if param.ndim == 4:
            param.data = param.data.contiguous(memory_format=torch.channels_last)


@change("the model leaves channels_last")
def _(run):
    run.params[CONV].data = run.params[CONV].data.contiguous()
    assert run.params[CONV].is_contiguous()


@change("agr is switched off")
def _(run):
    for group in run.optimizer.param_groups:
        group["agr"] = False


@change("agr is switched off for a step")
def _(run):
    run.optimizer.param_groups[0]["agr"] = False
    run.step(3)
    run.optimizer.param_groups[0]["agr"] = True


@change("agr becomes a list")
def _(run):
    group = run.optimizer.param_groups[0]
    group["agr"] = [i % 2 == 0 for i in range(len(group["params"]))]


@change("a list of agr changes in place")
def _(run):
    for group in run.optimizer.param_groups:
        group["agr"] = [True] * len(group["params"])
    run.step(3)
    for group in run.optimizer.param_groups:
        group["agr"][SMALL] = False


@change("agr_steps is reached")
def _(run):
    for group in run.optimizer.param_groups:
        group["agr_steps"] = 3  # of which two are made


@change("min_ndim and second_moment change")
def _(run):
    run.optimizer.param_groups[0].update(min_ndim=0, second_moment="regularized")


@change("data is replaced")
def _(run):
    for param in run.params:
        param.data = param.data * 0.5


@change("data is exchanged")
def _(run):
    one, other = run.params[SQUARE], Parameter(torch.ones(4, 4))
    one.data, other.data = other.data, one.data
    run.step(3)
    one.data, other.data = other.data, one.data


@change("data is transposed in place of itself")
def _(run):
    run.params[SQUARE].data = run.params[SQUARE].data.t()
    assert not run.params[SQUARE].is_contiguous()


@change("data becomes slices of one vector")
def _(run):
    vector, start = torch.cat([param.detach().reshape(-1) for param in run.params]), 0
    for param in run.params:
        param.data = vector[start : start + param.numel()].view(param.shape)
        start += param.numel()


@change("data is given memory again")
def _(run):
    """As FSDP frees and refills the storage of a parameter."""
    for param in run.params:
        if param.numel() and param.is_contiguous() and not param.storage_offset():
            kept, memory = param.detach().clone(), param.untyped_storage()
            size = memory.nbytes()
            memory.resize_(0)
            memory.resize_(size)
            param.data.copy_(kept)


@change("tensors are swapped")
def _(run):
    for param in run.params[2:7]:
        param.grad = None
        torch.utils.swap_tensors(param, Parameter(param.detach() * 0.5))


@change("a moment is replaced")
def _(run):
    for param in run.params:
        for key, value in tensors_of(run, param).items():
            run.optimizer.state[param][key] = value * 0.5


@change("a moment is replaced by one of other strides")
def _(run):
    for param in run.params:
        if param.ndim == 2:
            for key, value in tensors_of(run, param).items():
                run.optimizer.state[param][key] = value.t().contiguous().t()


@change("a moment is replaced by one with holes")
def _(run):
    for param in run.params:
        for key, value in tensors_of(run, param).items():
            run.optimizer.state[param][key] = torch.stack([value, value], -1)[..., 0]


@change("moments are rounded to bfloat16")
def _(run):
    for param in run.params:
        for key, value in tensors_of(run, param).items():
            run.optimizer.state[param][key] = value.bfloat16()


@change("moments are given other memory under the same tensors")
def _(run):
    for param in run.params:
        for value in run.optimizer.state[param].values():
            value.data = value.data.clone()


@change("the whole state is replaced by an equal copy")
def _(run):
    copies = {param: {key: v.clone() for key, v in entry.items()} for param, entry in run.optimizer.state.items()}
    run.optimizer.state = type(run.optimizer.state)(dict, copies)


@change("the entries of the state are replaced by equal copies")
def _(run):
    for param in run.params:
        run.optimizer.state[param] = dict(run.optimizer.state[param])


@change("the state is cleared")
def _(run):
    run.optimizer.state.clear()


@change("the state of one parameter is dropped")
def _(run):
    del run.optimizer.state[run.params[SQUARE]]


@change("steps are replaced")
def _(run):
    for param in run.params:
        run.optimizer.state[param]["step"] = torch.tensor(50.0)


@change("steps are replaced by one tensor for all")
def _(run):
    """As a universal checkpoint of DeepSpeed's stage 3 shares it."""
    shared = torch.tensor(50.0)
    for param in run.params:
        run.optimizer.state[param]["step"] = shared


@change("steps are filled in place")
def _(run):
    for i, param in enumerate(run.params):
        run.optimizer.state[param]["step"].fill_(20.0 + i)


@change("hyperparameters change before each step")
def _(run):
    betas = run.optimizer.defaults["betas"]
    for step, group in ((3, run.optimizer.param_groups[0]), (4, run.optimizer.param_groups[1])):
        group.update(lr=0.03, eps=1e-3, weight_decay=0.2, maximize=True, betas=tuple(beta * 0.9 for beta in betas))
        run.step(step)


@change("the rate becomes a tensor, and is filled")
def _(run):
    rate = torch.tensor(0.125)
    run.optimizer.param_groups[0]["lr"] = rate
    run.step(3)
    rate.fill_(0.25)


@change("clipping is switched on and off")
def _(run):
    first, second = run.optimizer.param_groups
    first["max_grad_norm"], second["max_grad_norm"] = 0.25, None
    run.step(3)
    first["max_grad_norm"] = None


@change("foreach is asked for")
def _(run):
    run.optimizer.param_groups[0]["foreach"] = True
    run.optimizer.param_groups[1]["foreach"] = False


@change("foreach is asked for and taken back")
def _(run):
    for group in run.optimizer.param_groups:
        group["foreach"] = True
    run.step(3)
    for group in run.optimizer.param_groups:
        group["foreach"] = None


@change("parameters are reordered")
def _(run):
    run.optimizer.param_groups[0]["params"].reverse()


@change("parameters move between groups")
def _(run):
    first, second = run.optimizer.param_groups
    second["params"].append(first["params"].pop(SQUARE))


@change("a parameter is removed")
def _(run):
    del run.optimizer.state[run.optimizer.param_groups[0]["params"].pop(SMALL)]


@change("a parameter is replaced by another of its shape")
def _(run):
    params = run.optimizer.param_groups[0]["params"]
    del run.optimizer.state[params[SMALL]]
    params[SMALL] = Parameter(torch.ones(3, 5))


@change("a group is removed")
def _(run):
    for param in run.optimizer.param_groups.pop()["params"]:
        del run.optimizer.state[param]


@change("groups are replaced by equal ones")
def _(run):
    run.optimizer.param_groups = [{**g, "params": list(g["params"])} for g in run.optimizer.param_groups]


@change("a parameter is frozen with its gradient left")
def _(run):
    run.params[SQUARE].requires_grad_(False)


def goes_on_as(copied):
    def goes_on(run):
        original = run.optimizer
        places = [run.positions[id(param)] for group in original.param_groups for param in group["params"]]
        run.optimizer = copied(original)
        run.params = [param for group in run.optimizer.param_groups for param in group["params"]]
        run.positions = {id(param): i for param, i in zip(run.params, places, strict=True)}

    return goes_on


change("a copy goes on")(goes_on_as(copy.deepcopy))
change("an unpickled one goes on")(goes_on_as(COPIES["unpickled"]))


@change("a copy goes its own way")
def _(run):
    clone = copy.deepcopy(run.optimizer)
    run.step(3, clone)
    clone.step()


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        (name, changed)
        for name in OURS
        for changed in CHANGES
        if name in WITH_AGR or not changed.startswith(("agr", "a list of agr", "min_ndim"))
    ],
)
def test_a_step_knows_of_every_change_since_the_last(name, changed):
    """Steps of the change and three more equal, to the bit, those of optimizers made from the same numbers in between."""
    run = Training(name)
    for step in range(2):
        run.step(step)
    run.compared = True
    CHANGES[changed](run)
    fresh = fresh_one(run.optimizer)
    for step in range(5, 8):
        run.step(step, fresh)
    assert_equal_optimizers(run.optimizer, fresh)


@every_optimizer
def test_gradients_of_another_dtype_are_taken_as_they_come(name):
    """bfloat16 weights with float32 gradients, then with bfloat16 ones."""
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype (2.10 and later do)")
    params, others = ([Parameter(torch.ones(4, 5, dtype=torch.bfloat16))] for _ in range(2))
    optimizer, reference = make(name, params, lr=0.01), make(name, others, lr=0.01)
    params[0].grad_dtype = None
    others[0].grad_dtype = None
    for step, dtype in enumerate([torch.float32, torch.float32, torch.bfloat16, torch.float32]):
        grad = grads_of_step(step).bfloat16()  # which both dtypes hold
        params[0].grad, others[0].grad = grad.to(dtype), grad.float()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(params[0], others[0], rtol=1e-2, atol=1e-3)
    for p, q in zip(tensors_by_key(optimizer), tensors_by_key(reference), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def tensors_by_key(optimizer):
    (entry,) = optimizer.state.values()
    return list(entry.values())
