"""Networks of the papers for small images: timm's, with stems that leave something of 32x32 and 64x64 pixels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from agr_hf.errors import UserError
from agr_hf.tasks.digits import digits_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Arguments of each family at the given image size. ImageNet stems reduce 32x32 pixels to one, so patches get smaller;
# residual and dense networks and VGG have no such option, and get names of their own (`register_small_image_models`).
SMALL_STEMS = ("resnet18", "resnet34", "resnet50", "resnet101", "densenet121", "vgg11", "vgg11_bn")
ALIASES = {
    "vit-tiny": "vit_tiny_patch16_224",
    "tinyvit-5m": "tiny_vit_5m_224",
    "tinyvit-11m": "tiny_vit_11m_224",
    "tinyvit-21m": "tiny_vit_21m_224",
    "swin-t": "swin_tiny_patch4_window7_224",
    "swin-s": "swin_small_patch4_window7_224",
    "convnext-t": "convnext_tiny",
    "mlp": "agr_hf_mlp",
    "resnet-micro": "agr_hf_resnet_micro",
}


def register_small_image_models() -> None:
    """Make `resnet18_small_images` and its likes known to timm. May be called again.

    A model saved under such a name needs this call before `from_pretrained` in another process.
    """
    import timm
    from timm.models import register_model

    for name in SMALL_STEMS:
        if not timm.is_model(f"{name}_small_images"):
            register_model(_small_image_entry(name))
    for entry in (agr_hf_mlp, agr_hf_resnet_micro):
        if not timm.is_model(entry.__name__):
            register_model(entry)


def _small_image_entry(name: str) -> Any:
    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        import timm

        _refuse_pretrained(pretrained, entry.__name__)
        in_chans = kwargs.get("in_chans", 3)
        model: Any = timm.create_model(name, **kwargs)
        if name.startswith("vgg"):
            # Two hidden layers of 4096 as published; the 7x7 kernel in front of them becomes 1x1: 32x32 pixels leave 1x1.
            old = model.pre_logits.fc1
            model.pre_logits.fc1 = nn.Conv2d(old.in_channels, old.out_channels, 1)
            model.pre_logits.input_kernel_size = 1
        elif name.startswith("resnet"):
            model.conv1 = _stem(in_chans, model.conv1.out_channels)
            model.maxpool = nn.Identity()
        else:
            model.features.conv0 = _stem(in_chans, model.features.conv0.out_channels)
            model.features.pool0 = nn.Identity()
        return model

    entry.__name__ = f"{name}_small_images"
    entry.__module__ = __name__
    entry.__doc__ = f"timm's {name} with a 3x3 stride-1 stem and no first pooling, for images of 32x32 and 64x64."
    return entry


def _stem(in_channels: int, out_channels: int) -> nn.Conv2d:
    """The standard first layer for CIFAR, with the initialisation that timm's ResNets give their convolutions."""
    conv = nn.Conv2d(in_channels, out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _refuse_pretrained(pretrained: bool, name: str) -> None:
    if pretrained:
        raise ValueError(f"there are no pretrained weights for {name}; leave pretrained=False")


class MLP(nn.Module):
    """Flattened pixels, hidden layers with ReLU, a linear classifier; as timm's models are used."""

    def __init__(
        self, num_classes: int = 1000, in_chans: int = 3, img_size: int = 28, hidden: Sequence[int] = (512, 512)
    ) -> None:
        super().__init__()
        sizes = [in_chans * img_size * img_size, *hidden]
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = sizes[-1]
        self.pretrained_cfg = {"input_size": (in_chans, img_size, img_size), "num_classes": num_classes}
        self.layers = nn.Sequential(
            *(layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU()))
        )
        self.head = nn.Linear(sizes[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x.flatten(1)))


def agr_hf_mlp(pretrained: bool = False, **kwargs: Any) -> MLP:
    """An MLP with two hidden layers of 512 (AdaL paper, figure 1: an MLP on MNIST; its sizes are not given)."""
    _refuse_pretrained(pretrained, "agr_hf_mlp")
    known = ("num_classes", "in_chans", "img_size", "hidden")
    return MLP(**{key: value for key, value in kwargs.items() if key in known})


