"""Started by torchrun from test_zero.py: training under DeepSpeed ZeRO, beside one process. Rank 0 writes JSON."""

import json
import logging
import sys
from itertools import product
from pathlib import Path
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

import agr_hf
from agr_hf.optim import zero

STEPS, BATCH = 8, 12
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


class Net(nn.Module):
    """Uneven shapes, one element in two dimensions, fewer elements than ranks, a layer that is frozen."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 7)
        self.first = nn.Linear(7, 11)
        self.frozen = nn.Linear(11, 11)
        self.norm = nn.LayerNorm(11)
        self.last = nn.Linear(11, 5)
        self.scale = nn.Parameter(torch.ones(1, 1))
        self.shift = nn.Parameter(torch.zeros(1, 2))
        self.frozen.requires_grad_(False)

    def forward(self, tokens):
        hidden = self.norm(self.frozen(torch.tanh(self.first(self.embed(tokens)))))
        return self.last(hidden).mean(1) * self.scale + nn.functional.pad(self.shift, (0, 3))


def make_model():
    torch.manual_seed(0)
    return Net()


def make_groups(model):
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    # A list of answers as Trainer by name gives it, and one answer.
    flags = [p is not model.embed.weight for p in matrices]
    return [{"params": matrices, "weight_decay": 0.01, "agr": flags}, {"params": others, "weight_decay": 0.0}]


def make_optimizer(name, model, **options):
    groups = make_groups(model)
    if "agr" not in agr_hf.create_optimizer(name, [torch.zeros(1)]).defaults:
        groups = [{key: group[key] for key in group if key != "agr"} for group in groups]
    elif options.get("agr") is False:
        groups = [{**group, "agr": False} for group in groups]
    return agr_hf.create_optimizer(name, groups, lr=1e-2, **options)


def make_batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(13, (BATCH, 4), generator=generator), torch.randint(5, (BATCH,), generator=generator)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def train_alone(name, clip=0.0, **options):
    model = make_model()
    optimizer = make_optimizer(name, model, **options)
    for step in range(STEPS):
        optimizer.zero_grad()
        tokens, labels = make_batch(step)
        nn.functional.cross_entropy(model(tokens), labels).backward()
        if clip:
            nn.utils.clip_grad_norm_(trained(model), clip)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in trained(model)])


def start(name, stage, accumulation=1, clip=0.0, precision="fp32", zero_options=None, universal=False, **options):
    model = make_model()
    optimizer = make_optimizer(name, model, **options)
    config = {
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size() // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage, **(zero_options or {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if precision != "fp32":
        config[precision] = {"enabled": True}
    if universal:
        config["checkpoint"] = {"load_universal": True}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine, model, optimizer


def backward(engine, step, accumulation=1):
    tokens, labels = make_batch(step)
    rank, world = dist.get_rank(), dist.get_world_size()
    pairs = zip(
        tokens.chunk(world)[rank].chunk(accumulation), labels.chunk(world)[rank].chunk(accumulation), strict=True
    )
    for i, (some, wanted) in enumerate(pairs):
        engine.backward(nn.functional.cross_entropy(engine(some).float(), wanted))
        if i < accumulation - 1:
            engine.step()


def train_under_zero(name, stage, accumulation=1, clip=0.0, zero_options=None, **options):
    engine, model, _ = start(name, stage, accumulation, clip, zero_options=zero_options, **options)
    for step in range(STEPS):
        backward(engine, step, accumulation)
        engine.step()
    return weights(model, stage)


def weights(model, stage):
    params = trained(model)
    if stage < 3:
        return torch.cat([p.detach().flatten() for p in params])
    with deepspeed.zero.GatheredParameters(params):
        return torch.cat([p.detach().flatten().clone() for p in params])


def equal(name, how):
    """Distances to one process, as a share of what AGR (or the scale of AdaL) changes."""
    others = {"sub_group_size": 60, "round_robin_gradients": True, "overlap_comm": True}
    cases = [(1, 0.0, {}), (2, 0.05, {**OFFLOAD, **others})]
    if how == "all":
        cases += product((1, 2), (0.0, 0.05), (OFFLOAD, {"reduce_scatter": False}, others))
    other = train_alone(name, agr=False) if name.startswith("agr") else train_alone("adam")
    effect = (train_alone(name) - other).norm()
    found = {}
    for stage, (accumulation, clip, options) in product((1, 2, 3), cases):
        got = train_under_zero(name, stage, accumulation, clip, options)
        distance = (got - train_alone(name, clip)).norm() / effect
        found[f"{stage} {accumulation} {clip} {options}"] = distance.item()
    return found


def local():
    """The same distance where each rank keeps its own sums: what `equal` must be able to see."""
    alone, other = train_alone("agr_adamw"), train_alone("agr_adamw", agr=False)
    found = {}
    for stage in (1, 2, 3):
        engine, model, optimizer = start("agr_adamw", stage)
        for step in range(STEPS):
            backward(engine, step)
            if step == 0:
                engine.step()  # which finds the partitions
                for partition in optimizer._partitions.values():
                    object.__setattr__(partition.partition, "add_over_ranks", lambda sums: None)
            else:
                engine.step()
        found[f"stage {stage}"] = ((weights(model, stage) - alone).norm() / (alone - other).norm()).item()
    return found


def resumed(folder):
    """Largest difference of a run that was saved after half of its steps and loaded by a new engine."""
    found = {}
    cases = [("agr_adamw", {"agr_steps": 6}), ("agr_adan", {}), ("adal", {}), ("nosadam", {})]
    for (name, options), stage in product(cases, (1, 2, 3)):
        zero_options = {"sub_group_size": 60} if stage == 3 else {}
        whole = train_under_zero(name, stage, zero_options=zero_options, **options)
        engine, _, optimizer = start(name, stage, zero_options=zero_options, **options)
        for step in range(STEPS // 2):
            backward(engine, step)
            engine.step()
        engine.save_checkpoint(f"{folder}/{name}-{stage}")
        engine, model, optimizer = start(name, stage, zero_options=zero_options, **options)
        assert engine.load_checkpoint(f"{folder}/{name}-{stage}")[0] is not None
        counts = [group.get("agr_step", STEPS // 2) for group in optimizer.param_groups]
        assert counts == [STEPS // 2] * 2, counts
        for step in range(STEPS // 2, STEPS):
            backward(engine, step)
            engine.step()
        assert [group.get("agr_step", STEPS) for group in optimizer.param_groups] == [STEPS] * 2
        found[f"{name} {stage}"] = (weights(model, stage) - whole).abs().max().item()
    return found


def leave(folder, name, stage):
    """Half of a run, saved under ZeRO, and the end of the whole one."""
    whole = train_under_zero(name, int(stage))
    engine, *_ = start(name, int(stage))
    for step in range(STEPS // 2):
        backward(engine, step)
        engine.step()
    engine.save_checkpoint(folder, tag="half")
    torch.save(whole, f"{folder}/whole.pt")
    return {}


def go_on(folder, name, stage):
    """The distance to a run that was not stopped, from the universal checkpoint of `leave`, as `equal` gives it."""
    engine, model, optimizer = start(name, int(stage), universal=True)
    assert engine.load_checkpoint(folder, tag="universal")[0] is not None
    counts = [group.get("agr_step", STEPS // 2) for group in optimizer.param_groups]
    refused = ""
    if stage == "3":
        backward(engine, STEPS // 2)
        try:
            engine.step()
        except RuntimeError as error:
            refused = str(error)
        if name != "agr_adamw":
            return {"refused": refused}
        engine.destroy()
        engine, model, optimizer = start(name, 3, universal=True)
        engine.load_checkpoint(folder, tag="universal")
        for group, own in zip(engine.optimizer.param_groups, make_groups(model), strict=True):
            group.update({"agr": own.get("agr", True), "weight_decay": own["weight_decay"]})
    for step in range(STEPS // 2, STEPS):
        backward(engine, step)
        engine.step()
    whole, other = torch.load(f"{folder}/whole.pt"), train_alone("adam")
    if name.startswith("agr"):
        other = train_alone(name, agr=False)
    distance = ((weights(model, int(stage)) - whole).norm() / (whole - other).norm()).item()
    return {"distance": distance, "counts": counts, "refused": refused}


def low_precision():
    """Each step in bfloat16 beside one process that takes it from the same weights, gradients and state."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state

    found = {}
    for stage, agr in product((1, 2, 3), (True, False)):
        engine, model, _ = start("agr_adamw", stage, precision="bf16")
        worst = effect = 0.0
        for step in range(STEPS):
            backward(engine, step)
            alone = make_model()
            own = make_optimizer("agr_adamw", alone, **({} if agr else {"agr": False}))
            for p, whole in zip(trained(model), trained(alone), strict=True):
                whole.data = safe_get_full_fp32_param(p)
                whole.grad = safe_get_full_grad(p).float()
                if step:
                    moments = {key: safe_get_full_optimizer_state(p, key) for key in own.state_keys}
                    own.state[whole] = {"step": torch.tensor(float(step)), **moments}
            before = [p.detach().clone() for p in trained(alone)]
            own.step()
            engine.step()
            for p, whole, old in zip(trained(model), trained(alone), before, strict=True):
                worst = max(worst, (safe_get_full_fp32_param(p) - whole).abs().max().item())
                effect = max(effect, (whole - old).abs().max().item())
        found[f"{stage} {'agr' if agr else 'off'}"] = worst / effect
    return found


