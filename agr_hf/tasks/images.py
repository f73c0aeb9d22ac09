"""Image classification data: one loader for Hub datasets, parquet files, folders of images, and what comes with packages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from agr_hf.errors import UserError
from agr_hf.integrations.epochs import EpochData
from agr_hf.integrations.random_states import mixed_seed
from agr_hf.tasks.digits import load_digits
from agr_hf.tasks.pictures import (
    find_image_column,
    find_label_column,
    open_image,
    read_encoded,
    read_size,
    warn_of_broken,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSource:
    """Where a data set is and what is in it.

    Attributes:
        hub_id, revision: on the Hub, pinned: the data of a published number must not move.
        splits: names of the splits for training and testing.
        label: column of the label; images are in `image` or `img`.
        size, channels, classes: of the images.
        mean, std: of the training images' channels, from 0 to 1.
    """

    hub_id: str
    revision: str
    splits: tuple[str, str]
    label: str
    size: int
    channels: int
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


# Means and deviations as the field uses them for these sets.
SOURCES: dict[str, ImageSource] = {
    "cifar10": ImageSource(
        "uoft-cs/cifar10", "0b2714987fa478483af9968de7c934580d0bb9a2", ("train", "test"), "label", 32, 3, 10,
        (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616),
    ),
    "cifar100": ImageSource(
        "uoft-cs/cifar100", "aadb3af77e9048adbea6b47c21a81e47dd092ae5", ("train", "test"), "fine_label", 32, 3, 100,
        (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762),
    ),
    # The validation set is the test set, as in the AGR paper (section 5.1): labels of the test set were never given out.
    "tiny-imagenet": ImageSource(
        "zh-plus/tiny-imagenet", "5a77092c28e51558c5586e9c5eb71a7e17a5e43f", ("train", "valid"), "label", 64, 3, 200,
        (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821),
    ),
    "fashion-mnist": ImageSource(
        "zalando-datasets/fashion_mnist", "531be5e2ccc9dba0c201ad3ae567a4f3d16ecdd2", ("train", "test"), "label", 28, 1, 10,
        (0.2860,), (0.3530,),
    ),
    "mnist": ImageSource(
        "ylecun/mnist", "77f3279092a1c1579b2250db8eafed0ad422088c", ("train", "test"), "label", 28, 1, 10,
        (0.1307,), (0.3081,),
    ),
}  # fmt: skip
AUGMENTATIONS = ("none", "flip-crop", "rand-augment")


def hub_source(name: str, revision: str | None = None) -> tuple[str, str] | None:
    """Hub id and revision that a name stands for, another revision where one is given; None for a name without either."""
    if name in SOURCES:
        return SOURCES[name].hub_id, revision or SOURCES[name].revision
    return (name, revision) if revision else None


@dataclass(frozen=True)
class ImageData:
    """Two data sets for Trainer, and what a model and its preprocessing must know of them.

    `test_rows` is how many rows the test split has, of which `test` may be a part.
    """

    train: ImageRows
    test: ImageRows
    size: int
    channels: int
    labels: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    test_split: str
    test_rows: int


class ImageRows(EpochData, Dataset[dict[str, Any]]):
    """Images kept as bytes (uint8, channels x height x width), turned into float32 pixel values when they are asked for.

    Args:
        images, labels: (n, channels, size, size) uint8, and (n,) int64.
        transform: of one image.
        seed: of what the transform draws, with the epoch and the image's index: whoever loads it, in a run stopped and
            resumed too, draws the same. None for a transform that draws nothing.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, transform: Callable[[Tensor], Tensor], seed: int | None = None
    ) -> None:
        super().__init__()
        self.images = images
        self.labels = labels
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self._pixels(index), "labels": self.labels[index]}

    def _pixels(self, index: int) -> Tensor:
        if self.seed is None:
            return self.transform(self.images[index])
        # torchvision draws from torch's global state, which is the training's.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mixed_seed(self.seed, self.epoch, index % len(self)))
            return self.transform(self.images[index])


