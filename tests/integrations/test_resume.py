"""Resume: the same bits as never having stopped; the last complete checkpoint; optimizer state without pickle."""

import itertools
import json
import logging
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import load_file
from small import arguments, same_bits, small_data, small_model, trainer_of
from torch.distributed.checkpoint import FileSystemWriter
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

import agr_hf
from agr_hf import AGRAdamW, agr_param_groups, create_optimizer, list_optimizers
from agr_hf.integrations.callbacks import SaveOptimizerState, SuspendAGR
from agr_hf.integrations.checkpoints import (
    checkpoint_fault,
    latest_checkpoint,
    resolve_checkpoint,
)
from agr_hf.integrations.optimizer_states import load_optimizer, save_optimizer
from agr_hf.integrations.resume import load_renamed_weights, train
from agr_hf.integrations.run import _train_resumably
from agr_hf.optim.param_groups import set_agr_flags

OURS = list_optimizers()[:7]


@pytest.fixture(autouse=True, scope="module")
def registered():
    agr_hf.register()


def job(folder, name, max_steps=16, callbacks=(), **options):
    settings = {
        "optim": name,
        "max_steps": max_steps,
        "save_strategy": "steps",
        "save_steps": 5,  # in the middle of an epoch of 8 steps
        "lr_scheduler_type": "cosine",
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 8,
    }
    model = small_model()
    model.config.hidden_dropout_prob = 0.1
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1  # random states matter
    return trainer_of(model, arguments(folder, **{**settings, **options}), callbacks=list(callbacks))


@pytest.mark.parametrize("name", OURS)
def test_a_resumed_trainer_run_has_the_bits_of_one_never_stopped(name, tmp_path):
    suspend = [SuspendAGR(at_epoch=1.5)] if name.startswith("agr") else []
    options = {} if name in ("acprop", "nosadam", "adan", "adal") else {"optim_args": "agr_steps=13"}
    whole = job(tmp_path / "whole", name, callbacks=suspend, **options)
    whole.train()
    for step in (5, 10, 15):
        # In its own folder, so that nothing but the checkpoint is there.
        shutil.copytree(tmp_path / f"whole/checkpoint-{step}", tmp_path / f"resumed/checkpoint-{step}")
        suspend = [SuspendAGR(at_epoch=1.5)] if name.startswith("agr") else []
        resumed = job(tmp_path / "resumed", name, callbacks=suspend, **options)
        train(resumed, "latest")
        assert resumed.state.global_step == 16
        assert same_bits(whole.model, resumed.model)
        shutil.rmtree(tmp_path / "resumed")


def test_a_script_under_agr_hf_run_resumes_to_the_bits_of_one_never_stopped(tmp_path, monkeypatch):
    """With evaluations, whose loaders draw a random number each, and a first part that passes no checkpoint."""
    monkeypatch.setattr(Trainer, "train", Trainer.train)  # put back afterwards
    _train_resumably()

    def trainer_in(folder):
        trainer = job(folder, "agr_adamw")
        trainer.eval_dataset = small_data(16)
        trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy.STEPS, 3
        return trainer

    whole = trainer_in(tmp_path / "whole")
    whole.train()
    for step in (5, 10):
        shutil.copytree(tmp_path / f"whole/checkpoint-{step}", tmp_path / f"{step}/checkpoint-{step}")
        resumed = trainer_in(tmp_path / f"{step}")
        resumed.train(resume_from_checkpoint="latest")
        assert same_bits(whole.model, resumed.model)


def test_without_our_loading_trainer_trains_on_from_fresh_weights(tmp_path):
    """transformers #43701, for this ViT. Where it is mended, `load_renamed_weights` finds nothing to do: drop it then."""
    whole = job(tmp_path, "agr_adamw")
    whole.train()
    checkpoint = str(tmp_path / "checkpoint-15")
    resumed, ours = job(tmp_path, "agr_adamw"), job(tmp_path, "agr_adamw")
    resumed.train(resume_from_checkpoint=checkpoint)
    train(ours, checkpoint)
    assert same_bits(whole.model, ours.model)
    if load_renamed_weights(small_model(), checkpoint):
        assert not same_bits(whole.model, resumed.model)


