"""bfloat16 that trains: rounding at random and Kahan's compensation, the same in C, in lists and in the reference."""

import copy
import io

import pytest
import torch
from oracle import OURS
from ranks import spawn
from torch.nn import Parameter

from agr_hf import AGRAdamW
from agr_hf.optim import reference
from agr_hf.optim.registry import OPTIMIZERS
from agr_hf.optim.rounding import COMPENSATION, draw, mix, round_at_random
from agr_hf.optim.shards import local

ROUNDINGS = ["nearest", "stochastic", "kahan"]
SHAPES = [(300, 700), (64, 8, 3, 3), (17,), (1, 1), (0, 5)]


def given(shape, seed, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def train(name, steps=5, dtype=torch.bfloat16, shapes=SHAPES, **options):
    params = [Parameter(given(shape, i, dtype)) for i, shape in enumerate(shapes)]
    optimizer = OPTIMIZERS[name].cls(params, lr=1e-3, **options)
    take_steps(optimizer, range(steps))
    return params, optimizer


def take_steps(optimizer, seeds):
    for seed in seeds:
        for i, param in enumerate(optimizer.param_groups[0]["params"]):
            param.grad = given(param.shape, 100 * seed + i, param.dtype)
        optimizer.step()


def bits(tensor):
    return tensor.detach().contiguous().view(torch.int16).to(torch.int32)


def tensors_of(optimizer):
    return [value for state in optimizer.state.values() for value in state.values()]


# ---- the numbers


def test_rounding_at_random_is_the_reference():
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-100, 100, (50_000,), generator=generator)
    wide = torch.randn(50_000, generator=generator) * 2.0**exponents
    random = torch.randint(0, 65_536, (50_000,), generator=generator)
    wanted = reference.stochastic_bfloat16(wide.double(), random.double() / 65_536)
    assert torch.equal(round_at_random(wide, random).double(), wanted)


def test_what_is_no_number_stays_what_it_is():
    wide = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1.0, 0.0, 0.0])
    # NaNs with all bits set: what is added to them carries over, to a zero of the other sign.
    wide.view(torch.int32)[-2:] = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32)
    for random in (0, 1, 65_535):
        rounded = round_at_random(wide, torch.full((8,), random))
        torch.testing.assert_close(rounded.float(), wide, rtol=0, atol=0, equal_nan=True)


def test_rounding_at_random_has_no_bias():
    count = 1_000_000
    value = 1.0 + 0.3 / 128  # 0.3 of the way from 1 to the next bfloat16
    up = round_at_random(torch.full((count,), value), draw(12_345, count, torch.device("cpu")) & 0xFFFF) > 1
    assert abs(up.double().mean().item() - 0.3) < 4 * (0.3 * 0.7 / count) ** 0.5


def test_random_bits_of_elements_steps_and_tensors_have_nothing_in_common():
    count, cpu = 200_000, torch.device("cpu")
    first = [mix(mix(mix(seed) ^ index) ^ step) for seed in (0, 1) for index in (0, 1) for step in (1, 2, 3)]
    rows = torch.stack([draw(number, count, cpu).double() for number in first]) / 2**32
    assert torch.all((rows.mean(1) - 0.5).abs() < 5 * (1 / 12 / count) ** 0.5)
    shifted = torch.cat([rows, rows.roll(1, dims=1), rows.roll(256, dims=1)])
    correlations = torch.corrcoef(shifted) - torch.eye(len(shifted))
    assert correlations.abs().max() < 6 / count**0.5
    halves = torch.stack([draw(7, count, cpu) & 0xFFFF, draw(7, count, cpu) >> 16]).double()
    assert abs(torch.corrcoef(halves)[0, 1]) < 6 / count**0.5


# ---- the optimizers


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", [name for name in OURS if getattr(OPTIMIZERS[name].cls, "native_rule", None)])
def test_native_and_lists_round_alike(name, rounding, state_dtype):
    ends = []
    for options in ({}, {"foreach": False}, {"foreach": True}):
        params, optimizer = train(name, rounding=rounding, state_dtype=state_dtype, weight_decay=0.1, **options)
        kept = [optimizer.state[param].get(COMPENSATION, torch.zeros_like(param)) for param in params]
        ends.append(
            ([bits(param) for param in params], [p.double() + c.double() for p, c in zip(params, kept, strict=True)])
        )
    assert type(optimizer.plan.parts[0]).__name__ == "ListsPart"
    for others, wide in ends[1:]:
        for one, other, a, b in zip(ends[0][0], others, ends[0][1], wide, strict=True):
            # A float32 that differs in its last bit may fall to the other side.
            assert (one != other).float().mean().nan_to_num() < 2e-3
            torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("name", OURS)
