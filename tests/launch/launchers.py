"""The package's scripts under accelerate launch and torchrun, as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load

ROOT = Path(__file__).parents[2]
CONFIGURATIONS = ROOT / "training_scripts/accelerate_configs"
CLASSIFIER = ["training_scripts/train_image_classifier.py"]
ON_GLOO = ["tests/launch/gpu_on_gloo.py"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# Eight steps an epoch, batches of 32 on all processes together; few small steps: noise grows faster than AGR's effect.
SMALL = ["--model_name", "vit-tiny", "--max_train_samples", "256", "--max_eval_samples", "40", "--learning_rate", "0.001",
         "--lr_scheduler_type", "constant", "--gradient_statistics_every", "0", "--disable_tqdm", "true"]  # fmt: skip


def accelerate_launch(configuration, *options):
    path = (CONFIGURATIONS / f"{configuration}.yaml").relative_to(ROOT)
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", path, *options]


def environment(**values):
    """That of the tests, without what a launcher has set, and with `values`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(name, None)
    return {**kept, "OMP_NUM_THREADS": "1", **values}


def run(command, timeout=240, **values):
    """What a command prints, after its good end."""
    done = finish(command, timeout, **values)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def finish(command, timeout=240, **values):
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment(**values), timeout=timeout, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def small_batch(processes):
    return ["--per_device_train_batch_size", 32 // processes]


def weights(folder):
    return load((Path(folder) / "model.safetensors").read_bytes())


def distance(one, other):
    """Of the matrices of two models. The gradient of a bias may be zero but for noise, which Adam makes a step of lr."""
    assert one.keys() == other.keys()
    return sum(float((one[name] - other[name]).square().sum()) for name in one if one[name].ndim > 1) ** 0.5
