"""The example loop: resumed bits, two processes against one, loss scaling."""

import itertools
import os
import runpy
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration, debug_launcher
from launching import exit_code, run_module
from safetensors.torch import load

from agr_hf import AdaL, AGRAdamW, create_optimizer, list_optimizers
from agr_hf.integrations.accelerate import (
    Progress,
    batches_of_epoch,
    latest_state,
    load_checkpoint,
    make_ema,
    save_checkpoint,
)

ROOT = Path(__file__).parents[2]
LOOP = ROOT / "training_scripts/accelerate_loop.py"
OURS = list_optimizers()[:7]


def loop(folder, *options):
    """Run the script in this process."""
    # The singletons of accelerate outlive a run; a script has a process of its own.
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    main = runpy.run_path(str(LOOP))["main"]
    main(["--output_dir", str(folder), "--cpu", "--num_train_epochs", "2", *map(str, options)])
    return {name: load((Path(folder) / name / "model.safetensors").read_bytes()) for name in ("model", "ema")}


def assert_same_bits(one, other):
    for name in one:
        assert all(torch.equal(one[name][key], other[name][key]) for key in one[name])


@pytest.mark.parametrize("name", OURS)
def test_a_resumed_loop_has_the_bits_of_one_never_stopped(name, tmp_path):
    """From the middle of an epoch, with accumulation, clipping, schedule, EMA and (for AGR) suspension."""
    options = ["--optim", name, "--gradient_accumulation_steps", 2, "--save_steps", 6]
    if name.startswith("agr"):
        options += ["--agr_steps", 11]
    whole = loop(tmp_path, *options)
    checkpoints = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-12", "checkpoint-16"]
    resumed = loop(tmp_path, *options, "--resume_from_checkpoint", tmp_path / "checkpoint-12")
    assert_same_bits(whole, resumed)


def test_latest_is_the_last_finished_one(tmp_path):
    options = ["--save_steps", 10]
    whole = loop(tmp_path, *options)
    (tmp_path / ".unfinished-99").mkdir()  # a kill in the middle of a save leaves this
    resumed = loop(tmp_path, *options, "--resume_from_checkpoint", "latest")
    assert_same_bits(whole, resumed)
    assert not (tmp_path / ".unfinished-99").exists()


@pytest.mark.parametrize("damage", ["empty", "cut", "no_random_states"])
def test_a_broken_checkpoint_is_passed_over_for_the_last_good_one(damage, tmp_path, caplog):
    options = ["--save_steps", 4]
    whole = loop(tmp_path, *options)
    last = max(tmp_path.glob("checkpoint-*"), key=lambda folder: int(folder.name.removeprefix("checkpoint-")))
    if damage == "empty":
        last = tmp_path / "checkpoint-99"
        last.mkdir()
    elif damage == "cut":
        (last / "optimizer.bin").write_bytes((last / "optimizer.bin").read_bytes()[:-100])
    else:
        (last / "random_states_0.pkl").unlink()
    with pytest.raises(ValueError, match=f"cannot resume from {last}: "):
        loop(tmp_path, *options, "--resume_from_checkpoint", last)
    resumed = loop(tmp_path, *options, "--resume_from_checkpoint", "latest")
    assert f"{last} is passed over: " in caplog.text
    assert_same_bits(whole, resumed)


