"""LoRA: adapters' small matrices are Linear layers of their own, and train with AGR."""

import pytest
import torch
from small import arguments, losses_of, small_model, trainer_of

import agr_hf
from agr_hf import agr_param_groups
from agr_hf.optim.statistics import gradient_statistics

peft = pytest.importorskip("peft", reason="peft is missing: pip install 'agr-hf[test]'")


def lora(model, **options):
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options))


def test_adapters_are_regularized_and_the_frozen_base_has_no_state(tmp_path):
    agr_hf.register()
    model = lora(small_model(), modules_to_save=["classifier"])
    args = arguments(tmp_path, optim="agr_adamw", max_steps=30)
    trainer = trainer_of(model, args)
    trainer.train()
    losses = losses_of(trainer)
    assert losses[-1] < losses[0]
    names = {param: name for name, param in model.named_parameters()}
    optimizer = trainer.optimizer.optimizer
    trained = {names[param] for param in optimizer.state}
    assert trained == {name for name, param in model.named_parameters() if param.requires_grad}
    assert any("lora_A" in name for name in trained)
    marked = set()
    for group in optimizer.param_groups:
        flags = group["agr"] if isinstance(group["agr"], list) else [group["agr"]] * len(group["params"])
        marked |= {names[p] for p, flag in zip(group["params"], flags, strict=True) if flag}
    assert marked == {name for name in trained if name.endswith("weight")}


def test_groups_of_adapters_follow_layer_types():
    embedding = torch.nn.Sequential()
    embedding.add_module("embed", torch.nn.Embedding(11, 8))
    embedding.add_module("conv", torch.nn.Conv1d(3, 8, 1))
    embedding.add_module("head", torch.nn.Linear(8, 3))
    config = peft.LoraConfig(r=2, target_modules=["embed", "conv", "head"], use_dora=False)
    model = peft.PeftModel(embedding, config)
    names = {param: name for name, param in model.named_parameters()}
    groups = agr_param_groups(model)
    regularized = {names[p] for g in groups if g["agr"] for p in g["params"] if p.requires_grad}
    assert {".".join(name.split(".")[2:4]) for name in regularized} == {
        "conv.lora_A", "conv.lora_B", "head.lora_A", "head.lora_B",
    }  # fmt: skip
    rest = {names[p] for g in groups if not g["agr"] for p in g["params"] if p.requires_grad}
    assert all("lora_embedding" in name for name in rest)


def test_agr_matters_more_on_adapters_than_on_the_layers_they_adapt():
    """Shares are about 1/numel: the smaller the matrix, the more AGR takes."""
    model = lora(small_model())
    for param in model.parameters():
        param.requires_grad_(True)
    batch = torch.randn(16, 1, 8, 8)
    model(pixel_values=batch, labels=torch.arange(16) % 10).loss.backward()
    found = gradient_statistics((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
    adapter = next(s.effect for n, s in found.items() if "v_proj.lora_B" in n)
    layer = next(s.effect for n, s in found.items() if "v_proj.base_layer.weight" in n)
    assert adapter > layer > 0