def test_small_updates_are_lost_to_nearest_and_kept_by_the_others(name):
    """Each update is 1/39 of a weight's spacing in bfloat16."""
    moved = {}
    for rounding in (*ROUNDINGS, "float32"):
        dtype = torch.float32 if rounding == "float32" else torch.bfloat16
        options = {} if rounding == "float32" else {"rounding": rounding}
        param = Parameter(torch.ones(64, 64, dtype=dtype))
        optimizer = OPTIMIZERS[name].cls([param], lr=1e-4, **options)
        for step in range(300):
            param.grad = torch.full((64, 64), 1.0 + 0.01 * (step % 7), dtype=dtype)
            optimizer.step()
        rest = optimizer.state[param].get(COMPENSATION, torch.zeros(()))
        moved[rounding] = (1 - (param.double() + rest.double())).mean().item()
    assert moved["nearest"] == 0
    assert moved["float32"] > 1e-2
    assert moved["kahan"] == pytest.approx(moved["float32"], rel=0.05)
    assert moved["stochastic"] == pytest.approx(moved["float32"], rel=0.05)


def test_kahan_keeps_a_parameter_as_the_reference_does():
    params, optimizer = train("agr_adamw", steps=1, rounding="kahan")
    start = [given(shape, i).double() for i, shape in enumerate(SHAPES)]
    for param, theta, i in zip(params, start, range(len(params)), strict=True):
        rule = reference.agr_adamw if theta.ndim >= 2 else reference.adamw
        state = {}
        options = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
        wanted, rest = reference.kahan_bfloat16(rule(theta, given(theta.shape, i).double(), state, 1, **options))
        assert (param.double() != wanted).double().mean().nan_to_num() < 1e-3
        same = param.double() == wanted
        torch.testing.assert_close(
            optimizer.state[param][COMPENSATION].double()[same], rest[same], rtol=0.02, atol=1e-6
        )


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_float32_parameters_are_left_alone(rounding):
    plain, optimizer = (
        train("agr_adamw", dtype=torch.float32)[0],
        train("agr_adamw", dtype=torch.float32, rounding=rounding),
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, optimizer[0], strict=True))
    assert all(COMPENSATION not in state for state in optimizer[1].state.values())


@pytest.mark.parametrize("options", [{}, {"foreach": True}], ids=["native", "lists"])
def test_the_seed_and_nothing_else_decides(options):
    def end(**more):
        return [bits(param) for param in train("agr_adamw", rounding="stochastic", **options, **more)[0]]

    def same(one, other):
        return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    first = end()
    torch.manual_seed(99)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before % 2 + 1)
        assert same(first, end())
    finally:
        torch.set_num_threads(before)
    assert not same(first, end(rounding_seed=1))


def test_a_block_of_a_large_tensor_draws_its_own_numbers():
    """Lists work in blocks of 262,144 elements, C in chunks of 65,536."""
    param = Parameter(torch.ones(700_000, 1, dtype=torch.bfloat16))
    ends = []
    for options in ({}, {"foreach": False}, {"foreach": None, "fused": False}):
        copied = Parameter(param.detach().clone())
        optimizer = AGRAdamW([copied], lr=1e-3, rounding="stochastic", weight_decay=0, **options)
        copied.grad = torch.ones_like(copied)
        optimizer.step()
        ends.append(bits(copied))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])
    moved = (ends[0] != ends[0].max()).view(-1)
    blocks = moved[: 2 * 262_144].view(2, -1)
    assert not torch.equal(*blocks)


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_resumed_run_is_the_uninterrupted_one(rounding, state_dtype):
    options = {"rounding": rounding, "state_dtype": state_dtype, "rounding_seed": 5}
    params, optimizer = train("agr_adan", steps=6, **options)
    halfway, first = train("agr_adan", steps=3, **options)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = OPTIMIZERS["agr_adan"].cls(halfway, lr=1.0)  # the options come with the state
    resumed.load_state_dict(torch.load(file, weights_only=True))
    take_steps(resumed, range(3, 6))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(params, halfway, strict=True))
    found, wanted = tensors_of(resumed), tensors_of(optimizer)
    assert [value.dtype for value in found] == [value.dtype for value in wanted]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert resumed.param_groups[0]["state_dtype"] == (None if state_dtype is None else "bfloat16")


