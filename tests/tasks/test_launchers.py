"""The scripts under torchrun and under accelerate launch: two processes on the CPU, and what they leave."""

import json
from pathlib import Path

import numpy
import pytest
from diffusers import DDPMPipeline
from launching import run_module
from PIL import Image

from agr_hf.tasks.diffusion import sample_images, write_grid
from agr_hf.tasks.record import read_record

SCRIPTS = Path(__file__).parents[2] / "training_scripts"
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    # On the CPU it starts one process, whatever --num_processes says, where there is no MPI.
    "accelerate": ["accelerate.commands.launch", "--cpu", "--num_machines", "1", "--num_processes", "1"],
}
RUNS = {
    "train_image_classifier.py": [
        "--model_name", "mlp", "--max_train_samples", "640", "--max_eval_samples", "99", "--num_train_epochs", "1",
        "--use_cpu", "true", "--optim", "adal", "--per_device_train_batch_size", "8", "--learning_rate", "3e-3",
    ],
    "train_albert.py": [
        "--hidden_size", "32", "--num_hidden_layers", "1", "--num_attention_heads", "2", "--intermediate_size", "64",
        "--embedding_size", "16", "--vocab_size", "500", "--max_seq_length", "64", "--max_train_samples", "128",
        "--max_eval_samples", "63", "--num_train_epochs", "1", "--use_cpu", "true", "--optim", "agr_adamw",
    ],
    "train_ddpm.py": [
        "--recipe", "digits", "--cpu", "--num_epochs", "1", "--max_train_images", "128", "--train_batch_size", "32",
        "--num_eval_samples", "20", "--num_grid_samples", "5", "--ddpm_num_inference_steps", "2",
        "--eval_batch_size", "2",
    ],
}  # fmt: skip


@pytest.mark.parametrize("launcher", list(LAUNCHERS))
@pytest.mark.parametrize("script", list(RUNS))
def test_a_script_runs_under_a_launcher(script, launcher, tmp_path):
    folder = tmp_path / "run"
    module, *options = LAUNCHERS[launcher]
    run_module(module, [*options, SCRIPTS / script, *RUNS[script], "--output_dir", folder], tmp_path / "log")
    results = json.loads((folder / "results.json").read_text())
    processes = 2 if launcher == "torchrun" else 1
    assert results["processes"] == processes
    prefix = "torchrun --nproc_per_node 2" if processes == 2 else "python"
    assert read_record(folder).command.startswith(f"{prefix} training_scripts/{script} ")
    assert results["metrics"]["loss"] > 0
    assert (folder / ("unet" if "ddpm" in script else "model.safetensors")).exists()
    if script == "train_ddpm.py":  # the processes share the samples, and draw those of one
        unet = DDPMPipeline.from_pretrained(folder).unet
        write_grid(sample_images(unet, 5, steps=2, seed=0, batch_size=2), folder / "alone.png")
        drawn, alone = (numpy.asarray(Image.open(folder / n), int) for n in ("samples/epoch-0001.png", "alone.png"))
        assert drawn.shape == alone.shape
        assert numpy.abs(drawn - alone).max() <= 1  # of 255: there it computes with other threads
        assert drawn.std() > 10
    if script == "train_image_classifier.py":  # 640 images, 8 at a time on each process
        assert results["epochs"][-1]["step"] == 80 // processes
        assert results["metrics"]["accuracy"] > 0.5  # chance is 0.1
