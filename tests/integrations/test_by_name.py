"""The optimizers by name in Trainer and timm; each way in trains as a plain loop does."""

import copy
import inspect
import pickle

import pytest
import torch
from launching import exit_code
from small import Recorder, arguments, losses_of, plain_loop, same_bits, small_model, stock_groups, trainer_of
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainingArguments

import agr_hf
from agr_hf import AGRAdamW, agr_param_groups
from agr_hf.integrations.trainer import parse_optim_args, trainer_optimizer
from agr_hf.optim.flags import agr_flags
from agr_hf.optim.registry import OPTIMIZERS, optimizer_info

OURS = [name for name, info in OPTIMIZERS.items() if info.ours]


@pytest.fixture(autouse=True, scope="module")
def registered():
    agr_hf.register()
    agr_hf.register()  # idempotent


def by_hand(name, model, **options):
    """The optimizer that the arguments of `small.arguments` describe, made without the package's integration."""
    cls = OPTIMIZERS[name].cls
    groups = stock_groups(model, 0.05)
    if "agr" in inspect.signature(cls).parameters:
        layers = (nn.Linear, nn.Conv2d)
        weights = {m.weight for m in model.modules() if isinstance(m, layers)}
        for group in groups:
            group["agr"] = [p in weights for p in group["params"]]
    betas = {} if "adan" in name else {"betas": (0.8, 0.999)}
    return cls(groups, lr=3e-3, eps=1e-7, **betas, **options)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("way", ["optim", "optimizer_cls_and_kwargs", "optimizers"])
def test_trainer_trains_as_a_plain_loop_does(name, way, tmp_path):
    model, recorder = small_model(), Recorder()
    if way == "optim":
        trainer = trainer_of(model, arguments(tmp_path, optim=name), data_collator=recorder)
    elif way == "optimizer_cls_and_kwargs":
        args = arguments(tmp_path)
        chosen = trainer_optimizer(name, args)
        trainer = trainer_of(model, args, data_collator=recorder, optimizer_cls_and_kwargs=chosen)
    else:
        trainer = trainer_of(
            model, arguments(tmp_path), data_collator=recorder, optimizers=(by_hand(name, model), None)
        )
    trainer.train()
    losses = losses_of(trainer)
    assert losses[-1] < losses[0]
    twin = small_model()
    plain_loop(twin, by_hand(name, twin), recorder.batches[:20])
    assert same_bits(model, twin)


def test_the_groups_of_agr_param_groups_go_through_optimizers(tmp_path):
    model, recorder = small_model(), Recorder()
    optimizer = AGRAdamW(agr_param_groups(model, weight_decay=0.05), lr=3e-3)
    trainer_of(model, arguments(tmp_path), data_collator=recorder, optimizers=(optimizer, None)).train()
    twin = small_model()
    plain_loop(twin, AGRAdamW(agr_param_groups(twin, weight_decay=0.05), lr=3e-3), recorder.batches[:20])
    assert same_bits(model, twin)


def test_options_and_betas_reach_the_optimizer(tmp_path):
    text = "second_moment=regularized,agr_steps=1000, min_ndim=1,max_grad_norm=None,foreach=true"
    optimizer = trainer_of(small_model(), arguments(tmp_path, optim="agr_adamw", optim_args=text)).create_optimizer()
    group = optimizer.param_groups[0]
    assert type(optimizer) is AGRAdamW
    found = {key: group[key] for key in ("second_moment", "agr_steps", "min_ndim", "max_grad_norm", "foreach")}
    assert found == {
        "second_moment": "regularized", "agr_steps": 1000, "min_ndim": 1, "max_grad_norm": None, "foreach": True,
    }  # fmt: skip
    assert (group["lr"], group["betas"], group["eps"]) == (3e-3, (0.8, 0.999), 1e-7)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.05, 0.0]


