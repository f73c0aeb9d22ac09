"""Data and networks of the image classifiers."""

import io

import numpy
import pytest
import torch
from datasets import Dataset
from PIL import Image as Picture
from torch.utils.data import DataLoader

from agr_hf.tasks import unlabelled_images
from agr_hf.tasks.classifiers import ALIASES, SMALL_STEMS, architecture, classifier, parameter_count
from agr_hf.tasks.images import SOURCES, load_images, make_transform
from agr_hf.tasks.recipes import IMAGE_RECIPES


def png(color, size=32):
    content = io.BytesIO()
    Picture.new("RGB", (size, size), color).save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


def parquet(path, rows, column="image"):
    Dataset.from_dict({column: [row[0] for row in rows], "label": [row[1] for row in rows]}).to_parquet(path)
    return str(path)


def files(tmp_path, train, test=None, column="image"):
    return parquet(tmp_path / "train.parquet", train, column), parquet(tmp_path / "test.parquet", test or train, column)


@pytest.mark.parametrize("column", ["image", "img"])
def test_parquet_files_stand_in_for_the_hub(column, tmp_path):
    rows = [(png((250, 0, 0)), 0), (png((0, 250, 0)), 9)]
    data = load_images("cifar10", *files(tmp_path, rows, column=column))
    assert (data.size, data.channels, len(data.labels)) == (32, 3, 10)
    item = data.train[1]
    assert item["labels"] == 9
    want = (torch.tensor([0.0, 250 / 255, 0.0]) - torch.tensor(data.mean)) / torch.tensor(data.std)
    torch.testing.assert_close(item["pixel_values"][:, 5, 7], want)


def test_images_of_another_size_or_mode_are_converted(tmp_path):
    gray = io.BytesIO()
    Picture.new("L", (40, 20), 128).save(gray, "PNG")
    data = load_images("mnist", *files(tmp_path, [({"bytes": gray.getvalue(), "path": None}, 3)]))
    assert data.train[0]["pixel_values"].shape == (1, 28, 28)


@pytest.mark.parametrize(("shape", "size"), [((32, 32), 32), ((64, 64), 64), ((50, 60), 224), ((512, 512), 224)])
def test_own_images_keep_their_size_where_a_network_can_take_it(shape, size, tmp_path):
    content = io.BytesIO()
    Picture.new("RGB", shape, (9, 9, 9)).save(content, "PNG")
    paths = files(tmp_path, [({"bytes": content.getvalue(), "path": None}, 0)])
    assert load_images("digits", *paths).size == size
    assert load_images("digits", *paths, size=16).train[0]["pixel_values"].shape == (3, 16, 16)
    assert load_images("cifar10", *paths).size == 32


@pytest.mark.parametrize("loader", ["images", "unlabelled"])
def test_grey_values_of_16_bits_are_scaled_and_not_clipped(loader, tmp_path):
    values = numpy.linspace(0, 65535, 16 * 16).reshape(16, 16).astype(numpy.uint16)
    path = tmp_path / "pictures" / "grey.png"
    path.parent.mkdir()
    Picture.fromarray(values).save(path)
    if loader == "unlabelled":
        pixels = unlabelled_images.load_unlabelled_images(path.parent)[0, 0]
    else:
        rows = [({"bytes": path.read_bytes(), "path": None}, 0)]
        pixels = load_images("mnist", *files(tmp_path, rows), size=16).train.images[0, 0]
    assert (pixels.double() - torch.from_numpy(values / 257)).abs().max() <= 0.5


def test_images_that_cannot_be_read_are_left_out_and_named(tmp_path, caplog):
    good = png((9, 9, 9))
    cut = {"bytes": good["bytes"][:60], "path": None}
    rows = [(good, 0), (cut, 1), ({"bytes": b"no picture", "path": None}, 2), (good, 3)]
    data = load_images("cifar10", *files(tmp_path, rows, [(good, 0)]))
    assert data.train.labels.tolist() == [0, 3]
    assert "2 of 4 images of the train set cannot be read and are left out: row 1 (" in caplog.text


def test_a_set_without_a_readable_image_and_wrong_labels_are_refused(tmp_path):
    bad = [({"bytes": b"", "path": None}, 0)]
    with pytest.raises(ValueError, match="the train set of 'cifar10' has no image that can be read"):
        load_images("cifar10", *files(tmp_path, bad, [(png((1, 1, 1)), 0)]))
    with pytest.raises(ValueError, match="labels from 0 to 10, but 10 classes"):
        load_images("cifar10", *files(tmp_path, [(png((1, 1, 1)), 0), (png((1, 1, 1)), 10)]))
    with pytest.raises(ValueError, match="labels from -1"):
        load_images("cifar10", *files(tmp_path, [(png((1, 1, 1)), -1)]))


