"""Run folders as the training scripts leave them: made up in an instant, or trained in a few seconds."""

import json
import runpy
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from agr_hf.environment import environment

SCRIPTS = Path(__file__).parents[2] / "training_scripts"
SMALL = {
    "image-classification": [
        "train_image_classifier.py", "--model_name", "mlp", "--num_train_epochs", "2", "--save_strategy", "epoch",
        "--use_cpu", "true", "--learning_rate", "1e-3", "--per_device_train_batch_size", "32", "--optim", "agr_adamw",
        "--gradient_statistics_every", "10", "--max_train_samples", "320", "--max_eval_samples", "100", "--seed", "7",
    ],
    "albert": [
        "train_albert.py", "--hidden_size", "32", "--num_hidden_layers", "1", "--num_attention_heads", "2",
        "--intermediate_size", "64", "--embedding_size", "16", "--vocab_size", "500", "--max_seq_length", "64",
        "--max_train_samples", "128", "--max_eval_samples", "64", "--num_train_epochs", "2", "--save_strategy", "epoch",
        "--use_cpu", "true", "--optim", "adal", "--gradient_statistics_every", "4",
    ],
    "ddpm": [
        "train_ddpm.py", "--recipe", "digits", "--cpu", "--num_epochs", "2", "--max_train_images", "128",
        "--num_eval_samples", "0", "--num_grid_samples", "4", "--ddpm_num_inference_steps", "2",
        "--gradient_statistics_every", "2",
    ],
}  # fmt: skip


def made_up(folder, value=1.0, **changes):
    """A run of a classifier that was never trained, in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "task": "image-classification",
        "optimizer": "agr_adamw",
        "seed": 0,
        "script": "train_image_classifier.py",
        "arguments": {"model_name": "mlp", "lr_milestones": [1, 2], "use_cpu": True},
        "processes": 1,
        "finished": "2026-11-22T00:00:00+00:00",
        "seconds": 12.5,
        "metrics": {"accuracy": value / 10, "loss": 1 / value},
        "dataset": {
            "name": "cifar10",
            "hub_id": "uoft-cs/cifar10",
            "revision": "0b27149",
            "config": None,
            "examples": 100,
            "split": "test",
            "evaluated": 50,
            "complete": True,
        },
        "optimizer_groups": [{"lr": 1e-3, "betas": [0.9, 0.999], "tensors": 2, "parameters": 12}],
        "gradients": {
            "measurements": 2,
            "overall": {"effect": 0.01},
            "layers": {"fc.weight": {"effect": 0.01, "largest_share": 0.1, "log_mean": -3.0, "log_std": 1.0}},
        },
        "epochs": [{"epoch": 1, "loss": 2 / value, "accuracy": 0.1}, {"epoch": 2, "loss": 1 / value, "accuracy": 0.2}],
        "config": {"model_name": "mlp", "learning_rate": 1e-3},
        **environment(),
        **changes,
    }
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.json").write_text(json.dumps({"value": value}))
    save_file({"weight": torch.full((4, 3), value)}, folder / "model.safetensors")
    (folder / "samples").mkdir(exist_ok=True)
    Image.new("L", (4, 4), int(value)).save(folder / "samples" / f"epoch-{int(value):04d}.png")
    # None of these is published.
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "checkpoint-5").mkdir(exist_ok=True)
    (folder / "checkpoint-5/optimizer.pt").write_bytes(b"pickle")
    (folder / "runs").mkdir(exist_ok=True)
    (folder / "runs/events.out.tfevents.1.hostname").write_bytes(b"events")
    return folder


def train(task, folder, *options):
    """Run a script of the package in this process, for a few seconds; its folder."""
    script, *arguments = SMALL[task]
    run_here(script, [*arguments, "--output_dir", str(folder), *map(str, options)])
    return Path(folder)


def run_here(script, arguments, processes=1):
    """What `rerun.run_script` does in processes of its own: importing everything anew takes longest."""
    # The singletons of accelerate outlive a run; a script has a process of its own.
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    runpy.run_path(str(SCRIPTS / script))["main"](list(arguments))


def contents(folder):
    """Every file of a folder by its relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