def test_adan_takes_its_own_three_betas_and_says_when_adams_are_given(tmp_path, caplog):
    args = arguments(tmp_path, optim="agr_adan")
    optimizer = trainer_of(small_model(), args).create_optimizer()
    assert optimizer.param_groups[0]["betas"] == (0.98, 0.92, 0.99)
    assert "adam_beta1=0.8 and adam_beta2=0.999 are not used" in caplog.text
    args = arguments(tmp_path, optim="agr_adan", optim_args="beta1=0.9,beta2=0.8,beta3=0.7")
    caplog.clear()
    assert trainer_of(small_model(), args).create_optimizer().param_groups[0]["betas"] == (0.9, 0.8, 0.7)
    assert "are not used" not in caplog.text


@pytest.mark.parametrize("way", ["by name", "public"])
@pytest.mark.parametrize(
    ("name", "decay", "options", "said"),
    [("adal", 0.05, {}, True), ("adal", 0.0, {}, False), ("adal", 0.05, {"decoupled": True}, False),
     ("agr_adamw", 0.05, {}, False)],
)  # fmt: skip
def test_that_adals_decay_is_l2_is_said(way, name, decay, options, said, tmp_path, caplog):
    text = ",".join(f"{key}={value}".lower() for key, value in options.items())
    args = arguments(tmp_path, optim=name, weight_decay=decay, optim_args=text)
    found = {} if way == "by name" else {"optimizer_cls_and_kwargs": trainer_optimizer(name, args, **options)}
    trainer_of(small_model(), args, **found).create_optimizer()
    assert ("is L2 in AdaL" in caplog.text) is said


def test_a_default_decay_is_said(caplog):
    with caplog.at_level("INFO"):
        agr_hf.create_optimizer("agr_adamw", small_model(), lr=1e-3)
    assert "agr_adamw decays weights by its default, 0.01" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        agr_hf.create_optimizer("agr_adamw", small_model(), lr=1e-3, weight_decay=0.0)
        agr_hf.create_optimizer("adal", small_model(), lr=1e-3)
    assert "decays weights" not in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("agr_steps", "'agr_steps' is not allowed; entries are name=value"),
        ("agr_steps=", "entries are name=value"),
        ("lr=0.1", "agr_adamw has no option lr; it has max_grad_norm"),
        ("momentum=0.9", "no option momentum"),
        ("agr_steps=many", "agr_steps='many' is not allowed; it must be a whole number"),
        ("agr_steps=-1", "it must be a whole number >= 0"),
        ("agr=maybe", "it must be True, False"),
        ("max_grad_norm=__import__('os')", "it must be a number"),
        ("beta1=0.9", "takes 2 betas, but 1 were given"),
    ],
)
def test_bad_optim_args_get_a_sentence(text, message):
    with pytest.raises(ValueError, match="optim_args|no option") as error:
        parse_optim_args(optimizer_info("agr_adamw"), text)
    assert message in str(error.value)


def test_bad_values_and_names_of_the_public_route_get_a_sentence(tmp_path):
    args = arguments(tmp_path)
    with pytest.raises(ValueError, match="there is no optimizer 'agr_lion'"):
        trainer_optimizer("agr_lion", args)
    with pytest.raises(ValueError, match="no option momentum"):
        trainer_optimizer("agr_adamw", args, momentum=0.9)
    with pytest.raises(ValueError, match="second_moment='both'"):
        trainer_of(
            small_model(), args, optimizer_cls_and_kwargs=trainer_optimizer("agr_adamw", args, second_moment="both")
        ).create_optimizer()


@pytest.mark.parametrize("name", OURS)
def test_the_argument_parser_of_any_script_knows_the_name(name, tmp_path):
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--optim", name]
    )
    assert args.optim == name
    assert name in args.to_json_string()


def register_in_a_fresh_process():
    with pytest.raises(ValueError, match="is not a valid OptimizerNames"):
        TrainingArguments(output_dir="x", optim="agr_adamw")
    agr_hf.register()
    assert TrainingArguments(output_dir="x", optim="agr_adamw").optim.value == "agr_adamw"