@pytest.mark.parametrize("name", [*SOURCES, "nobody/nothing"])
def test_without_a_network_the_message_says_what_to_pass(name, monkeypatch):
    import datasets

    def offline(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match="could not be loaded from .*pass train_file and test_file"):
        load_images(name)


def test_other_mistakes_get_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="augmentation='mixup' is not allowed; it must be one of none, flip-crop"):
        load_images("digits", augmentation="mixup")
    with pytest.raises(ValueError, match=r"there is no file 'a.parquet'; train_file and test_file are parquet files"):
        load_images("cifar10", "a.parquet", "b.parquet")
    with pytest.raises(ValueError, match="max_train=0 is not allowed; it must be at least 1"):
        load_images("digits", max_train=0)
    with pytest.raises(ValueError, match="size=32 is not allowed; the digits are 8 x 8"):
        load_images("digits", size=32)
    with pytest.raises(ValueError, match="go together"):
        load_images("cifar10", train_file="a.parquet")
    Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="has the columns text; needed are image and label"):
        load_images("cifar10", str(tmp_path / "t.parquet"), str(tmp_path / "t.parquet"))


def test_a_folder_of_images_is_loaded_by_its_class_names(tmp_path):
    for split in ("train", "test"):
        for name, color in (("cat", 10), ("dog", 200)):
            folder = tmp_path / "pets" / split / name
            folder.mkdir(parents=True)
            for i in range(3):
                Picture.new("RGB", (50, 60), (color, i, 0)).save(folder / f"{i}.png")
    data = load_images(str(tmp_path / "pets"))
    assert data.labels == ["cat", "dog"]
    assert (len(data.train), len(data.test), data.size) == (6, 6, 224)
    assert sorted(data.train.labels.tolist()) == [0, 0, 0, 1, 1, 1]


def test_sources_are_pinned_to_a_commit():
    for source in SOURCES.values():
        assert len(source.revision) == 40
        assert int(source.revision, 16)
        assert len(source.mean) == len(source.std) == source.channels