def test_kahan_begins_with_a_state_of_torchs_adamw_and_ends_in_one():
    params = [Parameter(given(shape, i)) for i, shape in enumerate(SHAPES)]
    stock = torch.optim.AdamW(params, lr=1e-3)
    take_steps(stock, range(2))
    optimizer = AGRAdamW(params, lr=1e-3, rounding="kahan")
    optimizer.load_state_dict(stock.state_dict())
    take_steps(optimizer, range(2, 4))
    assert optimizer.state[params[0]][COMPENSATION].abs().sum() > 0
    stock.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take_steps(stock, range(4, 5))


def test_rounding_may_change_in_the_middle_of_a_run():
    params, optimizer = train("agr_adamw", steps=2)
    for rounding, state_dtype in (
        ("kahan", None),
        ("stochastic", "bfloat16"),
        ("nearest", None),
        ("kahan", "bfloat16"),
    ):
        optimizer.param_groups[0].update(rounding=rounding, state_dtype=state_dtype)
        take_steps(optimizer, range(2))
        state = optimizer.state[params[0]]
        assert state["exp_avg"].dtype == (torch.float32 if state_dtype is None else torch.bfloat16)
        assert state["exp_avg_sq"].dtype == torch.float32
    assert params[0].isfinite().all()


def test_what_is_not_allowed_is_refused_with_what_is():
    with pytest.raises(ValueError, match="rounding='up' is not allowed; it must be 'nearest', 'stochastic' or 'kahan'"):
        AGRAdamW([Parameter(torch.ones(2))], rounding="up")
    with pytest.raises(ValueError, match="rounding_seed=-1 is not allowed; it must be a whole number >= 0"):
        AGRAdamW([Parameter(torch.ones(2))], rounding_seed=-1)
    with pytest.raises(ValueError, match=r"state_dtype=torch.float16 is not allowed; it must be bfloat16"):
        AGRAdamW([Parameter(torch.ones(2))], state_dtype=torch.float16)
    with pytest.raises(ValueError, match="is for bfloat16 parameters, and one of float16 was given"):
        AGRAdamW([Parameter(torch.ones(2).half())], rounding="kahan")


# ---- shards


def rows_of_a_tensor_draw_what_the_whole_draws():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    for shape in ((7, 1000), (64, 300)):
        for rounding in ("stochastic", "kahan"):
            whole = Parameter(given(shape, 0))
            sharded = Parameter(distribute_tensor(given(shape, 0), mesh, [Shard(0)]))
            optimizers = [
                AGRAdamW([p], lr=1e-3, rounding=rounding, state_dtype=torch.bfloat16) for p in (whole, sharded)
            ]
            for seed in range(3):
                grad = given(shape, seed + 1)
                whole.grad, sharded.grad = grad, distribute_tensor(grad, mesh, [Shard(0)])
                for optimizer in optimizers:
                    optimizer.step()
            different = (bits(sharded.full_tensor()) != bits(whole)).double().mean()
            assert different < 1e-3, (shape, rounding, different)
            assert local(optimizers[1].state[sharded]["exp_avg"]).dtype == torch.bfloat16


def columns_of_a_tensor_draw_each_their_own():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    param = Parameter(distribute_tensor(torch.ones(500, 400, dtype=torch.bfloat16), mesh, [Shard(1)]))
    optimizer = AGRAdamW([param], lr=1e-3, rounding="stochastic", weight_decay=0)
    param.grad = distribute_tensor(torch.ones(500, 400, dtype=torch.bfloat16), mesh, [Shard(1)])
    optimizer.step()
    end = bits(param.full_tensor())
    assert 0 < (end != end.max()).sum() < end.numel()
    assert not torch.equal(end[:, :200], end[:, 200:])


@pytest.mark.parametrize("check", [rows_of_a_tensor_draw_what_the_whole_draws, columns_of_a_tensor_draw_each_their_own])
def test_shards(check, tmp_path):
    spawn(check, tmp_path)


@pytest.mark.parametrize("fused", [None, False], ids=["native", "lists"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_nan_of_any_bits_stays_one(rounding, fused):
    """With all bits set, what rounding adds to it would carry over, to a zero."""
    param = Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    param.grad = torch.ones(8, 8, dtype=torch.bfloat16)
    param.grad.view(torch.int16)[0] = 0x7FFF
    AGRAdamW([param], rounding=rounding, fused=fused).step()
    assert param[0].isnan().all()
