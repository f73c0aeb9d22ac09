"""Frechet distances between sets of images, on networks by name; FID and IS with Inception.

A distance bears the name of its network. FID is the one on the Inception network of Heusel et al. 2017 and nothing else.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from agr_hf.errors import UserError
from agr_hf.files import replaced_file

logger = logging.getLogger(__name__)

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)


@dataclass(frozen=True)
class Statistics:
    """Mean (d,) and unbiased covariance (d, d) of features, float64, on the CPU; count is the number of images."""

    mean: Tensor
    covariance: Tensor
    count: int


@dataclass(frozen=True)
class FeatureNetwork:
    """Images (n, channels, height, width) in float32 from 0 to 1, to features (n, d).

    Attributes:
        name: under which a distance is reported.
        identity: changes whenever the features do; cached statistics are kept by it.
        forward: the network.
    """

    name: str
    identity: str
    forward: Callable[[Tensor], Tensor]


def feature_network(name: str, device: torch.device | str = "cpu") -> FeatureNetwork:
    """A network by name.

    Args:
        name: "pixels": the images themselves, no network, so for small images only. "timm:MODEL": the pooled features of a
            pretrained timm model, from the Hub or its cache. "resnet20:FILE": the 64 features of the CIFAR-10 ResNet-20 of
            akamaster/pytorch_resnet_cifar10 (.th). "PACKAGE.MODULE:FACTORY": a function without arguments that returns an
            `nn.Module`; its inputs are as in `FeatureNetwork`.
        device: where it runs.

    Raises:
        UserError: there is no such network, or its weights could not be loaded.
    """
    kind, _, rest = name.partition(":")
    if name == "pixels":
        return FeatureNetwork("pixels", "pixels", lambda images: images.flatten(1))
    if not rest:
        raise UserError(
            f"there is no feature network {name!r}; name 'pixels', 'timm:MODEL', 'resnet20:FILE' or "
            "'PACKAGE.MODULE:FACTORY'"
        )
    if kind == "timm":
        network, reported = _timm_network(rest), name
    elif kind == "resnet20":
        network, reported = _resnet20(rest), "resnet20"
    else:
        try:
            network = getattr(importlib.import_module(kind), rest)()
        except (ImportError, AttributeError) as error:
            raise UserError(f"the feature network {name!r} cannot be imported: {error}") from error
        reported = rest
    network = network.eval().requires_grad_(False).to(device)
    return FeatureNetwork(reported, f"{reported}-{_digest(*network.state_dict().values())}", network)


@torch.no_grad()
def image_features(
    network: FeatureNetwork, images: Tensor, *, batch_size: int = 256, device: torch.device | str = "cpu"
) -> Tensor:
    """Features (n, d) in float32 on the CPU, of images (n, channels, height, width) in uint8.

    Raises:
        UserError: the network gives something else than one vector an image.
    """
    parts = [network.forward(part.to(device).float() / 255).float().cpu() for part in images.split(batch_size)]
    features = torch.cat(parts)
    if features.ndim != 2 or len(features) != len(images):
        raise UserError(
            f"the network {network.name!r} gives {tuple(features.shape)} for {len(images)} images; it must be one vector "
            "for each: (n, d)"
        )
    return features


def compute_statistics(features: Tensor) -> Statistics:
    """Statistics of features (n, d), n >= 2, any floating dtype; a ValueError for fewer, or where NaN or inf is in them."""
    from agr_hf.metrics.frechet_distance.frechet_distance import mean_and_covariance

    mean, covariance = mean_and_covariance(features.double().numpy())
    return Statistics(torch.from_numpy(mean), torch.from_numpy(covariance), len(features))


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) in float64, >= 0 (Dowson and Landau 1982).

    Raises:
        ValueError: the numbers of features differ.
    """
    from agr_hf.metrics.frechet_distance.frechet_distance import gaussian_distance

    return gaussian_distance(one.mean.numpy(), one.covariance.numpy(), other.mean.numpy(), other.covariance.numpy())


def save_statistics(statistics: Statistics, path: str | os.PathLike[str], identity: str = "") -> None:
    """Write statistics as safetensors, whole or not at all; `identity` says of what they are."""
    from safetensors.torch import save_file

    metadata = {"statistics": json.dumps({"identity": identity, "count": statistics.count})}
    with replaced_file(path) as temporary:
        save_file({"mean": statistics.mean, "covariance": statistics.covariance}, temporary, metadata)


