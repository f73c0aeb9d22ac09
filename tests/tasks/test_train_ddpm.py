"""The script: it learns, what it saves loads, a resumed run has the bits of a whole one, every optimizer runs."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DiffusionPipeline
from safetensors.torch import load

from agr_hf import list_optimizers
from agr_hf.tasks import frechet
from agr_hf.tasks.diffusion import UNETS, sample_images
from agr_hf.tasks.unlabelled_images import load_unlabelled_images

SCRIPT = Path(__file__).parents[2] / "training_scripts/train_ddpm.py"
SHORT = ["--num_grid_samples", 1, "--ddpm_num_inference_steps", 1, "--num_eval_samples", 0, "--lr_warmup_steps", 2]


def train(folder, *options):
    """Run the script in this process, on the CPU; what it leaves in results.json."""
    # The singletons of accelerate outlive a run; a script has a process of its own.
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    main = runpy.run_path(str(SCRIPT))["main"]
    main(["--output_dir", str(folder), "--recipe", "digits", "--cpu", *map(str, options)])
    return json.loads((Path(folder) / "results.json").read_text())


def weights(folder):
    # Read and not mapped: the next run may write over the same file.
    return load((folder / "unet/diffusion_pytorch_model.safetensors").read_bytes())


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """112 steps on digits."""
    folder = tmp_path_factory.mktemp("ddpm")
    options = ["--num_epochs", 4, "--save_images_epochs", 2, "--num_grid_samples", 9, "--report_to", "tensorboard"]
    results = train(folder, *options, "--ddpm_num_inference_steps", 20, "--num_eval_samples", 200)
    return folder, results


def test_it_learns_digits(trained):
    """Predicting zero noise has loss 1. The margin on the distance: samples within a third of that of noise."""
    _, results = trained
    losses = [epoch["loss"] for epoch in results["epochs"]]
    assert [epoch["epoch"] for epoch in results["epochs"]] == [1, 2, 3, 4]
    assert losses[-1] < 0.3
    assert losses[-1] < losses[0]
    digits, pixels = load_unlabelled_images("digits"), frechet.feature_network("pixels")
    noise = torch.randint(0, 256, (200, 1, 8, 8), dtype=torch.uint8)
    of_noise = frechet.frechet_metrics(noise, digits, pixels)["frechet_distance_pixels"]
    assert results["metrics"]["frechet_distance_pixels"] < of_noise / 3
    assert results["metrics"]["samples"] == 200
    assert results["metrics"]["references"] == 1797
    assert "fid" not in results["metrics"]


def test_the_saved_pipeline_draws_the_same_images_again(trained):
    folder, results = trained
    assert type(DiffusionPipeline.from_pretrained(folder)).__name__ == "DDPMPipeline"
    pipeline = DDIMPipeline.from_pretrained(folder)
    again = sample_images(pipeline.unet, 200, steps=20, seed=results["seed"] + 1, scheduler=pipeline.scheduler)
    found = frechet.frechet_metrics(again, load_unlabelled_images("digits"), frechet.feature_network("pixels"))
    assert found["frechet_distance_pixels"] == results["metrics"]["frechet_distance_pixels"]
    pipeline.set_progress_bar_config(disable=True)
    one, other = (
        pipeline(batch_size=4, num_inference_steps=5, generator=torch.manual_seed(3), output_type="np").images
        for _ in range(2)
    )
    assert (one == other).all()


def test_grids_go_to_files_and_to_the_tracker(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = trained
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["epoch-0002.png", "epoch-0004.png"]
    (events,) = {path.parent for path in folder.rglob("events.out.tfevents.*") if path.parent.name == "train_ddpm"}
    accumulator = EventAccumulator(str(events), size_guidance={"images": 0}).Reload()
    assert {event.step for event in accumulator.Images("samples")} == {56, 112}
    assert len(accumulator.Scalars("loss")) == 4


def test_a_resumed_run_has_the_bits_of_one_never_stopped(tmp_path, monkeypatch):
    """From the middle of an epoch and of other numbers of samples; flips, dropout, accumulation, EMA, suspension."""
    monkeypatch.setitem(UNETS, "tiny", {**UNETS["tiny"], "dropout": 0.2})
    options = [*SHORT, "--max_train_images", 192, "--num_epochs", 3, "--train_batch_size", 16, "--random_flip"]
    options += ["--gradient_accumulation_steps", 2, "--checkpointing_steps", 8, "--agr_steps", 10]
    whole = train(tmp_path, *options, "--save_images_epochs", 1)
    assert whole["epochs"][-1]["step"] == 18
    expected = weights(tmp_path)
    resumed = train(tmp_path, *options, "--resume_from_checkpoint", tmp_path / "checkpoint-16")
    assert_same_bits(expected, weights(tmp_path))
    assert [epoch["loss"] for epoch in resumed["epochs"]] == [epoch["loss"] for epoch in whole["epochs"]]
    # The test sees a difference where there is one.
    train(tmp_path / "other", *options, "--seed", 1)
    assert not torch.equal(weights(tmp_path / "other")["conv_in.weight"], expected["conv_in.weight"])


def test_a_run_stopped_within_an_epoch_goes_on_from_there(tmp_path):
    options = [*SHORT, "--max_train_images", 96, "--num_epochs", 2, "--train_batch_size", 16]
    whole = train(tmp_path / "whole", *options)
    for _ in range(2):  # resumed with the same arguments it is finished, and says the same
        short = train(tmp_path / "short", *options, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")
        assert [(epoch["epoch"], epoch["step"]) for epoch in short["epochs"]] == [(1, 4)]
        assert short["metrics"]["loss"] == short["epochs"][0]["loss"] > 0
    assert (tmp_path / "short/samples/epoch-0001.png").exists()
    resumed = train(tmp_path / "short", *options, "--resume_from_checkpoint", "latest")
    assert_same_bits(weights(tmp_path / "whole"), weights(tmp_path / "short"))
    for run in (whole, resumed):
        assert [(epoch["epoch"], epoch["step"]) for epoch in run["epochs"]] == [(1, 6), (2, 12)]
    assert [epoch["loss"] for epoch in resumed["epochs"]] == [epoch["loss"] for epoch in whole["epochs"]]


@pytest.mark.parametrize("name", list_optimizers())
def test_every_optimizer_takes_steps(name, tmp_path):
    options = [*SHORT, "--optim", name, "--max_train_images", 64, "--train_batch_size", 16, "--num_epochs", 1]
    results = train(tmp_path, *options, "--weight_decay", 0.01, "--no_use_ema", "--lr_warmup_steps", 1)
    assert results["optimizer"] == name
    assert results["epochs"][0]["step"] == 4
    assert results["metrics"]["loss"] < 3
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())


def parse(*options):
    return runpy.run_path(str(SCRIPT))["parse_args"](["--output_dir", "x", *options])[0]


def test_the_papers_recipe_has_its_values_and_flags_win():
    args = parse("--recipe", "agr-ddpm")
    values = (args.optim, args.unet, args.dataset_name, args.train_batch_size, args.num_epochs, args.learning_rate)
    assert values == ("agr_adan", "ddpm-cifar10", "cifar10", 128, 2000, 2e-4)
    values = (args.lr_warmup_steps, args.ema_decay, args.max_grad_norm, args.ddpm_num_inference_steps)
    assert values == (200, 0.9999, 1.0, 100)
    assert (args.num_eval_samples, args.fid, args.use_ema) == (50_000, True, True)
    assert UNETS[args.unet]["dropout"] == 0.1
    args = parse("--learning_rate", "1e-3", "--fid", "false", "--recipe", "agr-ddpm")
    assert (args.learning_rate, args.fid, args.train_batch_size) == (1e-3, False, 128)


def test_warmup_ends_where_it_was_told_to(tmp_path):
    """The rate in the checkpoint after 4 of 4 steps, 2 of them of warmup."""
    options = [*SHORT, "--max_train_images", 64, "--train_batch_size", 16, "--num_epochs", 1, "--learning_rate", 0.5]
    train(tmp_path, *options, "--optim", "sgd", "--max_grad_norm", 1e-6)
    state = torch.load(tmp_path / "checkpoint-4/scheduler.bin", weights_only=True)
    assert state["_last_lr"][0] == 0.5


def test_bad_flags_get_sentences(tmp_path, capsys):
    with pytest.raises(ValueError, match="10 images do not fill one batch of 64"):
        train(tmp_path, "--max_train_images", 10)
    with pytest.raises(ValueError, match="there is no feature network 'vgg'"):
        train(tmp_path, "--features", "vgg")
    for flags, message in (
        (["--num_epochs", "0"], "--num_epochs 0 is not allowed; it must be at least 1"),
        (["--agr_steps", "4", "--optim", "adal"], "--agr_steps is for the optimizers with AGR, and --optim is adal"),
        (["--lr_scheduler", "foo"], "choose from"),
        (["--optim", "lion"], "--optim lion is not allowed; it must be one of agr_adamw, "),
        (["--num_grid_samples", "0"], "--num_grid_samples 0 is not allowed; it must be at least 1"),
        (["--eval_batch_size", "0"], "--eval_batch_size 0 is not allowed; it must be at least 1"),
        (
            ["--ddpm_num_inference_steps", "5000"],
            "--ddpm_num_inference_steps 5000 is not allowed; it must be 1 to 1000",
        ),
        (["--num_eval_samples", "-3"], "--num_eval_samples -3 is not allowed"),
        (["--recip", "agr-ddpm"], "unrecognized arguments: --recip"),
        (["--recipe", "agr"], "there is no recipe 'agr'; the names are digits, agr-ddpm"),
    ):
        with pytest.raises(SystemExit):
            parse(*flags)
        assert message in capsys.readouterr().err
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run already; go on with it"):
        train(tmp_path)
