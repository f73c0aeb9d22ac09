"""Suspension, statistics in every log, and the gradient-scale trap."""

import itertools
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from small import arguments, same_bits, small_data, small_model, trainer_of
from transformers import TrainerCallback

import agr_hf
import agr_hf.integrations.callbacks as callbacks_module
from agr_hf import AdaL, AGRAdamW, agr_param_groups, attach_agr, create_optimizer
from agr_hf.integrations.callbacks import (
    GradientScaleCheck,
    GradientStatistics,
    SaveOptimizerState,
    SuspendAGR,
    TrainingTime,
)
from agr_hf.integrations.trainer import train
from agr_hf.optim.flags import agr_flags
from agr_hf.optim.statistics import agr_gradients, gradient_statistics
from agr_hf.tasks.runs import summarize_gradients


@pytest.fixture(autouse=True, scope="module")
def registered():
    agr_hf.register()


class Flags(TrainerCallback):
    """Whether AGR was on in each step."""

    def __init__(self):
        self.on = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        groups = kwargs["optimizer"].param_groups
        self.on.append(any(any(agr_flags(group)) and not group.get("agr_suspended") for group in groups))


@pytest.mark.parametrize(("at_epoch", "steps_with_agr"), [(2, 16), (0, 0), (1.5, 12), (2.5, 20)])
def test_agr_is_suspended_at_the_epoch_and_said_so(at_epoch, steps_with_agr, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="agr_hf")
    flags = Flags()
    callbacks = [SuspendAGR(at_epoch=at_epoch), flags]
    args = arguments(tmp_path, optim="agr_adamw", max_steps=-1, num_train_epochs=3)  # 8 steps an epoch
    trainer = trainer_of(small_model(), args, callbacks=callbacks)
    trainer.train()
    assert flags.on == [True] * steps_with_agr + [False] * (24 - steps_with_agr)
    assert f"AGR is suspended from epoch {at_epoch:g}, step {steps_with_agr}" in caplog.text
    entries = [entry for entry in trainer.state.log_history if entry.get("agr_suspended")]
    assert [entry["step"] for entry in entries] == [steps_with_agr + 1]


def test_a_run_resumed_after_the_suspension_stays_suspended(tmp_path):
    """Also without the callback: the optimizer's checkpoint keeps it."""
    args = arguments(tmp_path, optim="agr_adamw", max_steps=16, save_strategy="steps", save_steps=12)
    trainer_of(small_model(), args, callbacks=[SuspendAGR(at_epoch=1)]).train()
    for callbacks in ([], [SuspendAGR(at_epoch=1)]):
        flags = Flags()
        trainer = trainer_of(small_model(), args, callbacks=[*callbacks, flags])
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
        assert flags.on == [False] * 4


@pytest.mark.parametrize("attached", [False, True])
def test_a_suspension_ends_with_its_training(attached, tmp_path):
    flags, model = Flags(), small_model()
    args = arguments(tmp_path, optim="agr_adamw", max_steps=12)
    optimizer = torch.optim.SGD(agr_param_groups(model), lr=0.1) if attached else None
    if attached:
        attach_agr(optimizer)
    trainer = trainer_of(model, args, optimizers=(optimizer, None), callbacks=[SuspendAGR(at_epoch=1), flags])
    for _ in range(2):  # with one optimizer, which Trainer keeps
        flags.on.clear()
        trainer.train()
        assert flags.on == [True] * 8 + [False] * 4


@pytest.mark.parametrize("flags_of_groups", ["by layer type", "as agr_param_groups has them"])
def test_a_later_epoch_applies_agr_again_where_the_checkpoint_suspended_it(flags_of_groups, tmp_path):
    def trainer(at_epoch, folder, **options):
        flags, model = Flags(), small_model()
        args = arguments(tmp_path / folder, optim="agr_adamw", max_steps=16, save_strategy="steps", **options)
        optimizer = None
        if flags_of_groups != "by layer type":
            optimizer = AGRAdamW(agr_param_groups(model), lr=3e-3)
        return trainer_of(model, args, optimizers=(optimizer, None), callbacks=[SuspendAGR(at_epoch), flags]), flags

    def where(trainer):
        return [agr_flags(group) for group in trainer.optimizer.param_groups]

    early, _ = trainer(1, "early", save_steps=12)
    early.train()
    late, flags = trainer(1.75, "late", save_steps=50)
    train(late, str(tmp_path / "early/checkpoint-12"))
    assert flags.on == [True] * 2 + [False] * 2
    whole, _ = trainer(3, "whole", save_steps=50)
    whole.train()
    assert where(late) == where(whole)  # on the layers that it was on