def collectives():
    """All-reduces of a step, by the number of layers."""
    found = {}
    for stage, layers in product((1, 3), (10, 300)):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(layers)])
        optimizer = agr_hf.AGRAdamW(model.parameters())
        config = {
            "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }  # fmt: skip
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
        for _ in range(2):
            engine.backward(engine(torch.ones(2, 3)).sum())
            found[f"stage {stage}, {layers} layers"] = count_all_reduces(engine)
    return found


def count_all_reduces(engine):
    """Of the optimizer's step; DeepSpeed has its own before and behind it."""
    take_step, counts = agr_hf.AGRAdamW.take_step, []

    def counted(self):
        before = count.call_count
        take_step(self)
        counts.append(count.call_count - before)

    with (
        patch.object(zero.dist, "all_reduce", wraps=dist.all_reduce) as count,
        patch.object(agr_hf.AGRAdamW, "take_step", counted),
    ):
        engine.step()
    return sum(counts)


def refused():
    """Sentences for what cannot be done; nothing has changed then."""
    found = {}
    for what in ("clipping", "names"):
        engine, model, optimizer = start("agr_adamw", 2, **({"max_grad_norm": 1.0} if what == "clipping" else {}))
        before = weights(model, 2)
        backward(engine, 0)
        if what == "names":
            for p in trained(model):
                p.__dict__.pop("_dp_group", None)
                p._z3_optimizer = None  # of another DeepSpeed
        try:
            engine.step()
        except RuntimeError as error:
            found[what] = str(error)
        assert torch.equal(weights(model, 2), before)
        assert not optimizer.state
    return found


def norms():
    engine, model, optimizer = start("agr_adamw", 2)
    groups = make_groups(model)
    backward(engine, 0)
    alone = make_model()
    tokens, labels = make_batch(0)
    nn.functional.cross_entropy(alone(tokens), labels).backward()
    names = {id(p): name for name, p in model.named_parameters()}
    wanted = dict(alone.named_parameters())
    found = {}

    def look(self):
        (group,) = self.param_groups
        (flat,) = group["params"]
        layers = groups[[g["params"][0] is flat for g in all_groups].index(True)]["params"]
        held = [
            layers_of.layers[f.layer] for layers_of in [zero.find_partition(flat, layers)] for f in layers_of.fragments
        ]
        for order in (1, 2):
            for layer, norm in zip(held, zero.fragment_norms(flat, layers, order=order), strict=True):
                name = names[id(layer)]
                found[f"{name} {order}"] = (norm / wanted[name].grad.norm(order)).item()

    all_groups = optimizer.param_groups
    with patch.object(agr_hf.AGRAdamW, "step", look):
        engine.step()
    return found


def train_with_trainer(kind, folder):
    """A small BERT through Trainer by name; the weights go to a file, for the kinds need processes of their own."""
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    agr_hf.register()
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=50, hidden_size=18, num_hidden_layers=2, num_attention_heads=2, intermediate_size=30,
            max_position_embeddings=8, num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    data = [
        {"input_ids": torch.randint(50, (8,), generator=generator), "labels": torch.randint(5, (), generator=generator)}
        for _ in range(20 * BATCH)
    ]
    name, _, control = kind.partition("-")
    stage, offload = (int(name[4]), name[5:] == "offload") if name.startswith("zero") else (None, False)
    config = None if stage is None else {
        "zero_optimization": {"stage": stage, **(OFFLOAD if offload else {})},
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    arguments = TrainingArguments(
        folder, optim="agr_adamw", optim_args="agr=false" if control else None, learning_rate=1e-2, max_steps=20,
        weight_decay=0.01, per_device_train_batch_size=BATCH // dist.get_world_size(), lr_scheduler_type="constant",
        report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, deepspeed=config,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    params = list(model.parameters())
    if stage == 3:
        with deepspeed.zero.GatheredParameters(params):
            flat = torch.cat([p.detach().flatten().clone() for p in params])
    else:
        flat = torch.cat([p.detach().flatten() for p in params])
    if dist.get_rank() == 0:
        torch.save(flat, f"{folder}/{kind}.pt")
    return {"engine": type(trainer.model_wrapped).__name__}


def train_with_accelerate(stage):
    """The distance to one process, as `equal` gives it, of an Accelerate loop with its plugin."""
    from accelerate import Accelerator, DeepSpeedPlugin

    config = {
        "zero_optimization": {"stage": int(stage)}, "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size() // 2,
        "gradient_accumulation_steps": 2, "gradient_clipping": 0.05, "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    model = make_model()
    engine, optimizer = accelerator.prepare(model, make_optimizer("agr_adamw", model))
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(STEPS):
        tokens, labels = (tensor.chunk(world)[rank].chunk(2) for tensor in make_batch(step))
        for some, wanted in zip(tokens, labels, strict=True):
            with accelerator.accumulate(engine):
                accelerator.backward(nn.functional.cross_entropy(engine(some), wanted))
                optimizer.step()
                optimizer.zero_grad()
    alone, other = train_alone("agr_adamw", 0.05), train_alone("agr_adamw", agr=False)
    return {"distance": ((weights(model, int(stage)) - alone).norm() / (alone - other).norm()).item()}


def main():
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed("gloo", verbose=False)
    what, out, *arguments = sys.argv[1:]
    found = globals()[what](*arguments)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