def test_a_run_resumed_from_an_older_checkpoint_keeps_its_own(tmp_path, caplog):
    accelerator = Accelerator(cpu=True)
    param = torch.nn.Linear(2, 2)
    accelerator.prepare(param)
    for step in (100, 200, 300):
        save_checkpoint(accelerator, tmp_path, step, keep=3)
    assert load_checkpoint(accelerator, str(tmp_path / "checkpoint-100"), tmp_path)
    save_checkpoint(accelerator, tmp_path, 150, keep=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-100", "checkpoint-150"]
    assert len(list(tmp_path.glob("abandoned-checkpoint-[23]00-*"))) == 2  # nothing is lost
    assert "is of later steps than this run has made" in caplog.text


def test_models_saved_by_a_hook_of_the_user_count_as_complete_and_missing_files_do_not(tmp_path):
    """As diffusers' examples do."""
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(torch.nn.Linear(2, 2))

    def save(models, weights, folder):
        torch.save(models[0].state_dict(), f"{folder}/unet.pt")
        weights.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
    save_checkpoint(accelerator, tmp_path, 1)
    assert load_checkpoint(accelerator, "latest", tmp_path)
    assert load_checkpoint(accelerator, True, tmp_path)
    assert not load_checkpoint(accelerator, False, tmp_path)
    (tmp_path / "checkpoint-1/unet.pt").unlink()
    with pytest.raises(ValueError, match=r"cannot resume from .*: unet.pt is missing"):
        load_checkpoint(accelerator, str(tmp_path / "checkpoint-1"), tmp_path)
    assert not load_checkpoint(accelerator, "latest", tmp_path)


def test_a_loop_resumed_behind_the_last_batch_of_an_epoch_goes_on(tmp_path):
    whole = loop(tmp_path, "--save_steps", 16)  # of 16 an epoch
    assert_same_bits(whole, loop(tmp_path, "--resume_from_checkpoint", tmp_path / "checkpoint-16"))


def test_a_kill_while_a_checkpoint_is_replaced_leaves_one_of_its_step(tmp_path, monkeypatch):
    """A run that is finished and resumed saves its last step again; each rename and removal is a moment to die at."""

    class Killed(BaseException):
        pass

    accelerator, model = Accelerator(cpu=True), torch.nn.Linear(2, 2)
    accelerator.prepare(model)
    done = itertools.count()

    def dies_at(moment, function):
        def call(*args, **kwargs):
            if next(done) == moment:
                raise Killed
            return function(*args, **kwargs)

        return call

    for moment in itertools.count():
        folder = tmp_path / str(moment)
        save_checkpoint(accelerator, folder, 5, keep=1)
        done = itertools.count()
        with monkeypatch.context() as patch:
            for module, name in ((os, "replace"), (shutil, "rmtree")):
                patch.setattr(module, name, dies_at(moment, getattr(module, name)))
            try:
                save_checkpoint(accelerator, folder, 5, keep=1)
            except Killed:
                found = latest_state(folder)
                assert found is not None, f"nothing to resume from after a kill at moment {moment}"
                assert int(found.name.removeprefix("checkpoint-")) == 5
                save_checkpoint(accelerator, folder, 5, keep=1)
                found = None
            assert [path.name for path in folder.iterdir()] == ["checkpoint-5"]
            if next(done) <= moment:
                break
    assert moment > 3


@pytest.mark.parametrize("text", ["null", "3", "[1]"])
def test_a_table_of_files_that_is_none_is_a_fault(text, tmp_path):
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(torch.nn.Linear(2, 2))
    save_checkpoint(accelerator, tmp_path, 1)
    (tmp_path / "checkpoint-1/files.json").write_text(text)
    assert not load_checkpoint(accelerator, "latest", tmp_path)


def test_a_failing_save_leaves_the_checkpoints_as_they_were(tmp_path, monkeypatch):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.prepare(torch.nn.Linear(2, 2))
    save_checkpoint(accelerator, tmp_path, 1)

    def full_disk(folder, *args, **kwargs):
        Path(folder).mkdir()
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(accelerator, "save_state", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(accelerator, tmp_path, 2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1"]
    assert load_checkpoint(accelerator, "latest", tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        load_checkpoint(accelerator, str(tmp_path / "checkpoint-2"), tmp_path)


def test_only_the_newest_are_kept(tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    for step in (5, 50, 500):
        save_checkpoint(accelerator, tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-50", "checkpoint-500"]


def by_torchrun(arguments, log):
    run_module("torch.distributed.run", ["--standalone", "--nproc_per_node", 2, LOOP, *arguments], log)


def loop_here(arguments):
    runpy.run_path(str(LOOP))["main"](arguments)


def by_debug_launcher(arguments, log):
    assert exit_code(debug_launcher, loop_here, (list(map(str, arguments)),)) == 0


@pytest.mark.parametrize(("name", "launch"), [("agr_adamw", by_torchrun), ("adal", by_debug_launcher)])
def test_two_processes_equal_one_with_the_doubled_batch(name, launch, tmp_path):
    """DDP over gloo with accumulation 2. Not to the bit: means of means round otherwise, 1e-7 a step, and Adam turns the
    sign of a gradient near zero into a step of lr; 2e-3 * 16 steps is the largest move, and 1% of it the tolerance."""
    options = ["--optim", name, "--gradient_accumulation_steps", 2, "--learning_rate", 2e-3]
    own = ["--output_dir", tmp_path / "two", "--cpu", "--num_train_epochs", 2, "--per_device_train_batch_size", 16]
    launch([*options, *own], tmp_path / "log")
    two = load((tmp_path / "two/model/model.safetensors").read_bytes())
    one = loop(tmp_path / "one", *options, "--per_device_train_batch_size", 32)["model"]
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=0.01 * 2e-3 * 16)


def loop_in_a_notebook():
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    model, optimizer = accelerator.prepare(model, create_optimizer("agr_adamw", model, lr=0.1))
    torch.manual_seed(accelerator.process_index)
    for _ in range(3):
        optimizer.zero_grad()
        accelerator.backward(model(torch.randn(4, 3)).square().sum())
        optimizer.step()
    weights = accelerator.gather(accelerator.unwrap_model(model).weight.detach()[None])
    assert torch.equal(weights[0], weights[1])


def test_debug_launcher_runs_a_loop_in_two_processes():
    assert exit_code(debug_launcher, loop_in_a_notebook) == 0


@pytest.mark.parametrize("name", OURS)
def test_steps_with_infinities_are_skipped_and_the_others_see_unscaled_gradients(name):
    """accelerate's fp16 is for GPUs; its wrapper with a CPU GradScaler is the same code."""
    from accelerate.optimizer import AcceleratedOptimizer

    ends = []
    for scaled in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        optimizer = create_optimizer(name, model, lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        wrapped = AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler if scaled else None)
        skipped = []
        for step in range(6):
            wrapped.zero_grad()
            loss = model(torch.randn(5, 4)).square().mean()
            scaler.scale(loss).backward()
            if step == 3:
                before = model.weight.detach().clone()
                model.weight.grad[0, 0] = float("inf")
                if not scaled:
                    continue
            wrapped.step()
            if step == 3:
                assert torch.equal(model.weight, before)
                assert wrapped.step_was_skipped
            skipped.append(wrapped.step_was_skipped if scaled else False)
        if scaled:
            assert skipped == [False, False, False, True, False, False]
        assert {float(state["step"]) for state in optimizer.state.values()} == {5.0}
        ends.append(model.weight.detach().clone())
    assert torch.equal(*ends)  # a power of two scales exactly


def test_bf16_autocast_trains(tmp_path):
    ends = loop(tmp_path, "--mixed_precision", "bf16", "--optim", "adal", "--num_train_epochs", 1)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in ends["model"].values())


def test_an_average_of_weights_follows_its_decay():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    ema = make_ema(model, 0.75)
    ema.update_parameters(model)
    model.weight.data.fill_(1.0)
    ema.update_parameters(model)
    assert ema.module.weight == 0.25
    for decay in (1, -0.1, float("nan"), "0.9", None):
        with pytest.raises(ValueError, match="decay="):
            make_ema(model, decay)


def test_parameters_swapped_behind_the_optimizer_get_state_of_their_own():
    """FSDP2's prepare puts DTensors in the place of the groups' parameters: nothing may be remembered of the old ones."""
    for cls in (AGRAdamW, AdaL):
        old, new = torch.nn.Parameter(torch.ones(3, 3)), torch.nn.Parameter(torch.ones(3, 3))
        optimizer = cls([old], lr=0.1)
        optimizer.param_groups[0]["params"] = [new]
        new.grad = torch.randn(3, 3)
        optimizer.step()
        assert set(optimizer.state) == {new}
        assert torch.equal(old.detach(), torch.ones(3, 3))


def test_an_epoch_goes_on_in_batches_of_another_size(tmp_path):
    """As with another number of processes: the remaining examples, each once."""
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))

    def loader(size):
        return accelerator.prepare(torch.utils.data.DataLoader(range(48), size, shuffle=True))

    def flat(batches):
        return [int(value) for batch in batches for value in batch]

    progress = Progress()
    progress.epoch = 3
    order = flat(batches_of_epoch(accelerator, loader(4), progress))
    progress.batches = 4  # of 4 examples
    state = progress.state_dict()
    for size, batches in ((8, 2), (2, 8), (16, 1)):
        progress = Progress()
        progress.load_state_dict(state)
        assert flat(batches_of_epoch(accelerator, loader(size), progress)) == order[16:]
        assert progress.batches == batches
    with pytest.raises(ValueError, match="16 examples of an epoch, taken in batches of 4 .*now they are of 6"):
        progress.load_state_dict(state)
        batches_of_epoch(accelerator, loader(6), progress)
    progress.load_state_dict({"epoch": 3, "batches": 4, "step": 9})  # of an older version
    assert flat(batches_of_epoch(accelerator, loader(4), progress)) == order[16:]


@pytest.mark.parametrize(("step", "keep"), [(1, 0), (1, -1), (1, 1.5), (-1, 2), (2.0, 2), (True, 2)])
def test_a_checkpoint_that_could_not_be_found_again_is_refused(step, keep, tmp_path):
    accelerator = Accelerator(cpu=True)
    save_checkpoint(accelerator, tmp_path, 5)
    with pytest.raises(ValueError, match=r"(step|keep)=.* is not allowed; it must be an integer"):
        save_checkpoint(accelerator, tmp_path, step, keep=keep)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_all_checkpoints_are_kept_where_no_number_is_given(tmp_path):
    accelerator = Accelerator(cpu=True)
    for step in numpy.arange(4):
        save_checkpoint(accelerator, tmp_path, step, keep=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{step}" for step in range(4)]


def test_dropout_within_an_epoch_is_that_of_a_loop_never_stopped(tmp_path):
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True))

    def run(folder, resume=None, stop=None):
        torch.manual_seed(0)
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 1))
        optimizer = AGRAdamW(model.parameters(), lr=1e-2)
        loader = torch.utils.data.DataLoader(data, 8, shuffle=True)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        progress = Progress()
        accelerator.register_for_checkpointing(progress)
        load_checkpoint(accelerator, resume, folder)
        while progress.epoch < 2:
            for x, y in batches_of_epoch(accelerator, loader, progress):
                accelerator.backward(torch.nn.functional.mse_loss(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
                progress.batches += 1
                progress.step += 1
                if progress.step == stop:
                    return save_checkpoint(accelerator, folder, progress.step)
            progress.epoch += 1
            progress.batches = 0
        return [param.detach().clone() for param in model.parameters()]

    whole = run(tmp_path)
    run(tmp_path, stop=3)
    assert all(map(torch.equal, whole, run(tmp_path, resume="latest")))
