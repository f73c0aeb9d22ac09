"""DDPM: networks, schedule, sampling with DDIM, grids of samples.

Ho, Jain and Abbeel 2020 (arXiv 2006.11239) for the model and its training, Song, Meng and Ermon 2020 (arXiv 2010.02502) for
the sampler. The classes are diffusers' own, so what is trained here loads with `DDIMPipeline.from_pretrained`.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor, nn

from agr_hf.errors import UserError
from agr_hf.files import replaced_file
from agr_hf.integrations.random_states import mixed_seed
from agr_hf.optim.flags import unwrapped
from agr_hf.optim.statistics import agr_gradients, gradient_statistics

# What all of them share: the sinusoidal embedding and the constants of Ho et al.'s TensorFlow code, as diffusers converted
# them for google/ddpm-cifar10-32.
_DDPM = {"freq_shift": 1, "flip_sin_to_cos": False, "norm_eps": 1e-6, "downsample_padding": 0}
UNETS: dict[str, dict[str, Any]] = {
    # 35,746,307 parameters with 3 channels (the paper, appendix B: 35.7 million): attention at 16x16 only.
    "ddpm-cifar10": {
        **_DDPM,
        "dropout": 0.1,  # Ho et al., appendix B; diffusers' converted checkpoint, which is not for training, has 0
        "block_out_channels": (128, 256, 256, 256),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": None,  # one head, as theirs
    },
    # The same shape for a machine without a GPU: 1.5 million parameters, 38 times fewer multiplications.
    "small": {
        **_DDPM,
        "block_out_channels": (32, 64, 64, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": None,
        "norm_num_groups": 8,
    },
    # For 8x8 digits: 0.3 million parameters.
    "tiny": {
        **_DDPM,
        "block_out_channels": (32, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": None,
        "norm_num_groups": 8,
    },
}

# Runs by name; a flag of the command line wins over them.
RECIPES: dict[str, dict[str, Any]] = {
    # No network, no GPU: about a minute and a half on two CPU cores.
    "digits": {
        "dataset_name": "digits",
        "unet": "tiny",
        "optim": "agr_adan",
        "total_batch_size": 64,
        "num_epochs": 25,
        "learning_rate": 2e-3,
        "lr_warmup_steps": 50,
        "ema_decay": 0.99,
        "random_flip": False,  # a mirrored digit is no digit
    },
    # The AGR paper, arXiv 2407.16944, section 5.2 where it says so. What it leaves open is "the default setting of the
    # original implementation" (its appendix), which is that of Ho et al., appendix B, and of their code.
    "agr-ddpm": {
        "dataset_name": "cifar10",  # section 5
        "unet": "ddpm-cifar10",  # section 5.2: DDPM with its U-Net; Ho et al., appendix B: 35.7 million parameters
        "optim": "agr_adan",  # table 2, last row
        "total_batch_size": 128,  # section 5.2
        "num_epochs": 2000,  # section 5.2
        "learning_rate": 2e-4,  # Ho et al., appendix B
        "lr_warmup_steps": 200,  # the AGR authors' code
        "lr_scheduler": "constant_with_warmup",  # Ho et al.: constant after the warmup
        "max_grad_norm": 1.0,  # Ho et al.'s code; before AGR
        "ema_decay": 0.9999,  # Ho et al., appendix B
        "random_flip": True,  # Ho et al., appendix B: random horizontal flips for CIFAR-10
        "ddpm_num_inference_steps": 100,  # section 5.2: DDIM with 100 steps
        "num_eval_samples": 50_000,  # table 1: 50,000 images for IS and FID
        "fid": True,  # tables 1 and 2
        # Table 7 stops AGR after 1,200 of the 2,000 epochs of 390 steps: --agr_steps 468000. The rows of table 2 do not.
    },
}


def make_unet(name: str, size: int, channels: int, **overrides: Any) -> nn.Module:
    """A U-Net that predicts the noise, (n, channels, size, size) and timesteps (n,) in, the noise's shape out.

    Args:
        name: "ddpm-cifar10" (35,746,307 parameters with 3 channels), "small" (1.5 million) or "tiny" (0.3 million).
        size: height and width of the images; a multiple of 8, for "tiny" of 2.
        channels: of the images, 1 or 3.
        **overrides: arguments of `diffusers.UNet2DModel`.

    Returns:
        The network in float32, from diffusers' initialisation under the current seed.

    Raises:
        UserError: the name is unknown, or the size cannot be halved as often as the network does.
    """
    from diffusers import UNet2DModel

    if name not in UNETS:
        raise UserError(f"there is no U-Net {name!r}; the names are {', '.join(UNETS)}")
    config = {**UNETS[name], **overrides}
    multiple = 2 ** (len(config["block_out_channels"]) - 1)
    if size < multiple or size % multiple:
        raise UserError(
            f"the U-Net {name!r} halves images {multiple.bit_length() - 1} times: a size of {size} does not go; pass a "
            f"multiple of {multiple}, or another U-Net ({', '.join(UNETS)})"
        )
    unet: Any = UNet2DModel(sample_size=size, in_channels=channels, out_channels=channels, **config)
    return unet


def ddpm_scheduler() -> Any:
    """1,000 steps, betas linear from 1e-4 to 0.02, variance beta_t: Ho et al., section 4 ("fixed_large" in diffusers)."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", variance_type="fixed_large"
    )