def load_statistics(path: str | os.PathLike[str], identity: str = "") -> Statistics:
    """Read what `save_statistics` wrote.

    Raises:
        UserError: the file is damaged, or of something else than `identity`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("statistics", "{}"))
            if about.get("identity") != identity:
                raise UserError(f"{path} holds statistics of {about.get('identity')!r}, not of {identity!r}: remove it")
            return Statistics(file.get_tensor("mean"), file.get_tensor("covariance"), about["count"])
    except SafetensorError as error:
        raise UserError(f"{path} is no file of statistics ({error}): remove it") from error


def image_statistics(
    network: FeatureNetwork,
    images: Tensor,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
) -> Statistics:
    """Statistics of images (n, channels, height, width) in uint8, computed once for the same images and network.

    Args:
        network: of `feature_network`.
        images: at least 2.
        cache_dir: a folder to keep them in, under a name made of the network's weights and the images' pixels; a damaged
            file is computed again. Default: none.
        device: of the network.
    """
    path, identity = None, f"{network.identity} {tuple(images.shape)} {_digest(images)}"
    if cache_dir is not None:
        name = re.sub(r"[^0-9A-Za-z._-]+", "-", network.name)
        path = Path(cache_dir) / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.safetensors"
        if path.exists():
            try:
                return load_statistics(path, identity)
            except ValueError as error:
                logger.warning("%s; they are computed again", error)
    statistics = compute_statistics(image_features(network, images, device=device))
    if path is not None:
        save_statistics(statistics, path, identity)
    return statistics


def frechet_metrics(
    samples: Tensor,
    references: Tensor,
    network: FeatureNetwork,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """The distance of samples to real images, both (n, channels, height, width) in uint8, and of how many images each.

    Returns:
        `frechet_distance_{network}`, `samples` and `references`.
    """
    reference = image_statistics(network, references, cache_dir=cache_dir, device=device)
    sampled = image_statistics(network, samples, device=device)
    distance = frechet_distance(sampled, reference)
    return {f"frechet_distance_{network.name}": distance, "samples": sampled.count, "references": reference.count}


def inception_weights() -> None:
    """See to it that torch-fidelity and Inception's weights are here, downloading these where they are not.

    Raises:
        UserError: torch-fidelity is missing, or the weights could not be loaded; the message says where to put them.
    """
    if importlib.util.find_spec("torch_fidelity") is None:
        raise UserError(
            "FID and IS need torch-fidelity: pip install torch-fidelity; or take a Frechet distance on a network at hand "
            "(--features)"
        )
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    try:
        # Before torch-fidelity does it: checked against the hash in the name, and without pickle.
        torch.hub.load_state_dict_from_url(INCEPTION_URL, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"FID and IS need Inception's weights, not found here ({error}); download {INCEPTION_URL} where there is a "
            f"network and put it into {folder}, or take a Frechet distance on a network at hand (--features)"
        ) from error


def inception_metrics(
    samples: Tensor,
    references: Tensor,
    *,
    cache_dir: str | os.PathLike[str],
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """FID and Inception Score through torch-fidelity, whose Inception is that of the papers, bilinear resizing included.

    Args:
        samples, references: (n, 1 or 3, height, width) in uint8; grey images are shown to Inception in three channels. The
            papers take 50,000 samples and all training images; fewer samples give a larger FID.
        cache_dir: where torch-fidelity keeps the references' statistics.
        device: of Inception.

    Returns:
        `fid`, `inception_score` and `inception_score_std` (over 10 splits).

    Raises:
        UserError: see `inception_weights`.
    """
    inception_weights()
    import torch_fidelity

    def rows(images: Tensor) -> Subset[Any]:
        """A data set of images in colour: torch-fidelity takes no tensor."""
        images = images.expand(-1, 3, -1, -1)
        return Subset(images, range(len(images)))  # type: ignore[arg-type]

    metrics = torch_fidelity.calculate_metrics(
        input1=rows(samples),
        input2=rows(references),
        input2_cache_name=f"references-{_digest(references)[:16]}",
        cache_root=os.fspath(cache_dir),
        fid=True,
        isc=True,
        cuda=torch.device(device).type == "cuda",
        batch_size=64,
        verbose=False,
    )
    return {
        "fid": float(metrics["frechet_inception_distance"]),
        "inception_score": float(metrics["inception_score_mean"]),
        "inception_score_std": float(metrics["inception_score_std"]),
    }


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Normalized(nn.Module):
    """A network behind its own preprocessing: three channels, size, mean and deviation."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, size: int | None, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network, self.size = network, size
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        images = images.expand(-1, 3, -1, -1)
        if self.size is not None and images.shape[-1] != self.size:
            size = (self.size, self.size)
            images = nn.functional.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
        return self.network((images - self.mean) / self.std)


def _timm_network(model: str) -> nn.Module:
    import timm

    try:
        network = timm.create_model(model, pretrained=True, num_classes=0)
    except Exception as error:  # whatever timm, the Hub's client or the network raise
        raise UserError(
            f"the timm model {model!r} could not be loaded: "
            f"{(str(error) or type(error).__name__).splitlines()[0]} Without a "
            "network, name 'pixels', 'resnet20:FILE' or 'PACKAGE.MODULE:FACTORY'"
        ) from error
    config = timm.data.resolve_model_data_config(network)
    return _Normalized(network, config["input_size"][-1], config["mean"], config["std"])


def _block(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Two 3x3 convolutions, and a shortcut without parameters (He et al., option A)."""
    from torchvision.models.resnet import BasicBlock

    def shortcut(x: Tensor) -> Tensor:
        half = (outputs - inputs) // 2
        return nn.functional.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, half, half))

    return BasicBlock(inputs, outputs, stride, downsample=shortcut)


class _ResNet20(nn.Module):
    """He et al. 2015, section 4.2, n = 3, without the last layer: 64 features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(_block(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(_block(16, 32, 2), _block(32, 32, 1), _block(32, 32, 1))
        self.layer3 = nn.Sequential(_block(32, 64, 2), _block(64, 64, 1), _block(64, 64, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        return x.mean((2, 3))


def _resnet20(path: str) -> nn.Module:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is none of its own
        raise UserError(f"{path} cannot be read as weights of ResNet-20: {str(error).splitlines()[0]}") from error
    # akamaster saved a DataParallel, with the classifier.
    state = {key.removeprefix("module."): value for key, value in saved.get("state_dict", saved).items()}
    state = {key: value for key, value in state.items() if not key.startswith("linear.")}
    network = _ResNet20()
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path} holds no ResNet-20 of akamaster/pytorch_resnet_cifar10: {error}") from error
    # Their training images were normalized with ImageNet's mean and deviation.
    return _Normalized(network, None, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