def load_images(
    name: str,
    train_file: str | None = None,
    test_file: str | None = None,
    augmentation: str = "none",
    max_train: int | None = None,
    max_test: int | None = None,
    size: int | None = None,
    seed: int = 0,
) -> ImageData:
    """Load a data set by name, from files, or from a folder.

    Args:
        name: a key of `SOURCES`, "digits" (scikit-learn's, no network), a folder with `train` and `test` (or `validation`)
            subfolders of one folder a class, or any Hub id. With files, the set that they are of.
        train_file, test_file: parquet files with columns `image` (or `img`) and `label`, in the place of the Hub.
        augmentation: of the training images: "none", "flip-crop" (random horizontal flip, crop from 4 pixels of padding,
            the standard for CIFAR), or "rand-augment" (flip-crop, then RandAugment).
        max_train, max_test: at most so many images, the same random ones in every run.
        size: height and width; other images are resized. Default: that of the named set; of others, that of the first
            image where it is square and of at most 224 pixels, else 224.
        seed: of the augmentation. Default 0.

    Returns:
        The data. Images that cannot be decoded are left out, and named in a warning.

    Raises:
        UserError: the data could not be loaded, or a label is out of range; the message says what to pass.
    """
    if augmentation not in AUGMENTATIONS:
        raise UserError(f"augmentation={augmentation!r} is not allowed; it must be one of {', '.join(AUGMENTATIONS)}")
    if (train_file is None) != (test_file is None):
        raise UserError("train_file and test_file go together: one of them was given")
    for key, value in (("max_train", max_train), ("max_test", max_test), ("size", size)):
        if value is not None and value < 1:
            raise UserError(f"{key}={value} is not allowed; it must be at least 1, or not given")
    for file in (train_file, test_file):
        if file is not None and not Path(file).is_file():
            raise UserError(
                f"there is no file {file!r}; train_file and test_file are parquet files with image and label"
            )
    if name == "digits" and train_file is None:
        if size not in (None, 8):
            raise UserError(f"size={size} is not allowed; the digits are 8 x 8")
        return _digits(augmentation, max_train, max_test, seed)
    source = SOURCES.get(name)
    train_rows, test_rows, test_split = _rows(name, source, train_file, test_file)
    test_count = len(test_rows)
    # Sets are often sorted by label. One shuffle for all seeds: they are to differ in the run, not in the data.
    if max_train is not None and max_train < len(train_rows):
        train_rows = train_rows.shuffle(seed=0).select(range(max_train))
    if max_test is not None and max_test < len(test_rows):
        test_rows = test_rows.shuffle(seed=0).select(range(max_test))
    size = size or (source.size if source else _own_size(train_rows))
    channels = source.channels if source else 3
    train = _decoded(train_rows, source, size, channels, "train")
    test = _decoded(test_rows, source, size, channels, "test")
    names = _label_names(train_rows, source, train[1])
    for what, (_, labels) in (("train", train), ("test", test)):
        if len(labels) == 0:
            raise UserError(f"the {what} set of {name!r} has no image that can be read")
        if int(labels.min()) < 0 or int(labels.max()) >= len(names):
            raise UserError(
                f"the {what} set of {name!r} has labels from {int(labels.min())} to {int(labels.max())}, but "
                f"{len(names)} classes; labels must count from 0"
            )
    return _image_data(
        train, test, augmentation, seed, size=size, channels=channels, labels=names, test_split=test_split,
        test_rows=test_count, mean=source.mean if source else (0.485, 0.456, 0.406),
        std=source.std if source else (0.229, 0.224, 0.225),
    )  # fmt: skip


def _own_size(rows: Any) -> int:
    """The size of the first image, where it can be that of a network."""
    column = find_image_column(rows)
    if column is None or not len(rows):
        return 224
    try:
        width, height = read_size(next(read_encoded(rows, column)))
    except (OSError, SyntaxError, ValueError):
        return 224  # it will be named among those that cannot be read
    return width if width == height <= 224 else 224


def _digits(augmentation: str, max_train: int | None, max_test: int | None, seed: int) -> ImageData:
    splits = load_digits()
    train, test = splits["train"], splits["test"]
    return _image_data(
        (train.encoded[:max_train], train.labels[:max_train]), (test.encoded[:max_test], test.labels[:max_test]),
        augmentation, seed, size=8, channels=1, labels=[str(i) for i in range(10)], mean=(0.3053,), std=(0.3761,),
        test_split="test", test_rows=len(test),
    )  # fmt: skip


def _image_data(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], augmentation: str, seed: int, **facts: Any
) -> ImageData:
    """The data sets of images and labels; `facts` are the other fields of `ImageData`."""
    size, mean, std = facts["size"], facts["mean"], facts["std"]
    return ImageData(
        ImageRows(*train, make_transform(size, mean, std, augmentation), None if augmentation == "none" else seed),
        ImageRows(*test, make_transform(size, mean, std, "none")),
        **facts,
    )