def batch_generator(seed: int, batch: int, process: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of one batch of one process, the same whatever happened before.

    Noise, timesteps and flips drawn from it make a resumed run equal to one never stopped, however many samples were
    drawn on the way and whatever the data loader took from torch's global state.
    """
    return torch.Generator(device).manual_seed(mixed_seed(seed, batch, process))


def ddpm_loss(model: nn.Module, scheduler: Any, images: Tensor, generator: torch.Generator, flip: bool) -> Tensor:
    """L_simple of Ho et al., equation 14: the mean squared error of the predicted noise; 1 for predicting zero.

    Args:
        model: the U-Net, wrapped or not.
        scheduler: of `ddpm_scheduler()`.
        images: (n, channels, size, size), uint8, on the model's device.
        generator: on the same device; draws timesteps (n,), flips (n,) and the noise. From its seed torch's global state,
            from which dropout draws, gets another: a resumed run has the masks of one never stopped.
        flip: mirror each image with probability 1/2.

    Returns:
        A scalar, float32.
    """
    n, device = len(images), images.device
    clean = images.to(torch.float32) / 127.5 - 1
    if flip:
        mirrored = torch.rand((n, 1, 1, 1), device=device, generator=generator) < 0.5
        clean = torch.where(mirrored, clean.flip(-1), clean)
    timesteps = torch.randint(0, scheduler.config["num_train_timesteps"], (n,), device=device, generator=generator)
    noise = torch.randn(clean.shape, device=device, generator=generator)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    torch.manual_seed(
        mixed_seed(generator.initial_seed(), 1)
    )  # another seed: on a GPU the same would give the same numbers
    return torch.nn.functional.mse_loss(model(noisy, timesteps).sample.float(), noise)


class RunHistory:
    """What a run of the DDPM script leaves to tell; register it with `accelerator.register_for_checkpointing`.

    Attributes:
        epochs: one mapping for each completed epoch.
        total: sum of the losses of the current epoch, float32, on the device: adding to it waits for nothing.
        seconds: of training, those before a resumption included.
        gradients: statistics of the gradients at some steps, under the keys of `GradientStatistics`.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.epochs: list[dict[str, float]] = []
        self.total = torch.zeros((), device=device)
        self.seconds = 0.0
        self.gradients: list[dict[str, float]] = []

    def measure(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Add the statistics of the gradients that are there now; see `agr_hf.optim.statistics`."""
        found = gradient_statistics(agr_gradients(model, unwrapped(optimizer)))
        self.gradients.append(
            {
                f"gradients/{name}/{key}": value
                for name, summary in found.items()
                for key, value in summary.as_dict().items()
                if value == value  # of gradients that are all zero there are no logarithms
            }
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "epochs": self.epochs,
            "total": self.total.item(),
            "seconds": self.seconds,
            "gradients": self.gradients,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs, self.seconds = list(state["epochs"]), state["seconds"]
        self.gradients = list(state["gradients"])
        self.total.fill_(state["total"])


def sample_images(
    unet: nn.Module,
    count: int,
    *,
    steps: int = 100,
    seed: int = 0,
    batch_size: int = 250,
    scheduler: Any = None,
    accelerator: Any = None,
) -> Tensor:
    """Draw images with diffusers' `DDIMPipeline`, eta 0; torch's global random state is left alone.

    Args:
        unet: the network; on its device, and put in eval mode.
        count: how many.
        steps: of DDIM, 1 to the scheduler's training steps. The AGR paper takes 100.
        seed: of a generator on the CPU: every device starts from the same noise.
        batch_size: images at a time; memory grows with it, and the last bits depend on it.
        scheduler: that of training. Default `ddpm_scheduler()`.
        accelerator: its processes share the batches, and all of them must call; the images are those of one process.

    Returns:
        (count, channels, size, size), uint8, on the CPU.

    Raises:
        UserError: count or steps out of range.
    """
    from accelerate.utils import gather_object
    from diffusers import DDIMPipeline

    scheduler = ddpm_scheduler() if scheduler is None else scheduler
    most = scheduler.config["num_train_timesteps"]
    if count < 1:
        raise UserError(f"count={count} is not allowed; it must be at least 1")
    if not 1 <= steps <= most:
        raise UserError(
            f"steps={steps} is not allowed; it must be 1 to {most}, the steps that the model was trained on"
        )
    pipeline: Any = DDIMPipeline(unet.eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    process, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    parts = []
    for index, start in enumerate(range(0, count, batch_size)):
        n = min(batch_size, count - start)
        if index % processes != process:
            # Another process's batch: its noise is drawn, and thrown away, so that each batch has noise of its own.
            config: Any = unet.config
            size = config["sample_size"]
            shape = (n, config["in_channels"], *(size if isinstance(size, (tuple, list)) else (size, size)))
            torch.randn(shape, generator=generator, dtype=pipeline.unet.dtype)
            continue
        # (n, size, size, channels) of numpy, which every supported diffusers returns.
        images = pipeline(batch_size=n, generator=generator, num_inference_steps=steps, output_type="np").images
        part = (torch.from_numpy(images).permute(0, 3, 1, 2).float() * 255).round().to(torch.uint8)
        parts.append((index, part))
    if processes > 1:
        parts = sorted(gather_object(parts), key=lambda part: part[0])
    return torch.cat([part for _, part in parts])


def write_grid(images: Tensor, path: str | os.PathLike[str]) -> None:
    """Write images as one PNG, nearly square, whole or not at all.

    Args:
        images: (n, 1 or 3, height, width), uint8. Images smaller than 32 pixels are enlarged by a whole number.
        path: ends with .png; folders are made.
    """
    from PIL import Image
    from torchvision.utils import make_grid

    scale = max(1, 32 // images.shape[-1])
    large = images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    # make_grid gives three channels in any case.
    grid = make_grid(large, nrow=math.ceil(math.sqrt(len(images))), padding=2, pad_value=255)
    with replaced_file(path) as temporary:
        Image.fromarray(grid.permute(1, 2, 0).numpy()).save(temporary, format="PNG")


def log_grid(accelerator: Any, images: Tensor, step: int) -> None:
    """Give images (n, channels, height, width) in uint8 to the trackers of an `Accelerator` that take images."""
    pictures = images.permute(0, 2, 3, 1).numpy()
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"samples": pictures}, step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({"samples": list(pictures)}, step)