def test_renamed_weights_in_several_files_are_loaded(tmp_path):
    whole = job(tmp_path, "agr_adamw")
    whole.train()
    checkpoint = tmp_path / "checkpoint-15"
    model = small_model(seed=1).from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="5KB")
    assert len(list(checkpoint.glob("model-*.safetensors"))) > 1
    resumed = job(tmp_path, "agr_adamw")
    train(resumed, str(checkpoint))
    assert same_bits(whole.model, resumed.model)


def checkpoints(folder, *steps):
    """Real ones, of one short run."""
    job(folder, "agr_adamw", max_steps=max(steps), callbacks=[SaveOptimizerState()]).train()
    return [folder / f"checkpoint-{step}" for step in steps]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    agr_hf.register()
    folder = tmp_path_factory.mktemp("run")
    checkpoints(folder, 5, 10)
    return folder


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin",
         "config.json", "optimizer.safetensors", "optimizer.json"]  # fmt: skip
OPTIONAL = {"training_args.bin", "config.json", "optimizer.safetensors", "optimizer.json"}


def damaged(run, tmp_path, name, damage):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path = folder / "checkpoint-10" / name
    content = path.read_bytes() if path.is_file() else b""
    if damage == "missing":
        path.unlink() if path.is_file() else shutil.rmtree(path)
    else:
        path.write_bytes(content[: {"empty": 0, "half": len(content) // 2, "one byte less": len(content) - 1}[damage]])
    return folder


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "one byte less"])
def test_a_damaged_checkpoint_is_named_and_passed_over(run, tmp_path, caplog, name, damage):
    folder = damaged(run, tmp_path, name, damage)
    found = latest_checkpoint(folder)
    harmless = (damage == "missing" and name in OPTIONAL) or (name.endswith(".json") and damage == "one byte less" and
                (run / "checkpoint-10" / name).read_bytes().endswith(b"\n"))  # fmt: skip
    if harmless:
        assert found == folder / "checkpoint-10"
        return
    assert found == folder / "checkpoint-5"
    assert f"checkpoint-10 is passed over: {name}" in caplog.text
    with pytest.raises(ValueError, match=f"cannot resume from .*checkpoint-10: {name}"):
        resolve_checkpoint(str(folder / "checkpoint-10"), folder)
    assert (folder / "checkpoint-10").exists()  # a user's file is never removed


def test_flipped_bits_in_torchs_files_are_found(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path = folder / "checkpoint-10" / "optimizer.pt"
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 200] ^= 1
    path.write_bytes(bytes(content))
    assert checkpoint_fault(folder / "checkpoint-10").startswith("optimizer.pt is damaged")


def test_latest_counts_numbers_and_ignores_other_folders(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "checkpoint-best").mkdir()
    (folder / "checkpoint-999").write_text("a file")
    assert latest_checkpoint(folder) == folder / "checkpoint-10"
    assert latest_checkpoint(tmp_path / "nowhere") is None
    assert resolve_checkpoint(None, folder) is None
    assert resolve_checkpoint("latest", tmp_path / "nowhere") is None
    with pytest.raises(ValueError, match="no such folder"):
        resolve_checkpoint(str(folder / "checkpoint-11"), folder)


def test_a_checkpoint_of_sharded_weights_needs_every_shard(run, tmp_path):
    folder = tmp_path / "checkpoint-10"
    shutil.copytree(run / "checkpoint-10", folder)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(run / "checkpoint-10/model.safetensors", folder / "model-00001-of-00002.safetensors")
    assert checkpoint_fault(folder) == "model-00002-of-00002.safetensors is missing"
    shutil.copy(run / "checkpoint-10/model.safetensors", folder / "model-00002-of-00002.safetensors")
    assert checkpoint_fault(folder) is None


def test_random_states_of_every_process_are_asked_for(run, tmp_path, caplog):
    """A process that died before it wrote its own leaves the others' files, and `trainer_state.json` of the first."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    for step, ranks in ((5, (0, 1, 2, 3)), (10, (0, 1, 2))):
        state = folder / f"checkpoint-{step}/rng_state.pth"
        for rank in ranks:
            shutil.copy(state, state.with_name(f"rng_state_{rank}.pth"))
        state.unlink()
    assert latest_checkpoint(folder, processes=4) == folder / "checkpoint-5"
    assert "checkpoint-10 is passed over: rng_state_3.pth is missing" in caplog.text
    assert latest_checkpoint(folder, processes=3) == latest_checkpoint(folder) == folder / "checkpoint-10"
    assert resolve_checkpoint("latest", folder, processes=4) == str(folder / "checkpoint-5")
    caplog.clear()
    # More processes than any checkpoint was saved by: their weights and moments are whole.
    assert latest_checkpoint(folder, processes=8) == folder / "checkpoint-10"
    caplog.clear()
    for processes in (3, 2, 4):
        assert resolve_checkpoint(str(folder / "checkpoint-10"), folder, processes) == str(folder / "checkpoint-10")
        said = f"checkpoint-10 has the random states of 3 processes, and this run has {processes}"
        assert (said in caplog.text) == (processes != 3)
    (folder / "checkpoint-10/rng_state_1.pth").unlink()
    assert checkpoint_fault(folder / "checkpoint-10") == "rng_state_1.pth is missing"


def test_a_checkpoint_is_complete_when_every_process_has_written_its_random_states(tmp_path, monkeypatch):
    """Two processes, of which the other is dead when this one waits for it; `test_kill.py` kills a real one."""
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda _: 2))
    trainer = trainer_of(small_model(), arguments(tmp_path, optim="agr_adamw", save_strategy="steps", save_steps=3))

    def wait():
        if (tmp_path / "checkpoint-3/rng_state_0.pth").exists():
            raise ConnectionError("closed by peer")

    monkeypatch.setattr(trainer.accelerator, "wait_for_everyone", wait)
    with pytest.raises(ConnectionError):
        train(trainer)
    assert checkpoint_fault(tmp_path / "checkpoint-3") == "trainer_state.json is missing"


@pytest.mark.parametrize("resume", ["latest", "checkpoint-4"])
def test_weights_without_the_rest_are_refused_and_kept(resume, tmp_path):
    """Trainer would go on with a fresh schedule; starting over would end with their deletion."""
    options = {"optim": "agr_adamw", "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    args = arguments(tmp_path, max_steps=4, save_only_model=True, **options)
    trainer_of(small_model(), args).train()
    before = sorted(path.name for path in tmp_path.rglob("*"))
    trainer = trainer_of(small_model(), arguments(tmp_path, max_steps=8, save_only_model=True, **options))
    with pytest.raises(ValueError, match=r"checkpoint-4: it holds weights only \(save_only_model=True\)"):
        train(trainer, resume if resume == "latest" else str(tmp_path / resume))
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    shutil.rmtree(tmp_path / "checkpoint-4/")
    args = arguments(tmp_path, max_steps=4, **options)
    trainer_of(small_model(), args).train()
    assert resolve_checkpoint("latest", tmp_path) == str(tmp_path / "checkpoint-4")  # the older one is no obstacle


@pytest.fixture(scope="module")
def sharded_run(run, tmp_path_factory):
    """The same two checkpoints in the files of FSDP2's sharded kind."""
    folder = tmp_path_factory.mktemp("sharded") / "run"
    shutil.copytree(run, folder)
    for checkpoint in folder.iterdir():
        for whole, key, part in (
            ("model.safetensors", "model", "pytorch_model_fsdp_0"),
            ("optimizer.pt", "optimizer", "optimizer_0"),
        ):
            path = checkpoint / whole
            state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
            writer = FileSystemWriter(checkpoint / part, thread_count=2)
            torch.distributed.checkpoint.save({key: state}, storage_writer=writer)
            path.unlink()
    return folder


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *itertools.product(["pytorch_model_fsdp_0", "optimizer_0"], ["missing"]),
        *itertools.product(
            ["pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_1.distcp", "optimizer_0/.metadata"],
            ["missing", "empty", "half", "one byte less"],
        ),
    ],
)
def test_a_damaged_sharded_checkpoint_is_named_and_passed_over(sharded_run, tmp_path, caplog, name, damage):
    assert latest_checkpoint(sharded_run) == sharded_run / "checkpoint-10"
    folder = damaged(sharded_run, tmp_path, name, damage)
    assert latest_checkpoint(folder) == folder / "checkpoint-5"
    assert f"checkpoint-10 is passed over: {name}" in caplog.text


