"""Each file of training_scripts/accelerate_configs: accelerate reads it, starts it, and trains to the same end."""

import json
import pickle
import sys
from importlib.util import find_spec

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from launchers import (
    CLASSIFIER,
    CONFIGURATIONS,
    ON_GLOO,
    ROOT,
    SMALL,
    TORCHRUN,
    accelerate_launch,
    distance,
    finish,
    run,
    small_batch,
    weights,
)
from torch.distributed.checkpoint import FileSystemReader

pytestmark = pytest.mark.timeout(900)  # several starts, on a busy machine
NAMES = sorted(path.stem for path in CONFIGURATIONS.glob("*.yaml"))
# Of a ViT of timm's: transformers names no blocks of it.
BLOCKS = ["--fsdp_transformer_layer_cls_to_wrap", "Block"]


def test_there_is_a_file_for_each_way_to_train():
    assert NAMES == ["cpu", "ddp", "ddp_hosts", "fsdp2", "fsdp2_offload", "hsdp", "one_gpu", "zero2", "zero3"]


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_it(name):
    """It raises where a key is unknown to it."""
    config = load_config_from_file(str(CONFIGURATIONS / f"{name}.yaml"))
    kinds = {"one": DistributedType.NO, "zero": DistributedType.DEEPSPEED, "ddp": DistributedType.MULTI_GPU,
             "cpu": DistributedType.MULTI_GPU, "fsdp": DistributedType.FSDP, "hsdp": DistributedType.FSDP}  # fmt: skip
    assert config.distributed_type == next(kind for start, kind in kinds.items() if name.startswith(start))
    assert config.num_machines == (2 if "hosts" in name else 1)
    if config.distributed_type == DistributedType.FSDP:
        assert config.fsdp_config["fsdp_version"] == 2
    if name == "hsdp":
        sizes = [config.parallelism_config[f"parallelism_config_dp_{kind}_size"] for kind in ("replicate", "shard")]
        assert sizes[0] * sizes[1] == config.num_processes
    if name.startswith("zero"):
        settings = json.loads((ROOT / config.deepspeed_config["deepspeed_config_file"]).read_text())
        assert settings["zero_optimization"]["stage"] == int(name[-1])
        # DeepSpeed refuses optimizers that it does not know, and with offload takes none but its own.
        assert settings["zero_allow_untested_optimizer"] is True
        assert settings["zero_force_ds_cpu_optimizer"] is False


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    """Two processes, two epochs: what the others are compared with, and the same without AGR."""
    folders = [tmp_path_factory.mktemp(name) / "run" for name in ("agr", "control")]
    for folder, options in zip(folders, ([], ["--optim_args", "agr=false"]), strict=True):
        command = [*accelerate_launch("cpu"), *CLASSIFIER, *SMALL, *small_batch(2), "--use_cpu", "true", *options]
        run([*command, "--num_train_epochs", "2", "--output_dir", folder])
    return folders


def check_same_end(folder, ddp, processes, epochs=1, tolerance=0.01):
    """Closer to the run of two processes than `tolerance` of what AGR does to it.

    FSDP2 without the all-reduce of the norms is 288 times as far away as that.
    """
    results = json.loads((folder / "results.json").read_text())
    assert results["processes"] == processes
    assert results["epochs"][-1]["step"] == 8 * epochs
    with_agr, without = (weights(path if epochs == 2 else path / "checkpoint-8") for path in ddp)
    assert distance(weights(folder), with_agr) < tolerance * distance(with_agr, without)


def forget_option(shards, option):
    """Make shards of `torch.distributed.checkpoint` those of a version that did not have an option of the groups yet."""
    table = FileSystemReader(shards).read_metadata()
    lacking = [name for name in table.state_dict_metadata if name.endswith(f".{option}")]
    assert lacking
    for name in lacking:
        del table.state_dict_metadata[name]
    (shards / ".metadata").write_bytes(pickle.dumps(table))


@pytest.mark.launch
@pytest.mark.parametrize(("name", "processes"), [("one_gpu", 1), ("ddp", 2)])
def test_whole_models_train_to_the_same_end(name, processes, ddp, tmp_path):
    command = [*accelerate_launch(name), *CLASSIFIER, *SMALL, *small_batch(processes), "--num_train_epochs", "1"]
    run([*command, "--use_cpu", "true", "--output_dir", tmp_path / "run"])
    # A mean of two means rounds otherwise than one.
    check_same_end(tmp_path / "run", ddp, processes, tolerance=0.2 if processes == 1 else 0.01)


@pytest.mark.launch
def test_torchrun_trains_to_the_same_end(ddp, tmp_path):
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *CLASSIFIER, *SMALL, *small_batch(2)]
    run([*command, "--num_train_epochs", "1", "--use_cpu", "true", "--output_dir", tmp_path / "run"])
    check_same_end(tmp_path / "run", ddp, 2)