def agr_hf_resnet_micro(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A ResNet of 4 basic blocks, widths 16 to 128, for images of 32x32: 310,000 parameters, to train many on a CPU."""
    import timm

    _refuse_pretrained(pretrained, "agr_hf_resnet_micro")
    model: Any = timm.create_model("resnet18", layers=(1, 1, 1, 1), channels=(16, 32, 64, 128), **kwargs)
    model.conv1, model.maxpool = _stem(kwargs.get("in_chans", 3), model.conv1.out_channels), nn.Identity()
    return model


def architecture(name: str, size: int, channels: int) -> tuple[str, dict[str, Any]]:
    """timm's name and arguments of a network for images of this size.

    Args:
        name: a key of `ALIASES`, a name of timm.
        size, channels: of the images. From 64 pixels patches are those of 64x64, from 112 those of ImageNet.

    Raises:
        UserError: timm knows no such architecture.
    """
    import timm

    register_small_image_models()
    name = ALIASES.get(name, name)
    if not timm.is_model(name):
        raise UserError(
            f"there is no architecture {name!r}; names are {', '.join([*SMALL_STEMS, *ALIASES, 'vit-micro'])} and all of "
            "timm's (timm.list_models())"
        )
    arguments: dict[str, Any] = {} if channels == 3 else {"in_chans": channels}
    if name == "agr_hf_mlp":
        return name, {**arguments, "img_size": size}
    if size > 111:
        return name, arguments
    if name.startswith("vgg") and size < 32:
        raise UserError(
            f"{name} halves images five times: {size} pixels are too few; pass --image_size 32, or another name"
        )
    if name in SMALL_STEMS:
        return f"{name}_small_images", arguments
    if name.startswith("vit_"):
        patch = 2 if size < 16 else 4 if size < 64 else 8
        return name, {**arguments, "img_size": size, "patch_size": patch}
    if name.startswith("swin_"):
        # 16x16 or 32x32 patches, halved three times; windows divide every stage.
        patch, window = (2, 4) if size < 64 else (2, 8)
        return name, {**arguments, "img_size": size, "patch_size": patch, "window_size": window}
    if name.startswith("convnext"):
        return name, {**arguments, "patch_size": 1 if size < 32 else 2}
    return name, arguments


def classifier(
    name: str, size: int, channels: int, labels: Sequence[str], mean: Sequence[float], std: Sequence[float]
) -> PreTrainedModel:
    """A transformers model around a timm network, from timm's own initialisation under the current seed.

    `vit-micro` is the demo's network, transformers' ViT: timm's weights of small patches drown the positions.

    `save_pretrained` and `from_pretrained` work as for any model of transformers. Its wrapper would draw all weights from
    N(0, 0.02), which is no initialisation of these networks: timm's own are copied in.

    Args:
        name, size, channels: see `architecture`.
        labels: names of the classes, in order.
        mean, std: of the channels, kept with the model for those who load it.

    Raises:
        UserError: there is no such architecture.
    """
    import timm
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    classes: dict[str, Any] = {
        "num_labels": len(labels), "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }  # fmt: skip
    if name == "vit-micro":
        return digits_model(image_size=size, patch_size=2 if size < 16 else 4, num_channels=channels, **classes)
    timm_name, arguments = architecture(name, size, channels)
    make_config: Any = TimmWrapperConfig  # its fields are wider than its signature
    config = make_config(
        architecture=timm_name,
        model_args=arguments,
        **classes,
        # What the image processor does: nothing but to normalise, as in evaluation; timm's default cuts 1/8 off.
        pretrained_cfg={
            "input_size": [channels, size, size],
            "mean": list(mean),
            "std": list(std),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
        },
    )
    # The wrapper's own draws must not decide what a seed means.
    with torch.random.fork_rng(devices=[]):
        model = TimmWrapperForImageClassification(config)
    own = timm.create_model(timm_name, num_classes=len(labels), **arguments)
    model.timm_model.load_state_dict(own.state_dict())
    return model


def parameter_count(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())