def test_whole_files_of_fsdp_are_a_checkpoint_too(run, tmp_path):
    folder = tmp_path / "checkpoint-10"
    shutil.copytree(run / "checkpoint-10", folder)
    (folder / "optimizer.pt").rename(folder / "optimizer.bin")
    assert checkpoint_fault(folder) == "pytorch_model_fsdp_0 is missing"
    shutil.copy(folder / "optimizer.bin", folder / "pytorch_model_fsdp.bin")
    assert checkpoint_fault(folder) is None
    (folder / "optimizer.bin").unlink()
    assert checkpoint_fault(folder) == "optimizer_0 is missing"


def test_metadata_of_a_sharded_checkpoint_runs_no_code(sharded_run, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "boom",))

    folder = tmp_path / "checkpoint-10"
    shutil.copytree(sharded_run / "checkpoint-10", folder)
    (folder / "optimizer_0/.metadata").write_bytes(pickle.dumps(Bomb()))
    assert checkpoint_fault(folder).startswith("optimizer_0/.metadata is cut short or damaged")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("text", ["null", "[]", "{}", '"text"', '{"global_step": "10"}', '{"global_step": null}'])
def test_json_that_is_no_trainer_state_is_passed_over(run, tmp_path, text):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "checkpoint-10/trainer_state.json").write_text(text)
    assert latest_checkpoint(folder) == folder / "checkpoint-5"
    with pytest.raises(ValueError, match="checkpoint-10: trainer_state.json holds no global_step"):
        resolve_checkpoint(str(folder / "checkpoint-10"), folder)