def test_optimizer_state_of_a_search_is_refused_before_a_trial_trains(tmp_path):
    """Trials would write into one folder; a callback does not know that of its trial."""
    args = arguments(tmp_path, optim="agr_adamw", max_steps=2, save_strategy="steps", save_steps=1)
    options = {"model_init": lambda _: small_model(), "eval_dataset": small_data(8)}
    trainer = trainer_of(None, args, callbacks=[SaveOptimizerState()], **options)

    def space(trial):
        return {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3)}

    with pytest.raises(RuntimeError, match="SaveOptimizerState does not work in a hyperparameter search"):
        trainer.hyperparameter_search(backend="optuna", n_trials=1, hp_space=space)
    assert not list(tmp_path.rglob("checkpoint-*"))
    trainer.remove_callback(SaveOptimizerState)
    trainer.hyperparameter_search(backend="optuna", n_trials=1, hp_space=space)
    assert (tmp_path / "run-0/checkpoint-2/optimizer.pt").exists()


def test_suspension_of_an_optimizer_without_agr_is_said(tmp_path, caplog):
    trainer_of(small_model(), arguments(tmp_path, max_steps=2), callbacks=[SuspendAGR(at_epoch=0)]).train()
    assert "AdamW has no AGR to suspend" in caplog.text


def test_suspension_reaches_attached_psi(tmp_path):
    model = small_model()
    optimizer = torch.optim.SGD(agr_param_groups(model), lr=0.1)
    attach_agr(optimizer)
    trainer_of(
        model, arguments(tmp_path, max_steps=3), optimizers=(optimizer, None), callbacks=[SuspendAGR(at_epoch=0)]
    ).train()
    assert all(group["agr_suspended"] for group in optimizer.param_groups)


def test_suspension_reaches_psi_attached_to_groups_that_do_not_know_agr(tmp_path):
    def trained(attached, callbacks):
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if attached:
            attach_agr(optimizer)
        trainer_of(model, arguments(tmp_path, max_steps=3), optimizers=(optimizer, None), callbacks=callbacks).train()
        return model

    assert same_bits(trained(True, [SuspendAGR(at_epoch=0)]), trained(False, []))
    assert not same_bits(trained(True, []), trained(False, []))


def test_the_same_callback_suspends_in_the_next_training_too(tmp_path):
    flags = Flags()
    args = arguments(tmp_path, optim="agr_adamw", max_steps=12)  # eight steps an epoch
    trainer = trainer_of(small_model(), args, callbacks=[SuspendAGR(at_epoch=1), flags])
    for _ in range(2):
        flags.on.clear()
        trainer.optimizer = None
        trainer.train()
        assert flags.on == [True] * 8 + [False] * 4


@pytest.mark.parametrize(("at_epoch", "steps"), [(0.25, 2), (0.5, 4), (1.5, 12), (0.3, 2), (0.33, 3)])
def test_half_a_step_is_one_of_this_run_and_not_of_trainers_three_epochs(at_epoch, steps, tmp_path):
    flags = Flags()
    args = arguments(tmp_path, optim="agr_adamw", max_steps=13)
    trainer_of(small_model(), args, callbacks=[SuspendAGR(at_epoch=at_epoch), flags]).train()
    assert flags.on == [True] * steps + [False] * (13 - steps)