def make_transform(
    size: int, mean: Sequence[float], std: Sequence[float], augmentation: str
) -> Callable[[Tensor], Tensor]:
    """uint8 image (channels, size, size) to float32 pixel values; random parts draw from torch's global state."""
    from torchvision.transforms import v2

    steps: list[Any] = []
    if augmentation != "none":
        steps += [v2.RandomCrop(size, padding=max(1, size // 8)), v2.RandomHorizontalFlip()]
    if augmentation == "rand-augment":
        steps.append(v2.RandAugment())
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    return v2.Compose(steps)


def _rows(name: str, source: ImageSource | None, train_file: str | None, test_file: str | None) -> tuple[Any, Any, str]:
    """Training rows, test rows, and what the split of the latter is called."""
    import datasets

    try:
        if train_file is not None and test_file is not None:
            files = (train_file, test_file)
            train, test = (datasets.load_dataset("parquet", data_files=file, split="train") for file in files)
            return train, test, source.splits[1] if source else "test"
        if Path(name).is_dir():
            loaded = datasets.load_dataset("imagefolder", data_dir=name)
        elif source:
            loaded = datasets.load_dataset(source.hub_id, revision=source.revision)
        else:
            loaded = datasets.load_dataset(name)
    except Exception as error:
        where = (
            f"the Hub ({source.hub_id})" if source else "the Hub, and is no folder and none of " + ", ".join(SOURCES)
        )
        raise UserError(
            f"the data set {name!r} could not be loaded from {where}: {str(error).splitlines()[0]}. Without a network, pass "
            "train_file and test_file (parquet files with image and label), a folder with train and test in it, or "
            "'digits'"
        ) from error
    found = next((split for split in ("test", "validation", "valid") if split in loaded), "test")
    splits = source.splits if source else ("train", found)
    missing = [split for split in splits if split not in loaded]
    if missing:
        raise UserError(f"the data set {name!r} has the splits {', '.join(loaded)}; {', '.join(missing)} is needed")
    return loaded[splits[0]], loaded[splits[1]], splits[1]


def _decoded(rows: Any, source: ImageSource | None, size: int, channels: int, what: str) -> tuple[Tensor, Tensor]:
    """All images as one uint8 tensor (n, channels, size, size), and their labels; unreadable ones left out, and named."""
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    image_column, label_column = find_image_column(rows), find_label_column(rows, source.label if source else None)
    if image_column is None or label_column is None:
        raise UserError(f"the {what} set has the columns {', '.join(rows.column_names)}; needed are image and label")
    images, labels, broken = [], [], []
    for i, (content, label) in enumerate(zip(read_encoded(rows, image_column), rows[label_column], strict=True)):
        try:
            picture = open_image(content).convert("L" if channels == 1 else "RGB")
            image = pil_to_tensor(picture.resize((size, size), Image.Resampling.BILINEAR))
        except (OSError, ValueError, SyntaxError) as error:
            broken.append(f"row {i} ({type(error).__name__})")
            continue
        images.append(image)
        labels.append(label)
    warn_of_broken(broken, len(rows), f"the {what} set")
    stacked = torch.stack(images).contiguous() if images else torch.empty(0, channels, size, size, dtype=torch.uint8)
    return stacked, torch.tensor(labels, dtype=torch.int64)


def _label_names(rows: Any, source: ImageSource | None, labels: Tensor) -> list[str]:
    import datasets

    column = find_label_column(rows, source.label if source else None)
    feature = rows.features.get(column)
    if isinstance(feature, datasets.ClassLabel) and (source is None or feature.num_classes == source.classes):
        return list(feature.names)
    if source:
        found = len(labels.unique())
        if found != source.classes:
            logger.warning("%d of the %d classes of this data set have training images", found, source.classes)
        return [str(i) for i in range(source.classes)]
    return [str(i) for i in range(int(labels.max()) + 1 if len(labels) else 0)]


def classification_metrics(prediction: Any) -> Mapping[str, float]:
    """For Trainer's `compute_metrics`: top-1 and, with more than five classes, top-5 accuracy, from 0 to 1."""
    # Not through `evaluate`, which would copy all scores into a table.
    from agr_hf.metrics.top_k_accuracy.top_k_accuracy import share_in_top_k

    scores, labels = prediction.predictions, prediction.label_ids
    metrics = {"accuracy": share_in_top_k(scores, labels, 1)}
    if scores.shape[1] > 5:
        metrics["top5_accuracy"] = share_in_top_k(scores, labels, 5)
    return metrics