@pytest.mark.parametrize("key", ["step", "state", "param_groups", None])
def test_an_optimizer_table_that_lacks_something_is_passed_over(run, tmp_path, key):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path = folder / "checkpoint-10/optimizer.json"
    table = json.loads(path.read_text())
    path.write_text("null" if key is None else json.dumps({k: v for k, v in table.items() if k != key}))
    assert latest_checkpoint(folder) == folder / "checkpoint-5"
    optimizer = trainer_of(small_model(), arguments(run, optim="agr_adamw")).create_optimizer()
    with pytest.raises(ValueError, match="optimizer.json is no table of save_optimizer"):
        load_optimizer(optimizer, folder / "checkpoint-10")


@pytest.mark.parametrize("text", ["null", "[]", '{"weight_map": {"a": 1}}'])
def test_json_that_is_no_index_of_weights_is_a_fault(run, tmp_path, text):
    folder = tmp_path / "checkpoint-10"
    shutil.copytree(run / "checkpoint-10", folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    assert checkpoint_fault(folder) == "model.safetensors.index.json is no index of weights"


def test_a_state_of_another_step_is_found(run, tmp_path):
    folder = tmp_path / "checkpoint-11"
    shutil.copytree(run / "checkpoint-10", folder)
    assert checkpoint_fault(folder) == "trainer_state.json is of step 10"


@pytest.mark.parametrize("name", list_optimizers())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_optimizer_state_goes_through_safetensors_and_json(name, dtype, tmp_path):
    def made():
        model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(12, 2)).to(dtype)
        options = {"agr_steps": 4} if name.startswith("agr") else {}
        return model, create_optimizer(name, model, lr=torch.tensor(0.01) if name in OURS else 0.01, **options)

    def steps(model, optimizer, n):
        torch.manual_seed(n)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 2, 4, 4).to(dtype)).square().sum().backward()
            optimizer.step()

    model, optimizer = made()
    steps(model, optimizer, 1)
    save_optimizer(optimizer, tmp_path)
    other, loaded = made()
    other.load_state_dict(model.state_dict())
    load_optimizer(loaded, tmp_path)
    steps(model, optimizer, 2)
    steps(other, loaded, 2)
    assert same_bits(model, other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["optimizer.json", "optimizer.safetensors"]
    json.loads((tmp_path / "optimizer.json").read_text())


def test_trainers_own_file_and_ours_hold_the_same(run):
    model = small_model()
    ours, theirs = (trainer_of(model, arguments(run, optim="agr_adamw")).create_optimizer() for _ in range(2))
    load_optimizer(ours, run / "checkpoint-10")
    theirs.load_state_dict(torch.load(run / "checkpoint-10/optimizer.pt", weights_only=True))
    for param in theirs.state:
        assert all(torch.equal(value, ours.state[param][key]) for key, value in theirs.state[param].items())
    for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in other.items() if k != "params"}