def test_names_are_unknown_before_register_and_a_fresh_process_registers():
    assert exit_code(register_in_a_fresh_process) == 0


def test_the_card_that_trainer_writes_names_the_optimizer(tmp_path):
    trainer = trainer_of(small_model(), arguments(tmp_path, optim="agr_adamw", optim_args="agr_steps=7", max_steps=2))
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "AGR_ADAMW" in card or "agr_adamw" in card
    assert "agr_steps=7" in card


def test_a_version_without_the_table_fails_with_the_public_route(monkeypatch):
    import transformers.trainer_optimizer

    from agr_hf.integrations import private

    monkeypatch.delattr(transformers.trainer_optimizer, "_OPTIMIZER_HANDLERS")
    with pytest.raises(RuntimeError, match=r"lacks trainer_optimizer._OPTIMIZER_HANDLERS; use the public route"):
        private.add_trainer_optimizer("agr_adamw", lambda context: None)


def test_a_name_that_transformers_takes_some_day_is_not_overwritten():
    from agr_hf.integrations import private

    with pytest.raises(RuntimeError, match="has an optimizer 'adamw_torch' of its own"):
        private.add_trainer_optimizer("adamw_torch", lambda context: None)


def test_checkpoints_move_between_stock_adamw_and_agr_adamw(tmp_path):
    """A stock run resumed with --optim agr_adamw, and that one with the stock optimizer again."""
    ends = {}
    steps = [("adamw_torch", 6), ("agr_adamw", 12), ("adamw_torch_fused", 18)]
    for before, (name, stop) in zip([None, *steps], steps, strict=False):
        args = arguments(tmp_path, optim=name, max_steps=stop, save_strategy="steps", save_steps=6)
        trainer = trainer_of(small_model(), args)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{before[1]}") if before else None)
        state = trainer.optimizer.state_dict()
        ends[stop] = state
        assert {float(entry["step"]) for entry in state["state"].values()} == {float(stop)}
        assert len(state["param_groups"]) == 2
    assert "agr" in ends[12]["param_groups"][0]
    assert ends[12]["param_groups"][0]["agr_step"] == 12


class TestTimm:
    timm = pytest.importorskip("timm", reason="timm is missing: pip install 'agr-hf[train]'")

    @pytest.mark.parametrize("name", OURS)
    def test_timm_makes_every_optimizer_by_name(self, name):
        from timm.optim import create_optimizer_v2

        model = self.timm.create_model("resnet10t", num_classes=2)
        betas = (0.7, 0.8, 0.9) if "adan" in name else (0.7, 0.8)
        info = OPTIMIZERS[name]
        optimizer = create_optimizer_v2(model, info.timm_name, lr=0.5, weight_decay=0.05, eps=1e-5, betas=betas)
        if name == "adan":  # timm's own, which a test of the optimizers finds equal to the bit
            assert type(optimizer).__module__.startswith("timm.")
            return
        assert type(optimizer) is info.cls
        for group in optimizer.param_groups:
            assert (group["lr"], group["eps"], group["betas"]) == (0.5, 1e-5, betas)
        assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.05]

    def test_timm_groups_get_agr_by_layer_type(self):
        from timm.optim import create_optimizer_v2

        model = self.timm.create_model("vit_tiny_patch16_224", num_classes=2)
        for options in ({}, {"layer_decay": 0.7}):
            optimizer = create_optimizer_v2(model, "agradamw", lr=0.5, weight_decay=0.05, **options)
            marked = set()
            for group in optimizer.param_groups:
                flags = group["agr"] if isinstance(group["agr"], list) else [group["agr"]] * len(group["params"])
                marked |= {p for p, flag in zip(group["params"], flags, strict=True) if flag}
            names = {name for name, param in model.named_parameters() if param in marked}
            assert names == {
                name
                for name, param in model.named_parameters()
                if param.ndim > 1 and name not in ("pos_embed", "cls_token")
            }

    @pytest.mark.parametrize("prefix", ["", "lookahead_", "Lookahead_"])
    def test_our_own_names_do_not_make_timms_optimizers(self, prefix):
        """timm alone reads agr_adamw as adamw, and trains without AGR without a word."""
        from timm.optim import create_optimizer_v2

        model = self.timm.create_model("resnet10t", num_classes=2)
        for name in ("agr_adamw", "agr_adam", "agr_adan"):
            made = create_optimizer_v2(model, prefix + name, lr=0.1)
            assert isinstance(getattr(made, "_base_optimizer", made), optimizer_info(name).cls)

    @pytest.mark.parametrize("name", ["agradamw", "agr_adamw", "lookahead_agr_adamw"])
    def test_an_unknown_option_gets_a_sentence_with_those_there_are(self, name):
        from timm.optim import create_optimizer_v2

        with pytest.raises(
            TypeError, match=r"AGRAdamW has no option agr_step \(did you mean agr_steps\?\); it has lr, .*agr_steps"
        ):
            create_optimizer_v2(nn.Linear(2, 2), name, lr=0.1, agr_step=3)

    def test_timms_own_optimizers_are_left_alone(self):
        from timm.optim import create_optimizer_v2

        optimizer = create_optimizer_v2(nn.Linear(2, 2), "adamw", lr=0.1)
        assert type(optimizer) is torch.optim.AdamW
        assert "agr" not in optimizer.param_groups[0]