def test_seconds_are_those_of_all_parts_of_a_run(tmp_path, monkeypatch):
    now = itertools.count()  # a second passes at each step, and wherever the time is asked for
    monkeypatch.setattr("agr_hf.integrations.recording.time", SimpleNamespace(perf_counter=lambda: next(now)))

    class Slow(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            next(now)

    def trained(resume, **options):
        clock = TrainingTime()
        args = arguments(tmp_path, save_strategy="steps", save_steps=4, logging_steps=1, **options)
        train(trainer_of(small_model(), args, callbacks=[clock, Slow()]), resume)
        return clock.seconds

    # A step and its log are 2 seconds. The end asks twice more, for Trainer logs it too; no checkpoint knows of those.
    assert trained(None, max_steps=8) == 8 * 2 + 2
    assert trained("latest", max_steps=8) == 8 * 2  # made no step
    assert trained("latest", max_steps=12) == 12 * 2 + 2


def test_a_suspension_that_never_comes_is_said(tmp_path, caplog):
    args = arguments(tmp_path, optim="agr_adamw", max_steps=2)
    trainer_of(small_model(), args, callbacks=[SuspendAGR(at_epoch=250)]).train()
    assert "the run ends before epoch 250, with AGR to its end" in caplog.text


def test_without_agr_the_same_layers_are_measured(tmp_path):
    """A card says what AGR would have done: to the layers that `agr_param_groups` would give it."""
    model = small_model()
    measured = []
    for optimizer in (
        torch.optim.AdamW(model.parameters()), AGRAdamW(agr_param_groups(model)), create_optimizer("adal", model),
    ):  # fmt: skip
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        measured.append([name for name, _ in agr_gradients(model, optimizer)])
    assert measured[0] == measured[1] == measured[2]
    assert any("position" in n or "cls_token" in n for n, p in model.named_parameters() if p.ndim > 1)
    assert not any("position" in n or "cls_token" in n for n in measured[0])
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    attach_agr(sgd)  # takes every matrix
    assert len(agr_gradients(model, sgd)) == sum(param.ndim > 1 for param in model.parameters())


def test_groups_by_layer_type_are_no_agr_to_suspend(tmp_path, caplog):
    model = small_model()
    optimizer = torch.optim.AdamW(agr_param_groups(model), lr=1e-3)
    args = arguments(tmp_path, max_steps=2)
    trainer_of(model, args, optimizers=(optimizer, None), callbacks=[SuspendAGR(at_epoch=0)]).train()
    assert "SuspendAGR: AdamW has no AGR to suspend" in caplog.text
    assert "AGR is suspended" not in caplog.text


def test_a_negative_epoch_is_refused():
    with pytest.raises(ValueError, match="at_epoch=-1"):
        SuspendAGR(at_epoch=-1)


class Tracker(TrainerCallback):
    """Stands where TensorBoard, Trackio and W&B stand: before the user's callbacks, fed by on_log."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def statistics_in(entries):
    return [{k: v for k, v in entry.items() if k.startswith("gradients/")} for entry in entries]


def test_statistics_reach_log_history_and_every_tracker(tmp_path):
    tracker = Tracker()
    trainer = trainer_of(small_model(), arguments(tmp_path, optim="agr_adamw"), callbacks=[tracker])
    statistics = GradientStatistics(every=5).attach(trainer)
    assert trainer.callback_handler.callbacks.index(tracker) < trainer.callback_handler.callbacks.index(statistics)
    trainer.train()
    history = [s for s in statistics_in(trainer.state.log_history) if s]
    assert len(history) == 4
    assert [s for s in statistics_in(tracker.logs) if s] == history
    keys = {key.rsplit("/", 1)[1] for key in history[0]}
    assert keys == {"effect", "largest_share", "l1_norm", "zeros", "log_mean", "log_std", "measurements"}
    assert {key.split("/")[1] for key in history[0]} >= {"overall", "classifier.weight"}
    assert not any("bias" in key or "layernorm" in key for key in history[0])
    assert 0 < history[0]["gradients/overall/effect"] < 0.1
    json.dumps(trainer.state.log_history, allow_nan=False)


def test_after_suspension_the_counter_of_measurements_does_not_stand_alone(tmp_path):
    args = arguments(tmp_path, optim="agr_adamw", max_steps=8, logging_steps=1)
    trainer = trainer_of(small_model(), args, callbacks=[SuspendAGR(at_epoch=0.5)])
    GradientStatistics(every=1).attach(trainer)
    trainer.train()
    entries = [e for e in trainer.state.log_history if "loss" in e]
    assert entries[4]["agr_suspended"]
    for entry in entries[5:]:
        assert ("gradients/overall/measurements" in entry) == ("gradients/overall/effect" in entry)


def test_measurements_between_two_entries_are_logged_as_their_mean(tmp_path):
    def overall(logging_steps):
        trainer = trainer_of(small_model(), arguments(tmp_path, optim="agr_adamw", logging_steps=logging_steps))
        GradientStatistics(every=2).attach(trainer)
        trainer.train()
        history = [s for s in statistics_in(trainer.state.log_history) if s]
        return history, summarize_gradients(trainer.state.log_history)

    each, of_each = overall(1)
    ((mean,), of_mean) = overall(20)
    assert (
        len(each) == mean["gradients/overall/measurements"] == of_each["measurements"] == of_mean["measurements"] == 10
    )
    effects = [entry["gradients/overall/effect"] for entry in each]
    assert mean["gradients/overall/effect"] == pytest.approx(sum(effects) / 10)
    largest = [entry["gradients/overall/largest_share"] for entry in each]
    assert mean["gradients/overall/largest_share"] == max(largest)
    for name in ("effect", "largest_share"):
        assert of_mean["overall"][name] == pytest.approx(of_each["overall"][name])


def test_an_infinite_norm_is_no_json_and_left_out(tmp_path):
    class Infinite(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            model.classifier.weight.grad[0, 0] = float("inf")

    args = arguments(tmp_path, optim="agr_adamw", max_steps=1, logging_steps=1)
    trainer = trainer_of(small_model(), args, callbacks=[Infinite()])
    GradientStatistics(every=1).attach(trainer)
    trainer.train()
    statistics = statistics_in(trainer.state.log_history)[0]
    assert "gradients/classifier.weight/l1_norm" not in statistics
    json.dumps(statistics, allow_nan=False)


def test_statistics_are_in_tensorboards_files(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is missing: pip install 'agr-hf[test]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = arguments(tmp_path, optim="agr_adamw", report_to="tensorboard")
    args.logging_dir = str(tmp_path / "board")
    trainer = trainer_of(small_model(), args)
    GradientStatistics(every=5, layers=False).attach(trainer)
    trainer.train()
    (events,) = list(tmp_path.rglob("events.out.tfevents*"))
    board = EventAccumulator(str(events.parent)).Reload()
    tags = [tag for tag in board.Tags()["scalars"] if "gradients/overall/effect" in tag]
    assert len(tags) == 1
    assert len(board.Scalars(tags[0])) == 4


def test_statistics_as_a_mere_callback_reach_log_history_and_say_what_they_miss(tmp_path, caplog):
    args = arguments(tmp_path, optim="agr_adamw")
    trainer = trainer_of(small_model(), args, callbacks=[GradientStatistics(every=5)])
    args.report_to = ["wandb"]  # named, not run
    trainer.train()
    assert sum(bool(s) for s in statistics_in(trainer.state.log_history)) == 4
    assert "not wandb; call GradientStatistics(...).attach(trainer)" in caplog.text


def test_statistics_equal_those_of_the_summarize_gradients_the_step(tmp_path):
    class Own(TrainerCallback):
        found = None

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.found = gradient_statistics([("w", model.classifier.weight.grad.clone())])["w"]

    own = Own()
    args = arguments(tmp_path, optim="agr_adamw", max_steps=1, logging_steps=1)
    trainer = trainer_of(small_model(), args, callbacks=[own])
    GradientStatistics(every=1).attach(trainer)
    trainer.train()
    logged = trainer.state.log_history[0]
    for key, value in own.found.as_dict().items():
        assert logged[f"gradients/classifier.weight/{key}"] == pytest.approx(value)


def test_nothing_is_measured_between(tmp_path, monkeypatch):
    calls = []
    real = callbacks_module.gradient_statistics
    monkeypatch.setattr(callbacks_module, "gradient_statistics", lambda grads: calls.append(1) or real(grads))
    trainer = trainer_of(small_model(), arguments(tmp_path, optim="agr_adamw"))
    GradientStatistics(every=7).attach(trainer)
    trainer.train()
    assert len(calls) == 3  # steps 0, 7, 14


@pytest.mark.parametrize("every", [0, 1.5, "5", True])
def test_a_bad_interval_is_refused(every):
    with pytest.raises(ValueError, match="every="):
        GradientStatistics(every=every)


class Dropping(torch.nn.Module):
    """A head that takes num_items_in_batch and drops it; "uses" divides by it, as causal language models do."""

    def __init__(self, uses):
        super().__init__()
        self.linear = torch.nn.Linear(64, 10)
        self.dropout = torch.nn.Dropout(0.5)
        self.uses = uses

    def forward(self, pixel_values, labels=None, **kwargs):
        logits = self.linear(self.dropout(pixel_values.flatten(1)))
        loss = torch.nn.functional.cross_entropy(logits, labels)
        if self.uses and kwargs.get("num_items_in_batch") is not None:
            loss = loss * len(labels) / kwargs["num_items_in_batch"]
        return {"loss": loss, "logits": logits}


def scale_warnings(tmp_path, caplog, model, optimizer, **options):
    args = arguments(tmp_path, max_steps=2, **options)
    trainer = trainer_of(model, args, callbacks=[GradientScaleCheck()], optimizers=(optimizer, None))
    trainer.train()
    return [record.getMessage() for record in caplog.records if "47688" in record.getMessage()]


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("uses", [True, False])
def test_the_gradient_scale_trap_is_warned_of_once_and_only_where_it_is(steps, uses, tmp_path, caplog):
    model = Dropping(uses)
    found = scale_warnings(
        tmp_path, caplog, model, AdaL(model.parameters()), gradient_accumulation_steps=steps, max_grad_norm=1.0
    )
    assert len(found) == (1 if steps == 4 and not uses else 0)
    for warning in found:
        assert "4 times those of the mean loss" in warning
        assert "clips at 1/4 of the norm" in warning
        assert "16 times larger" in warning


def test_the_warning_is_right_about_the_gradients(tmp_path):
    """The trap itself: Trainer's gradients of a dropping head are the accumulation steps times the mean's."""

    class Norm(TrainerCallback):
        norm = 0.0

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.norm = model.linear.weight.grad.norm().item()

    norms = {}
    for declared in (None, False):
        torch.manual_seed(0)
        model, norm = Dropping(uses=False), Norm()
        model.dropout.p = 0.0
        if declared is not None:
            model.accepts_loss_kwargs = declared
        args = arguments(tmp_path, max_steps=1, gradient_accumulation_steps=4, max_grad_norm=0)
        trainer_of(model, args, callbacks=[norm], optimizers=(AdaL(model.parameters()), None)).train()
        norms[declared] = norm.norm
    assert norms[None] == pytest.approx(4 * norms[False], rel=1e-5)


def test_no_warning_where_nothing_minds(tmp_path, caplog):
    model = Dropping(uses=False)
    optimizer = AGRAdamW(model.parameters())
    assert not scale_warnings(tmp_path, caplog, model, optimizer, gradient_accumulation_steps=4, max_grad_norm=0)


def test_asking_the_model_disturbs_no_random_state_and_no_mode(tmp_path):
    ends = []
    for callbacks in ([], [GradientScaleCheck()]):
        torch.manual_seed(0)
        model = Dropping(uses=False)
        args = arguments(tmp_path, max_steps=3, gradient_accumulation_steps=2)
        optimizer = AdaL(model.parameters())
        trainer_of(model, args, callbacks=callbacks, optimizers=(optimizer, None), train_dataset=small_data(96)).train()
        ends.append(model.linear.weight.detach().clone())
    assert torch.equal(*ends)


def test_measurements_before_a_checkpoint_are_in_it(tmp_path):
    """Else a resumed run would write down fewer of them than one never stopped."""

    def trained(resume=None):
        args = arguments(tmp_path, optim="agr_adamw", logging_steps=20, save_strategy="steps", save_steps=6)
        trainer = trainer_of(small_model(), args)
        GradientStatistics(every=1).attach(trainer)
        train(trainer, resume)
        return summarize_gradients(trainer.state.log_history)

    whole = trained()
    assert whole["measurements"] == 20
    assert trained(str(tmp_path / "checkpoint-12")) == whole


def test_a_suspension_reaches_agr_attached_to_a_state_saved_without_it(tmp_path):
    model = small_model()
    stock = torch.optim.AdamW(agr_param_groups(model), lr=1e-3)
    args = arguments(tmp_path / "stock", max_steps=4, save_strategy="steps", save_steps=4)
    trainer_of(model, args, optimizers=(stock, None)).train()
    optimizer = torch.optim.AdamW(agr_param_groups(model), lr=1e-3)
    attach_agr(optimizer)
    flags = Flags()
    args = arguments(tmp_path, max_steps=8)
    callbacks = [SuspendAGR(at_epoch=0), flags]
    trainer = trainer_of(model, args, optimizers=(optimizer, None), callbacks=callbacks)
    train(trainer, str(tmp_path / "stock/checkpoint-4"))
    assert flags.on == [False] * 4
