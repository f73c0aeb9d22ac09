"""Processes that train alone beside others are refused, and sharding that does not take place is said."""

import logging
import os
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from small import arguments, small_model, trainer_of

import agr_hf
from agr_hf.integrations import launch
from agr_hf.integrations.launch import check_launch
from agr_hf.integrations.trainer import trainer_optimizer

# What accelerate 1.15 sets for the process that it starts with `--cpu --num_machines 2 --num_processes 2`.
TWO_MACHINES = {
    "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500",
}  # fmt: skip
KNOWN = ["LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", *TWO_MACHINES]


@pytest.fixture(autouse=True)
def launcher(monkeypatch):
    """Nothing of a launcher in the environment; what is set there is gone afterwards."""
    for name in KNOWN:
        monkeypatch.delenv(name, raising=False)
    launch._warn_once.cache_clear()

    def set_environment(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_environment


def state(kind, processes=1):
    return SimpleNamespace(distributed_type=kind, num_processes=processes)


def test_a_process_alone_passes(launcher, caplog):
    check_launch(state(DistributedType.NO))
    launcher(MASTER_ADDR="10.77.0.1", MASTER_PORT="29500")  # of a cluster that sets them for every job
    check_launch(state(DistributedType.NO))
    assert not caplog.records


def test_two_machines_that_accelerate_joins_to_nothing_are_refused(launcher):
    launcher(**TWO_MACHINES)
    with pytest.raises(ValueError, match=r"several machines \(the first is 10.77.0.1\).*each would train alone"):
        check_launch(state(DistributedType.NO))


def test_processes_of_torchrun_that_are_not_joined_are_refused(launcher):
    launcher(WORLD_SIZE="2", LOCAL_RANK="1")
    with pytest.raises(
        ValueError, match=r"2 processes were started, and each of them would train alone.*--use_cpu true"
    ):
        check_launch(state(DistributedType.NO))


def test_one_process_where_two_were_asked_for_on_this_machine_is_warned_of(launcher, caplog):
    launcher(**TWO_MACHINES | {"MASTER_ADDR": "127.0.0.1"})
    check_launch(state(DistributedType.NO))
    assert "asked for several processes and started one" in caplog.text


@pytest.mark.parametrize("kind", [DistributedType.MULTI_CPU, DistributedType.MULTI_GPU])
def test_joined_processes_pass(kind, launcher, caplog):
    launcher(**TWO_MACHINES, WORLD_SIZE="2", LOCAL_RANK="0")
    check_launch(state(kind, 2))
    assert not caplog.records


def test_trainer_and_its_arguments_are_checked_before_anything_trains(launcher, tmp_path):
    agr_hf.register()
    args = arguments(tmp_path, optim="agr_adamw")
    launcher(**TWO_MACHINES)
    with pytest.raises(ValueError, match="several machines"):
        trainer_optimizer("agr_adamw", args)
    with pytest.raises(ValueError, match="several machines"):
        trainer_of(small_model(), args).train()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variable", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")]
)
def test_sharding_that_a_cpu_turns_into_ddp_is_said_once(variable, name, launcher, caplog):
    launcher(**{variable: "true"})
    check_launch(state(DistributedType.MULTI_CPU, 2))
    check_launch(state(DistributedType.MULTI_CPU, 2))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{name} was asked for, but on a CPU accelerate wraps the model in DDP" in record.message


def test_sharding_that_takes_place_is_not_warned_of(launcher, caplog):
    launcher(ACCELERATE_USE_FSDP="true")
    check_launch(state(DistributedType.FSDP, 2))
    check_launch(SimpleNamespace(distributed_state=state(DistributedType.MULTI_GPU, 2), fsdp=True))
    launcher(ACCELERATE_USE_DEEPSPEED="true")
    check_launch(state(DistributedType.DEEPSPEED, 2))
    assert not caplog.records


def test_accelerate_says_nothing_itself(launcher, caplog):
    """An FSDP plugin on a CPU: where accelerate shards there, or says why it does not, the warning can go."""
    AcceleratorState._reset_state(reset_partial_state=True)
    launcher(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    with caplog.at_level(logging.INFO):
        accelerator = Accelerator(cpu=True)
    assert accelerator.distributed_type == DistributedType.NO
    assert not caplog.records
    check_launch(accelerator)
    assert "FSDP was asked for" in caplog.text
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_FSDP")