def test_broken_or_mixed_optimizer_files_are_refused(run, tmp_path):
    model = small_model()
    optimizer = trainer_of(model, arguments(run, optim="agr_adamw")).create_optimizer()
    with pytest.raises(FileNotFoundError, match=r"optimizer.safetensors is missing"):
        load_optimizer(optimizer, tmp_path)
    for name in ("optimizer.safetensors", "optimizer.json"):
        shutil.copy(run / "checkpoint-10" / name, tmp_path)
    shutil.copy(run / "checkpoint-5/optimizer.json", tmp_path)
    with pytest.raises(ValueError, match="of different saves"):
        load_optimizer(optimizer, tmp_path)
    path = tmp_path / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"optimizer.safetensors is cut short"):
        load_optimizer(optimizer, tmp_path)
    assert not optimizer.state


def test_a_finished_run_takes_no_step_more(tmp_path):
    """Trainer looks for the end behind a step only."""
    args = arguments(tmp_path, optim="agr_adamw", max_steps=3, save_strategy="steps", save_steps=3)
    model = small_model()
    train(trainer_of(model, args))
    again = small_model()
    trainer = trainer_of(again, args)
    output = train(trainer, resume_from_checkpoint=True)  # as Trainer.train takes it
    assert output.global_step == trainer.state.global_step == 3
    assert args.max_steps == 3
    assert same_bits(model, again)
    fresh = trainer_of(small_model(), arguments(tmp_path, optim="agr_adamw", max_steps=1))
    assert train(fresh, resume_from_checkpoint=False).global_step == 1


@pytest.mark.parametrize("schedule", ["polynomial", "cosine", "linear"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_finished_run_is_left_alone_whatever_its_schedule_and_data(stream, schedule, tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(small_data())

    data = Stream() if stream else small_data()
    options = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": schedule}
    args = arguments(tmp_path, optim="agr_adamw", max_steps=3, **options)
    model = small_model()
    train(trainer_of(model, args, train_dataset=data))
    again = small_model()
    trainer = trainer_of(again, args, train_dataset=data)
    assert train(trainer, "latest").global_step == 3
    assert same_bits(model, again)
    assert trainer.state.max_steps == 3
    args = arguments(tmp_path, optim="agr_adamw", max_steps=5, **options)
    assert train(trainer_of(small_model(), args, train_dataset=data), "latest").global_step == 5


def test_a_state_of_other_groups_is_refused_with_a_way_out():
    model = small_model()
    stock = torch.optim.AdamW(model.parameters())
    grouped = AGRAdamW(agr_param_groups(model))
    with pytest.raises(
        ValueError, match=r"rebuild the optimizer with the saved groups, load, and then say where AGR applies"
    ):
        grouped.load_state_dict(stock.state_dict())
    same = AGRAdamW(model.parameters())
    same.load_state_dict(stock.state_dict())
    set_agr_flags(same.param_groups, model)
    named = dict(model.named_parameters())
    ((group,),) = (same.param_groups,)
    with_agr = {id(param) for param, flag in zip(group["params"], group["agr"], strict=True) if flag}
    assert with_agr == {id(param) for param in grouped.param_groups[0]["params"]}
    assert 0 < len(with_agr) < len(named)


def test_state_that_needs_pickle_is_refused_by_name(tmp_path):
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = AGRAdamW([{"params": [param], "note": object()}])
    with pytest.raises(TypeError, match=r"group.0.note is a object"):
        save_optimizer(optimizer, tmp_path)
    assert not list(tmp_path.iterdir())


def test_saving_logs_nothing_at_warning_level(run, caplog):
    with caplog.at_level(logging.WARNING, logger="agr_hf"):
        assert latest_checkpoint(run) == run / "checkpoint-10"
    assert not caplog.records
