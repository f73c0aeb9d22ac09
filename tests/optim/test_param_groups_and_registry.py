"""Which layers get AGR, which weights decay; and the one table of names."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import agr_hf
from agr_hf import agr_param_groups, create_optimizer, list_optimizers
from agr_hf.optim.registry import OPTIMIZERS, optimizer_info


def names_by_group(model, groups):
    names = {param: name for name, param in model.named_parameters()}
    return [({names[param] for param in group["params"]}, group["agr"], group["weight_decay"] > 0) for group in groups]


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.position = nn.Parameter(torch.zeros(1, 5, 4))
        self.scale = nn.Parameter(torch.ones(4))
        self.conv = nn.Conv1d(4, 4, 1)
        self.deconv = nn.ConvTranspose2d(4, 4, 2, bias=False)
        self.norm = nn.LayerNorm((5, 4))  # a norm with matrices for weights
        self.attention = nn.MultiheadAttention(4, 2)
        self.linear = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 5, bias=False)
        self.tied.weight = self.embed.weight
        self.frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)
        self.quantized = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)


def test_groups_follow_layer_types():
    model = Everything()
    assert names_by_group(model, agr_param_groups(model, weight_decay=0.1)) == [
        (
            {
                "conv.weight",
                "deconv.weight",
                "attention.in_proj_weight",
                "attention.out_proj.weight",
                "linear.weight",
                "frozen.weight",
            },
            True,
            True,
        ),
        ({"embed.weight", "position"}, False, True),
        (
            {
                "scale",
                "conv.bias",
                "norm.weight",
                "norm.bias",
                "attention.in_proj_bias",
                "attention.out_proj.bias",
                "linear.bias",
            },
            False,
            False,
        ),
    ]


def test_every_parameter_of_real_models_is_in_exactly_one_group():
    timm = pytest.importorskip("timm", reason="timm is missing: pip install 'agr-hf[train]'")
    from transformers import AlbertConfig, AlbertForPreTraining, GPT2Config, GPT2LMHeadModel

    models = [
        timm.create_model("resnet18"),
        timm.create_model("vit_tiny_patch16_224"),
        timm.create_model("convnext_atto"),
        GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50)),
        AlbertForPreTraining(AlbertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=16, vocab_size=50)),
    ]
    for model in models:
        groups = agr_param_groups(model)
        found = [id(param) for group in groups for param in group["params"]]
        assert sorted(found) == sorted(id(param) for param in model.parameters())
        names = names_by_group(model, groups)
        assert not any(word in name for name in names[0][0] for word in ("norm", "bias", "embeddings.", "wte", "wpe"))
    gpt2 = names_by_group(models[3], agr_param_groups(models[3]))
    assert "transformer.h.0.attn.c_attn.weight" in gpt2[0][0]  # transformers' Conv1D
    assert "transformer.wte.weight" in gpt2[1][0]  # tied with the head, a Linear


def test_a_layer_unfrozen_later_trains():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    optimizer = create_optimizer("agr_adamw", model)
    before = model[0].weight.clone()
    for unfrozen in (False, True):
        model[0].requires_grad_(unfrozen)
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        assert torch.equal(model[0].weight, before) != unfrozen


def test_biases_and_magnitudes_by_other_names_are_left_alone():
    model = nn.Module()
    model.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    model.old = torch.nn.utils.weight_norm(nn.Linear(3, 3, bias=False))
    model.new = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3, bias=False))
    model.spectral = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3, bias=False))
    regularized, undecayed = names_by_group(model, agr_param_groups(model))
    assert regularized[0] == {
        "attention.in_proj_weight", "attention.out_proj.weight", "old.weight_v",
        "new.parametrizations.weight.original1", "spectral.parametrizations.weight.original",
    }  # fmt: skip
    assert {
        "attention.bias_k",
        "attention.bias_v",
        "old.weight_g",
        "new.parametrizations.weight.original0",
    } <= undecayed[0]


def test_agr_false_wins_over_layer_types():
    groups = create_optimizer("agr_adamw", nn.Linear(3, 4), agr=False).param_groups
    assert [group["agr"] for group in groups] == [False, False]


def test_bad_models_and_decays_are_refused():
    with pytest.raises(ValueError, match="ReLU has no floating-point parameters"):
        agr_param_groups(nn.ReLU())
    for bad in (-1, "0.1", None, float("inf")):
        with pytest.raises(ValueError, match="weight_decay="):
            agr_param_groups(nn.Linear(2, 2), weight_decay=bad)


def test_the_names_are_those_of_the_design():
    assert list_optimizers() == [
        "agr_adamw", "agr_adam", "agr_adan", "adal", "adan", "acprop", "nosadam",
        "adam", "adamw", "amsgrad", "rmsprop", "sgd",
    ]  # fmt: skip
    assert len({info.timm_name for info in OPTIMIZERS.values()}) == len(OPTIMIZERS)
    assert all("_" not in info.timm_name for info in OPTIMIZERS.values())


@pytest.mark.parametrize("name", list_optimizers())
def test_every_name_makes_an_optimizer_that_learns(name):
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = create_optimizer(name, model, lr=3e-3, weight_decay=0.05)
    assert isinstance(optimizer, optimizer_info(name).cls)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    x = torch.randn(64, 4)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x).squeeze(1) - x.sum(1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_model_gets_the_optimizers_own_decay_by_default():
    decays = {
        name: create_optimizer(name, nn.Linear(2, 2)).param_groups[0]["weight_decay"] for name in list_optimizers()
    }
    assert decays == {name: 1e-2 if name in ("agr_adamw", "adamw") else 0.0 for name in list_optimizers()}


def test_params_and_groups_are_taken_as_they_are():
    linear = nn.Linear(2, 2)
    assert len(create_optimizer("adal", linear.parameters()).param_groups) == 1
    groups = [{"params": [linear.weight], "lr": 0.5}, {"params": [linear.bias]}]
    assert [g["lr"] for g in create_optimizer("agr_adan", groups, lr=0.1).param_groups] == [0.5, 0.1]


def test_names_bring_their_defaults_and_arguments_win():
    linear = nn.Linear(2, 2)
    assert create_optimizer("amsgrad", linear).defaults["amsgrad"] is True
    assert create_optimizer("sgd", linear).defaults["momentum"] == 0.9
    assert create_optimizer("sgd", linear, momentum=0.5).defaults["momentum"] == 0.5


def test_unknown_names_and_arguments_are_refused():
    with pytest.raises(
        ValueError, match=r"no optimizer 'agradamw' \(did you mean agr_adamw\?\); the names are agr_adamw, "
    ):
        create_optimizer("agradamw", nn.Linear(2, 2))
    with pytest.raises(TypeError, match="momentum"):
        create_optimizer("agr_adamw", nn.Linear(2, 2), momentum=0.9)
    with pytest.raises(
        TypeError, match=r"takes parameters, but a model \(Linear\) was given; pass agr_param_groups\(model\)"
    ):
        agr_hf.AGRAdamW(nn.Linear(2, 2))


def test_public_names_are_all_there():
    assert sorted(agr_hf.__all__) == sorted(set(agr_hf.__all__))
    assert all(hasattr(agr_hf, name) for name in agr_hf.__all__)


def test_importing_the_package_loads_no_heavy_library():
    code = (
        "import sys, torch; before = set(sys.modules); import agr_hf; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "print(sorted(new & {'transformers', 'diffusers', 'timm', 'matplotlib', 'accelerate', 'datasets', 'sklearn'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(("kind", "sizes"), [(nn.Linear, (4, 3)), (nn.Conv2d, (3, 4, 3))])
def test_a_layer_with_norm_in_its_name_is_the_layer_that_it_is(kind, sizes):
    named = type(f"Normalized{kind.__name__}", (kind,), {})
    first, second = agr_param_groups(named(*sizes))
    assert first["agr"]
    assert [param.ndim for param in first["params"]] == [len(sizes) if kind is nn.Linear else 4]
    assert [param.ndim for param in second["params"]] == [1]


def test_lazy_layers_are_refused_until_they_have_a_shape():
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="weight of a LazyLinear has no shape yet.*run the model on one batch"):
        agr_param_groups(model)
    model(torch.ones(1, 2))
    assert agr_param_groups(model)[0]["agr"]