@pytest.mark.parametrize("augmentation", ["none", "flip-crop", "rand-augment"])
def test_augmentation_is_of_the_training_images_and_follows_seed_epoch_and_index(augmentation):
    """And neither takes from torch's global state nor depends on it: a loader draws ahead of the training."""
    none = augmentation == "none"

    def drawn(seed, epoch, order=range(10)):
        data = load_images("digits", augmentation=augmentation, max_train=20, max_test=10, seed=seed)
        assert (len(data.train), len(data.test)) == (20, 10)
        data.train.set_epoch(epoch)
        train = {i: data.train[i]["pixel_values"] for i in order}
        return torch.stack([train[i] for i in range(10)]), torch.stack([row["pixel_values"] for row in data.test])

    torch.manual_seed(0)
    state = torch.get_rng_state()
    train, test = drawn(1, 0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(drawn(1, 0, reversed(range(10)))[0], train)
    assert torch.equal(drawn(2, 0)[0], train) == none
    assert torch.equal(drawn(1, 1)[0], train) == none
    assert torch.equal(drawn(2, 1)[1], test)
    rows = load_images("digits", augmentation=augmentation, max_train=20).train
    rows.images = rows.images[:1].expand(20, -1, -1, -1)
    assert all(torch.equal(rows[i]["pixel_values"], rows[0]["pixel_values"]) for i in range(1, 20)) == none


def test_a_part_of_a_set_sorted_by_label_has_every_label(tmp_path):
    rows = [(png((i, i, i)), label) for label in range(10) for i in range(20)]
    parts = [load_images("cifar10", *files(tmp_path, rows, rows), max_train=60, max_test=60) for _ in range(2)]
    for rows in (parts[0].train, parts[0].test):
        assert len(rows) == 60
        assert len(set(rows.labels.tolist())) == 10
    assert torch.equal(parts[0].train.images, parts[1].train.images)


def test_transforms_keep_shape_and_normalize():
    image = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    out = make_transform(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "none")(image)
    assert out.dtype == torch.float32
    assert torch.equal(out, torch.full((3, 32, 32), 2.0))


# Published counts with 1,000 classes (timm's and torchvision's tables), in millions.
PUBLISHED = {
    "resnet18": 11.69, "resnet34": 21.80, "resnet50": 25.56, "resnet101": 44.55, "densenet121": 7.98, "vgg11": 132.86,
    "vgg11_bn": 132.87, "vit-tiny": 5.72, "tinyvit-5m": 5.39, "tinyvit-11m": 11.00, "tinyvit-21m": 21.20,
    "swin-t": 28.29, "swin-s": 49.61, "convnext-t": 28.59,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    import timm

    with torch.device("meta"):
        model = timm.create_model(ALIASES.get(name, name), num_classes=1000)
    assert round(parameter_count(model) / 1e6, 2) == pytest.approx(PUBLISHED[name], abs=0.011)


# What the stem for 32x32 and 10 classes leaves; ResNet-18's 11,173,962 is the number of the CIFAR literature.
SMALL = {
    "mlp": 1_841_162, "resnet18": 11_173_962, "resnet34": 21_282_122, "densenet121": 6_956_426, "vgg11": 28_144_010,
    "vit-micro": 108_554, "resnet-micro": 318_186,
    "vit-tiny": 5_362_762, "tinyvit-5m": 5_074_974, "swin-t": 27_505_108, "convnext-t": 27_861_514,
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_small_images_keep_enough_pixels_and_the_model_reloads(name, tmp_path):
    model = classifier(name, 32, 3, [str(i) for i in range(10)], (0.5,) * 3, (0.25,) * 3).eval()
    assert parameter_count(model) == SMALL[name]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = model(pixel_values=images).logits
    assert logits.shape == (2, 10)
    assert not torch.allclose(logits[0], logits[1])
    from transformers import AutoModelForImageClassification

    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert model.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    with (
        torch.no_grad()
    ):  # equal weights at other addresses are added up in another order: 7e-7 for one of the networks
        torch.testing.assert_close(again(pixel_values=images).logits, logits, rtol=1e-5, atol=1e-5)
    assert again.config.id2label[3] == "3"


@pytest.mark.parametrize("size", [8, 28, 32, 64, 224])
@pytest.mark.parametrize("name", ["mlp", "resnet18", "vit-tiny", "convnext-t"])
def test_every_size_has_an_architecture(name, size):
    timm_name, arguments = architecture(name, size, 1)
    assert arguments.get("in_chans", 1) == 1
    assert timm_name.endswith("_small_images") == (name in SMALL_STEMS and size < 112)


def test_weights_are_timms_own_initialisation_and_follow_the_seed():
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(classifier("resnet18", 32, 3, ["a", "b"], (0.5,) * 3, (0.25,) * 3).timm_model)
    assert torch.equal(models[0].conv1.weight, models[1].conv1.weight)
    assert not torch.equal(models[0].conv1.weight, models[2].conv1.weight)
    # transformers' wrapper draws from N(0, 0.02); timm's residual branches end in a norm of weight zero.
    assert not models[0].layer1[0].bn2.weight.any()
    assert models[0].layer1[0].conv1.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)


def test_unknown_architectures_are_refused():
    with pytest.raises(ValueError, match="there is no architecture 'resnet19'; names are resnet18, "):
        architecture("resnet19", 32, 3)


def test_recipes_name_known_models_data_and_optimizers():
    from agr_hf import list_optimizers

    for recipe in IMAGE_RECIPES.values():
        assert recipe["optim"] in list_optimizers()
        assert recipe["dataset_name"] in SOURCES
        architecture(recipe["model_name"], SOURCES[recipe["dataset_name"]].size, 3)


def test_workers_that_outlive_an_epoch_augment_the_next_one_otherwise():
    rows = load_images("digits", augmentation="flip-crop", max_train=16).train
    loader = DataLoader(rows, batch_size=16, num_workers=1, persistent_workers=True)
    drawn = []
    for epoch in (0, 1, 0):
        rows.set_epoch(epoch)
        drawn += [batch["pixel_values"] for batch in loader]
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


def test_how_many_rows_the_test_split_has_is_known(tmp_path):
    good = [(png((i, i, i)), 0) for i in range(5)]
    data = load_images("cifar10", *files(tmp_path, good, [*good, ({"bytes": b"no image", "path": None}, 0)]))
    assert (len(data.test), data.test_rows) == (5, 6)
    data = load_images("cifar10", *files(tmp_path, good), max_test=3)
    assert (len(data.test), data.test_rows) == (3, 5)
    digits = load_images("digits", max_test=1000)
    assert len(digits.test) == digits.test_rows == 360
