"""Layers in the flat partitions of DeepSpeed's ZeRO: the same step as on whole layers.

DeepSpeed itself is tried in processes of its own (`make test-deepspeed`, zero_job.py); what it does to an optimizer is
imitated here on one rank.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn import Parameter

import agr_hf
from agr_hf.optim import zero

SHAPES = [(5, 7), (7,), (3, 4, 2), (1, 1), (11, 3)]
NORMED = ["agr_adamw", "agr_adam", "agr_adan", "adal"]


@pytest.fixture
def one_rank(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", sys)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_layers(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def make_grads(step):
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def flatten(tensors, padding=3):
    return torch.cat([*[tensor.detach().float().flatten() for tensor in tensors], torch.zeros(padding)])


def partition_as_stages_1_and_2(optimizer, layers):
    """One flat partition, of which the 16-bit parameters are views."""
    flat, low = Parameter(flatten(layers)), flatten(layers).to(layers[0].dtype)
    start = 0
    for layer in layers:
        shape, numel = layer.shape, layer.numel()
        layer.data = low[start : start + numel].view(shape)
        layer._dp_group = dist.group.WORLD
        start += numel
    optimizer.param_groups[0]["params"] = [flat]
    return [flat], [list(range(len(layers)))]


def partition_as_stage_3(optimizer, layers):
    """Two sub-groups; the layers themselves are empty."""
    members = [[0, 1, 2], [3, 4]]
    flats = [Parameter(flatten([layers[i] for i in some])) for some in members]
    z3 = SimpleNamespace(
        offload_optimizer=False,
        partial_offload=1.0,
        fp32_partitioned_groups_flat=flats,
        grad_position={},
        get_param_id=id,
    )
    for number, some in enumerate(members):
        start = 0
        for i in some:
            layer = layers[i]
            layer._z3_optimizer, layer.ds_shape, layer.ds_numel = z3, layer.shape, layer.numel()
            layer.ds_process_group = dist.group.WORLD
            z3.grad_position[id(layer)] = [number, start, layer.numel()]
            start += layer.numel()
    for layer in layers:
        layer.data = torch.empty(0)
    return flats, members


def take_steps(optimizer, flats, members, steps):
    for step in steps:
        grads = make_grads(step)
        for flat, some in zip(flats, members, strict=True):  # stage 3 shows one sub-group at a time
            flat.grad = flatten([grads[i] for i in some])
            optimizer.param_groups[0]["params"] = [flat]
            optimizer.step()


@pytest.mark.parametrize("partition", [partition_as_stages_1_and_2, partition_as_stage_3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NORMED)
def test_a_partition_takes_the_step_of_its_layers(name, dtype, partition, one_rank):
    flags = [True, True, False, True, True]
    options = {"agr": flags, "agr_steps": 4} if name != "adal" else {}
    whole = [Parameter(layer.detach().float()) for layer in make_layers(dtype)]
    reference = agr_hf.create_optimizer(name, [{"params": whole, **options}], lr=0.1, weight_decay=0.1)
    for step in range(6):
        for layer, grad in zip(whole, make_grads(step), strict=True):
            layer.grad = grad
        reference.step()
    layers = make_layers(dtype)
    optimizer = agr_hf.create_optimizer(name, [{"params": layers, **options}], lr=0.1, weight_decay=0.1)
    flats, members = partition(optimizer, layers)
    take_steps(optimizer, flats, members, range(3))
    # A checkpoint, and the groups that come back from it.
    optimizer.param_groups[0]["params"] = list(flats)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    take_steps(optimizer, flats, members, range(3, 6))
    for flat, some in zip(flats, members, strict=True):
        assert torch.equal(flat.detach(), flatten([whole[i] for i in some]))
    if "agr_step" in optimizer.param_groups[0]:
        assert optimizer.param_groups[0]["agr_step"] == 6


def test_agr_turned_off_in_mid_run_is_off(one_rank):
    whole, layers = make_layers(), make_layers()
    optimizers = [agr_hf.AGRAdamW(params, lr=0.1) for params in (whole, layers)]
    flats, members = partition_as_stages_1_and_2(optimizers[1], layers)
    for step in range(4):
        for optimizer in optimizers:
            optimizer.param_groups[0]["agr"] = step < 2
        for layer, grad in zip(whole, make_grads(step), strict=True):
            layer.grad = grad
        optimizers[0].step()
        take_steps(optimizers[1], flats, members, [step])
    assert torch.equal(flats[0].detach(), flatten(whole))


def test_norms_of_the_layers_of_a_partition(one_rank):
    layers = make_layers()
    whole = [layer.detach().clone() for layer in layers]
    optimizer = agr_hf.AGRAdamW(layers)
    (flat,), _ = partition_as_stages_1_and_2(optimizer, layers)
    for order in (1, 2):
        found = zero.fragment_norms(flat, layers, flat.detach(), order=order)
        assert torch.allclose(torch.stack(found), torch.stack([layer.norm(order) for layer in whole]))
    with pytest.raises(ValueError, match="must have a gradient"):
        zero.fragment_norms(flat, layers)


def test_another_deepspeed_is_refused_before_anything_changes(one_rank):
    layers = make_layers()
    optimizer = agr_hf.AGRAdamW(layers)
    (flat, _), _ = partition_as_stage_3(optimizer, layers)
    del layers[0]._z3_optimizer.grad_position
    before = flat.detach().clone()
    with pytest.raises(RuntimeError, match=r"'grad_position'.*use FSDP2"):
        take_steps(optimizer, [flat], [[0, 1, 2]], [0])
    assert torch.equal(flat.detach(), before)
    assert not optimizer.state


def test_layers_that_are_not_where_they_are_looked_for_are_refused(one_rank):
    layers = make_layers()
    optimizer = agr_hf.AGRAdamW(layers)
    flats, members = partition_as_stages_1_and_2(optimizer, layers)
    layers[1].data = layers[1].data.clone()  # of another storage, and so at offset 0
    with pytest.raises(RuntimeError, match=r"not found where DeepSpeed usually has them.*FSDP2"):
        take_steps(optimizer, flats, members, [0])
    assert not optimizer.state


def test_a_partition_that_lacks_elements_of_a_layer_is_refused(one_rank):
    layers = make_layers()
    optimizer = agr_hf.AGRAdamW(layers)
    (flat,), _ = partition_as_stages_1_and_2(optimizer, layers)
    short = Parameter(flat.detach()[:-5].clone())  # 3 of padding, and 2 of the last layer
    short.grad = torch.ones_like(short)
    optimizer.param_groups[0]["params"] = [short]
    with pytest.raises(RuntimeError, match="not found where DeepSpeed usually has them"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("clip", ["option", "request"])
def test_clipping_is_left_to_deepspeed(clip, one_rank):
    layers = make_layers()
    optimizer = agr_hf.AGRAdamW(layers, max_grad_norm=1.0 if clip == "option" else None)
    flats, members = partition_as_stages_1_and_2(optimizer, layers)
    if clip == "request":
        optimizer.clip_next_step(1.0)
    with pytest.raises(RuntimeError, match='set "gradient_clipping"'):
        take_steps(optimizer, flats, members, [0])
    assert not optimizer.state


@pytest.mark.parametrize("name", ["adan", "acprop", "nosadam"])
def test_rules_without_norms_take_a_partition_as_it_is(name, one_rank):
    whole, layers = make_layers(), make_layers()
    optimizers = [agr_hf.create_optimizer(name, params, lr=0.1) for params in (whole, layers)]
    flats, members = partition_as_stages_1_and_2(optimizers[1], layers)
    for layer, grad in zip(whole, make_grads(0), strict=True):
        layer.grad = grad
    optimizers[0].step()
    take_steps(optimizers[1], flats, members, [0])
    assert torch.equal(flats[0].detach(), flatten(whole))


# ---- DeepSpeed itself

deepspeed = [
    pytest.mark.deepspeed,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed: make test-deepspeed"),
]


def run(ranks, *arguments, folder):
    out = folder / "found.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [Path(__file__).with_name("zero_job.py"), arguments[0], out, *arguments[1:]]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.timeout(900)  # six starts of two processes
class TestDeepSpeed:
    pytestmark = deepspeed

    @pytest.mark.parametrize(
        ("name", "ranks", "how"),
        [("agr_adamw", 2, "all"), *[(name, ranks, "few") for name in (*NORMED, "adan") for ranks in (2, 3)]],
    )
    def test_all_stages_equal_one_process(self, name, ranks, how, tmp_path):
        found = run(ranks, "equal", name, how, folder=tmp_path)
        assert len(found) == (42 if how == "all" else 6)
        assert {key: value for key, value in found.items() if value > 1e-3} == {}

    def test_a_sum_of_one_rank_would_be_seen(self, tmp_path):
        assert min(run(2, "local", folder=tmp_path).values()) > 0.1

    def test_each_step_in_bfloat16_is_the_reference_on_gathered_tensors(self, tmp_path):
        found = run(2, "low_precision", folder=tmp_path)
        assert max(found[f"{stage} agr"] for stage in (1, 2, 3)) < 1e-5
        assert min(found[f"{stage} off"] for stage in (1, 2, 3)) > 0.1

    def test_a_run_resumes_to_the_bit(self, tmp_path):
        assert set(run(2, "resumed", tmp_path, folder=tmp_path).values()) == {0.0}

    @pytest.mark.parametrize(("name", "stage"), [("agr_adamw", "2"), ("agr_adamw", "3"), ("agr_adan", "3")])
    def test_a_universal_checkpoint_goes_on_with_other_ranks_or_is_refused(self, name, stage, tmp_path):
        run(2, "leave", tmp_path, name, stage, folder=tmp_path)
        convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        convert += ["--input_folder", tmp_path / "half", "--output_folder", tmp_path / "universal"]
        environment = os.environ | {"DS_ACCELERATOR": "cpu"}
        subprocess.run(convert, check=True, capture_output=True, timeout=280, env=environment)
        for ranks in (2, 3):
            found = run(ranks, "go_on", tmp_path, name, stage, folder=tmp_path)
            if stage == "3":
                lost = "lacks exp_avg_diff, neg_pre_grad of AGRAdan"
                assert (lost if name == "agr_adan" else "the options of the first one") in found["refused"]
            if name != "agr_adan":
                assert found["counts"] == [4, 4]
                assert found["distance"] < 1e-3

    def test_a_step_takes_one_collective_however_many_layers(self, tmp_path):
        assert set(run(2, "collectives", folder=tmp_path).values()) == {1}

    def test_what_cannot_be_done_is_said(self, tmp_path):
        found = run(2, "refused", folder=tmp_path)
        assert "gradient_clipping" in found["clipping"]
        assert "FSDP2" in found["names"]

    def test_norms_are_those_of_whole_layers(self, tmp_path):
        found = run(2, "norms", folder=tmp_path)
        assert len(found) >= 8
        assert all(abs(ratio - 1) < 1e-5 for ratio in found.values())

    def test_trainer_by_name_equals_ddp(self, tmp_path):
        weights = {}
        for kind in ("ddp", "ddp-off", "zero1", "zero2", "zero3", "zero3offload"):
            found = run(2, "train_with_trainer", kind, tmp_path, folder=tmp_path)
            assert found["engine"] == ("DistributedDataParallel" if "ddp" in kind else "DeepSpeedEngine")
            weights[kind] = torch.load(tmp_path / f"{kind}.pt", weights_only=True).float()
        effect = (weights["ddp-off"] - weights["ddp"]).norm()
        for kind in ("zero1", "zero2", "zero3", "zero3offload"):
            assert (weights[kind] - weights["ddp"]).norm() / effect < 0.01

    @pytest.mark.parametrize("stage", ["1", "2", "3"])
    def test_accelerate(self, stage, tmp_path):
        assert run(2, "train_with_accelerate", stage, folder=tmp_path)["distance"] < 1e-3
