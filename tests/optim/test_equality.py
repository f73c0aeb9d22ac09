"""Twenty steps of a small BERT, laid over several processes in each way, against one process.

DeepSpeed ZeRO has the same in test_zero.py.
"""

import json
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from ranks import spawn

import agr_hf

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch was built without torch.distributed")
STEPS, BATCH, LENGTH = 20, 12, 7
NORMED = ["agr_adamw", "agr_adam", "agr_adan", "adal"]
WAYS = {2: ["ddp", "fsdp2", "tp"], 3: ["ddp", "fsdp2", "tp"], 4: ["hsdp", "fsdp2 over tp"]}


def make_model():
    """53 and 7 rows divide by neither 2 nor 3, two are fewer than three ranks, and one row leaves all ranks but the first
    without any. Some layers are frozen."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=53, hidden_size=12, num_hidden_layers=2, num_attention_heads=6, intermediate_size=18,
        max_position_embeddings=LENGTH, type_vocab_size=1, num_labels=2, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return freeze(BertForSequenceClassification(config))


def freeze(model):
    model.bert.encoder.layer[0].attention.output.requires_grad_(False)
    model.bert.embeddings.position_embeddings.requires_grad_(False)
    return model


def make_optimizer(name, model, **options):
    return agr_hf.create_optimizer(name, list(model.parameters()), lr=1e-2, weight_decay=0.01, **options)


def train(model, optimizer, part=0, parts=1, steps=range(STEPS)):
    """Steps on one of the parts of each batch. Returns all matrices, whole and flat: the gradient of a key's bias is zero
    but for noise, of which Adam with L2 decay makes steps of lr."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(53, (BATCH, LENGTH), generator=generator).chunk(parts)[part]
        labels = torch.randint(2, (BATCH,), generator=generator).chunk(parts)[part]
        labels = tokens if hasattr(model, "lm_head") else labels
        optimizer.zero_grad()
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
    params = [param.detach() for param in model.parameters() if param.ndim > 1]
    return torch.cat([getattr(param, "full_tensor", lambda p=param: p)().flatten() for param in params])


def parallelize(model, mesh):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for layer in model.bert.encoder.layer:
        plan = {f"attention.self.{name}": ColwiseParallel() for name in ("query", "key", "value")}
        plan |= {"attention.output.dense": RowwiseParallel()}
        parallelize_module(
            layer, mesh, {**plan, "intermediate.dense": ColwiseParallel(), "output.dense": RowwiseParallel()}
        )
    freeze(model)  # torch 2.9 makes parameters that are trained of what it lays out


def train_laid_out(name, way):
    from torch.distributed.device_mesh import init_device_mesh

    model, rank, world = make_model(), dist.get_rank(), dist.get_world_size()
    if way == "ddp":
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        return train(ddp, make_optimizer(name, model), rank, world)
    sizes = (world,) if world < 4 else (2, 2)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("outer", "inner")[-len(sizes) :])
    part, parts = (0, 1) if way == "tp" else (rank, world)
    if "tp" in way:
        parallelize(model, mesh["inner"])
    if way == "fsdp2 over tp":
        part, parts = mesh.get_local_rank("outer"), 2
    if way != "tp":
        shard(model, mesh["outer"] if "tp" in way else mesh)
    if way == "fsdp2":
        single = model.bert.embeddings.token_type_embeddings.weight
        assert (single.to_local().numel() > 0) == (rank == 0)
    return train(model, make_optimizer(name, model), part, parts)


def shard(model, mesh=None):
    from torch.distributed.fsdp import fully_shard

    for module in (*model.bert.encoder.layer, model):
        fully_shard(module, mesh=mesh)


def train_from(folder, name, steps):
    """Some of the steps under FSDP2, from the shards that the steps before were saved in, if any; both are written."""
    from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = make_model()
    shard(model)
    optimizer = make_optimizer(name, model, **({} if name == "adal" else {"agr_steps": 15}))
    if steps.start:
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        load(states, storage_reader=FileSystemReader(folder / name))
        set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    ended = train(model, optimizer, dist.get_rank(), dist.get_world_size(), steps)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    save(states, storage_writer=FileSystemWriter(folder / name))
    if dist.get_rank() == 0:
        torch.save(ended, folder / f"{name}.pt")