def test_agr_false_by_name_is_a_run_without_agr(tmp_path):
    """A control run: groups by layer type must not turn AGR on again."""
    timm = pytest.importorskip("timm", reason="timm is missing: pip install 'agr-hf[train]'")

    def by_timm(**options):
        return timm.optim.create_optimizer_v2(small_model(), "agradamw", lr=1e-3, **options)

    args = arguments(tmp_path, optim="agr_adamw", optim_args="agr=false")
    by_class = trainer_optimizer("agr_adamw", arguments(tmp_path), agr=False)
    for optimizer in (
        trainer_of(small_model(), args).create_optimizer(),
        trainer_of(small_model(), arguments(tmp_path), optimizer_cls_and_kwargs=by_class).create_optimizer(),
        by_timm(agr=False),
    ):
        assert not any(any(agr_flags(group)) for group in optimizer.param_groups)
        assert type(optimizer) is AGRAdamW
    for optimizer in (trainer_of(small_model(), arguments(tmp_path, optim="agr_adamw")).create_optimizer(), by_timm()):
        assert any(any(agr_flags(group)) for group in optimizer.param_groups)


def test_by_name_the_groups_are_those_of_the_trainer_at_hand(tmp_path):
    """Of a subclass that decays otherwise too: a checkpoint of its AdamW must fit."""

    class Own(Trainer):
        def get_decay_parameter_names(self, model):
            return [name for name, _ in model.named_parameters() if "classifier" in name]

    made = [
        Own(model=small_model(), args=arguments(tmp_path, optim=name)).create_optimizer()
        for name in ("adamw_torch", "agr_adamw")
    ]
    stock, ours = ([(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups] for optimizer in made)
    assert stock == ours
    made[1].load_state_dict(made[0].state_dict())
    copy.deepcopy(made[1])
    pickle.loads(pickle.dumps(made[1]))


@pytest.mark.parametrize(
    "groups",
    [
        lambda model: model.parameters(),
        lambda model: model.named_parameters(),
        lambda model: [{"params": param} for param in model.parameters()],
        lambda model: [{"params": (param for param in model.parameters())}],
    ],
    ids=["parameters", "named", "a group each", "a generator"],
)
def test_a_trainer_may_make_its_groups_as_torch_allows(groups, tmp_path):
    model = small_model()
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim="agr_adamw"), model)
    optimizer = cls(groups(model), **kwargs)
    flags = {
        p: flag for group in optimizer.param_groups for p, flag in zip(group["params"], agr_flags(group), strict=True)
    }
    wanted = {m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert {param for param, flag in flags.items() if flag} == wanted
    without_model, _ = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim="agr_adamw"))
    assert without_model is AGRAdamW
