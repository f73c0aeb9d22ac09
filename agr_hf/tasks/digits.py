"""scikit-learn's digits: 1,797 real 8x8 images of handwritten digits that come with the package, and a small ViT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from transformers import ViTForImageClassification


@dataclass(frozen=True)
class Images(Dataset[dict[str, Tensor]]):
    """Images (n, channels, height, width) in float32 and labels (n,), served as Trainer wants them."""

    pixel_values: Tensor
    labels: Tensor

    @property
    def encoded(self) -> Tensor:
        """The images as pictures keep them: uint8, from 0 to 255."""
        return ((self.pixel_values + 1) * 127.5).round().to(torch.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}


def load_digits() -> dict[str, Images]:
    """The splits "train" (1,077), "validation" (360) and "test" (360), stratified by class and always the same.

    Raises:
        ImportError: scikit-learn is missing.
    """
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    data = sklearn_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1  # 0..16 becomes -1..1
    labels = torch.tensor(data.target, dtype=torch.int64)
    rest, test = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
    train, validation = train_test_split(rest, test_size=360, stratify=labels[rest], random_state=0)
    chosen = {"train": train, "validation": validation, "test": test}
    return {name: Images(images[index], labels[index]) for name, index in chosen.items()}


def digits_model(**overrides: Any) -> ViTForImageClassification:
    """A ViT of 105,000 parameters for 8x8 images, from its own initialisation under the current seed."""
    from transformers import ViTConfig, ViTForImageClassification

    config = {
        "image_size": 8,
        "patch_size": 2,
        "num_channels": 1,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "num_labels": 10,
        "id2label": {i: str(i) for i in range(10)},
        "label2id": {str(i): i for i in range(10)},
    }
    return ViTForImageClassification(ViTConfig(**{**config, **overrides}))