def train_all_from(folder, steps):
    for name in NORMED:
        train_from(folder, name, steps)


def measure(out):
    """Of each way and optimizer, the distance to one process as a share of what AGR (or the scale of AdaL) changes; and
    with AGRAdamW the distance of a run in which each rank keeps its own sums."""
    found = {}
    for name in NORMED:
        alone = train(model := make_model(), make_optimizer(name, model))
        without = {"name": "adam"} if name == "adal" else {"name": name, "agr": False}
        effect = (alone - train(model := make_model(), make_optimizer(model=model, **without))).norm()
        for way in WAYS[dist.get_world_size()]:
            found[f"{name}, {way}"] = ((train_laid_out(name, way) - alone).norm() / effect).item()
            if name == "agr_adamw" and way != "ddp":
                with patch("agr_hf.optim.plan.add_over_shards"):
                    found[f"local, {way}"] = ((train_laid_out(name, way) - alone).norm() / effect).item()
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))


def measure_tp_plan(folder, out):
    """The same as `measure` for a model of transformers that is laid out by its own plan."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    found = {}
    alone, without = (
        train(model := AutoModelForCausalLM.from_pretrained(folder), make_optimizer("agr_adamw", model, agr=agr))
        for agr in (True, False)
    )
    for kind in ("whole", "local"):
        model = AutoModelForCausalLM.from_pretrained(
            folder, distributed_config=DistributedConfig(tp_plan="auto", tp_size=dist.get_world_size())
        )
        with nullcontext() if kind == "whole" else patch("agr_hf.optim.plan.add_over_shards"):
            ended = train(model, make_optimizer("agr_adamw", model))
        found[kind] = ((ended - alone).norm() / (alone - without).norm()).item()
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))


@pytest.mark.parametrize("world", [2, 3])
def test_a_model_laid_out_by_its_tp_plan_trains_as_one_process(world, tmp_path):
    distributed = pytest.importorskip("transformers.distributed")
    if not hasattr(distributed.DistributedConfig, "tp_plan"):
        pytest.skip("this transformers has no DistributedConfig(tp_plan=...)")
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 12, "intermediate_size": 18, "num_attention_heads": 6, "num_key_value_heads": 6}
    config = LlamaConfig(vocab_size=54, num_hidden_layers=2, max_position_embeddings=LENGTH, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    spawn(partial(measure_tp_plan, tmp_path / "model", tmp_path / "found.json"), tmp_path, world)
    found = json.loads((tmp_path / "found.json").read_text())
    print(found)
    assert found["whole"] < 1e-3
    assert found["local"] > 0.1


# Half a minute each on two cores.
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_each_way_to_lay_out_a_model_trains_as_one_process(world, tmp_path):
    out = tmp_path / "found.json"
    spawn(partial(measure, out), tmp_path, world)
    found = json.loads(out.read_text())
    print(json.dumps(found, indent=1))
    local = {key: found.pop(key) for key in list(found) if key.startswith("local")}
    assert len(found) == len(NORMED) * len(WAYS[world])
    assert {key: value for key, value in found.items() if value > 1e-3} == {}
    assert min(local.values()) > 0.1  # sums of one rank would be seen


def test_shards_of_one_rank_go_on_with_three_and_those_of_three_with_two(tmp_path):
    for world, steps in ((1, range(7)), (3, range(7, 14)), (2, range(14, STEPS))):
        (tmp_path / str(world)).mkdir()
        spawn(partial(train_all_from, tmp_path, steps), tmp_path / str(world), world)
    for name in NORMED:
        options = {} if name == "adal" else {"agr_steps": 15}
        alone, without = (
            train(model := make_model(), make_optimizer(kind, model, **some))
            for kind, some in ((name, options), ("adam", {}) if name == "adal" else (name, {"agr": False}))
        )
        ended = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        distance = (ended - alone).norm() / (alone - without).norm()
        print(name, distance.item())
        assert distance < 1e-3