@pytest.mark.launch
@pytest.mark.parametrize(("name", "processes"), [("fsdp2_offload", 2), ("hsdp", 4), ("fsdp2", 2)])
def test_sharded_models_train_to_the_same_end_and_go_on_with_half_the_processes(name, processes, ddp, tmp_path):
    folder = tmp_path / "run"
    command = [*ON_GLOO, *CLASSIFIER, *SMALL, "--output_dir", folder]
    run([*accelerate_launch(name, *BLOCKS), *command, *small_batch(processes), "--num_train_epochs", "1"])
    check_same_end(folder, ddp, processes)
    shards = {path.name for path in (folder / "checkpoint-8/optimizer_0").glob("*.distcp")}
    assert len(shards) == processes
    forget_option(folder / "checkpoint-8/optimizer_0", "agr_suspended")
    half = processes // 2
    command += [*small_batch(half), "--num_train_epochs", "2", "--resume_from_checkpoint", "latest"]
    run([*accelerate_launch("fsdp2", *BLOCKS, "--num_processes", half), *command])
    check_same_end(folder, ddp, half, epochs=2, tolerance=0.01 if half > 1 else 0.2)


@pytest.mark.launch
@pytest.mark.parametrize(
    "options",
    [["--fsdp_activation_checkpointing", "true"], ["--dynamo_backend", "aot_eager"]],
    ids=["activations", "dynamo"],
)
def test_shards_with_recomputed_activations_and_with_compiled_models_train_to_the_same_end(options, ddp, tmp_path):
    folder = tmp_path / "run"
    command = [*ON_GLOO, *CLASSIFIER, *SMALL, *small_batch(2), "--num_train_epochs", "1", "--output_dir", folder]
    printed = run([*accelerate_launch("fsdp2", *BLOCKS, *options), *command], TORCH_LOGS="dynamo")
    if "--dynamo_backend" in options:
        assert "torch/_dynamo/convert_frame.py" in printed  # it was compiled
    check_same_end(folder, ddp, 2)


@pytest.mark.launch
def test_trainer_shards_by_its_own_arguments_and_goes_on_with_half_the_processes_from_a_full_state(ddp, tmp_path):
    folder = tmp_path / "run"
    settings = {"version": 2, "transformer_layer_cls_to_wrap": ["Block"], "state_dict_type": "FULL_STATE_DICT"}
    command = [*ON_GLOO, *CLASSIFIER, *SMALL, "--fsdp", "--fsdp_config", json.dumps(settings)]
    torchrun = [*TORCHRUN, "--standalone", "--nproc-per-node"]
    run([*torchrun, 2, *command, *small_batch(2), "--num_train_epochs", "1", "--output_dir", folder])
    check_same_end(folder, ddp, 2)
    assert (folder / "checkpoint-8/pytorch_model_fsdp.bin").exists()
    command += [*small_batch(1), "--num_train_epochs", "2", "--resume_from_checkpoint", folder / "checkpoint-8"]
    run([*torchrun, 1, *command, "--output_dir", folder])
    check_same_end(folder, ddp, 1, epochs=2, tolerance=0.2)


@pytest.mark.launch
def test_two_machines_that_accelerate_does_not_join_are_refused_before_they_write(tmp_path):
    machines = ["--num_machines", "2", "--num_processes", "2", "--machine_rank", "0", "--main_process_ip", "10.77.0.1"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *machines, "--main_process_port", "29500"]
    done = finish([*launcher, *CLASSIFIER, *SMALL, "--use_cpu", "true", "--output_dir", tmp_path / "run"])
    assert done.returncode != 0
    assert "joins them to nothing" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.launch
def test_torchrun_without_a_gpu_and_without_use_cpu_is_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without GPUs: with them, the processes join")
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *CLASSIFIER, *SMALL]
    done = finish([*command, "--output_dir", tmp_path / "run"])
    assert done.returncode != 0
    assert "each of them would train alone" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.deepspeed
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed: make test-deepspeed")
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_zero_trains_to_the_same_end(name, ddp, tmp_path):
    command = [*accelerate_launch(name), *CLASSIFIER, *SMALL, *small_batch(2), "--num_train_epochs", "1"]
    # The script's own default, which measures gradients that DeepSpeed keeps to itself.
    command += ["--gradient_statistics_every", "100", "--use_cpu", "true", "--output_dir", tmp_path / "run"]
    assert "GradientStatistics sees no gradients" in run(command, DS_ACCELERATOR="cpu")
    check_same_end(tmp_path / "run", ddp, 2)
    results, expected = (json.loads((path / "results.json").read_text()) for path in (tmp_path / "run", ddp[0]))
    for key in ("agr", "tensors", "parameters"):
        assert [group[key] for group in results["optimizer_groups"]] == [
            group[key] for group in expected["optimizer_groups"]
        ]
