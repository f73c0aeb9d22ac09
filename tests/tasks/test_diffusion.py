"""The network of the paper, images that are none, samples, and the Frechet distance against closed forms."""

import logging
import math
from pathlib import Path

import evaluate
import numpy
import pytest
import torch
from PIL import Image
from torch import nn

from agr_hf.metrics import metric_path
from agr_hf.tasks import frechet
from agr_hf.tasks.diffusion import (
    batch_generator,
    ddpm_loss,
    ddpm_scheduler,
    make_unet,
    sample_images,
    write_grid,
)
from agr_hf.tasks.unlabelled_images import load_unlabelled_images

SHARED = Path(__file__).parents[3] / "shared/data"


# The network and the schedule ----------------------------------------------------------------------------------------


def test_the_cifar10_network_has_the_published_number_of_parameters():
    """35.7 million (Ho et al., appendix B); 35,746,307 is that of google/ddpm-cifar10-32."""
    with torch.device("meta"):
        unet = make_unet("ddpm-cifar10", 32, 3)
    count = unet.num_parameters()
    assert count == 35_746_307
    assert round(count / 1e6, 1) == 35.7
    # Attention of one head, twice in the second level down and three times up, and in the middle.
    attention = [module for module in unet.modules() if type(module).__name__ == "Attention"]
    assert len(attention) == 2 + 3 + 1
    assert {module.heads for module in attention} == {1}


@pytest.mark.parametrize(("name", "size", "channels"), [("small", 32, 3), ("tiny", 8, 1)])
def test_small_networks_give_noise_of_the_images_shape(name, size, channels):
    unet = make_unet(name, size, channels)
    images = torch.randn(2, channels, size, size)
    assert unet(images, torch.tensor([0, 999])).sample.shape == images.shape


def test_a_network_that_does_not_fit_is_refused_with_a_way_out():
    with pytest.raises(ValueError, match="the names are ddpm-cifar10, small, tiny"):
        make_unet("large", 32, 3)
    with pytest.raises(ValueError, match="halves images 3 times: a size of 28 does not go; pass a multiple of 8"):
        make_unet("small", 28, 1)


def test_the_schedule_is_that_of_the_paper():
    scheduler = ddpm_scheduler()
    betas = torch.linspace(1e-4, 0.02, 1000)
    torch.testing.assert_close(scheduler.betas, betas)
    assert scheduler.config["variance_type"] == "fixed_large"
    assert scheduler.config["clip_sample"]


# The loss ------------------------------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """Predicts zero, and keeps what it was shown."""

    def forward(self, noisy, timesteps):
        self.noisy, self.timesteps = noisy, timesteps
        return type("Output", (), {"sample": torch.zeros_like(noisy)})


def test_loss_of_predicting_zero_is_one():
    """The mean of 256 * 64 squared standard normals: its deviation is sqrt(2 / 16384) = 0.011."""
    images = torch.zeros(256, 1, 8, 8, dtype=torch.uint8)
    loss = ddpm_loss(Recorder(), ddpm_scheduler(), images, batch_generator(0, 0, 0), flip=False)
    assert abs(loss.item() - 1) < 5 * math.sqrt(2 / 16384)


def test_images_are_scaled_to_minus_one_to_one_and_noised_by_equation_4():
    """Two constant images under the same noise differ by 2 sqrt(alpha_bar)."""
    recorder, seen = Recorder(), []
    for value in (0, 255):
        images = torch.full((64, 1, 8, 8), value, dtype=torch.uint8)
        ddpm_loss(recorder, ddpm_scheduler(), images, batch_generator(0, 0, 0), flip=False)
        seen.append(recorder.noisy)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[recorder.timesteps]
    expected = (2 * alpha_bar.sqrt()).view(-1, 1, 1, 1).expand_as(seen[0])
    torch.testing.assert_close(seen[1] - seen[0], expected, atol=1e-5, rtol=1e-5)


def test_half_of_the_images_are_mirrored():
    """A left half of white: where it is bright after subtracting the same noise tells which images were turned."""
    images = torch.zeros(1000, 1, 8, 8, dtype=torch.uint8)
    recorder = Recorder()
    ddpm_loss(recorder, ddpm_scheduler(), images, batch_generator(0, 0, 0), flip=True)
    noise = recorder.noisy
    images[..., :4] = 255
    ddpm_loss(recorder, ddpm_scheduler(), images, batch_generator(0, 0, 0), flip=True)
    image = recorder.noisy - noise
    mirrored = image[..., 4:].mean((1, 2, 3)) > image[..., :4].mean((1, 2, 3))
    assert 420 <= mirrored.sum() <= 580  # 500 +- 5 deviations of a fair coin


def test_draws_depend_on_seed_batch_and_process_and_on_nothing_else():
    def draw(*key):
        return torch.rand(4, generator=batch_generator(*key)).tolist()

    one = draw(0, 1, 2)
    torch.rand(7)
    assert draw(0, 1, 2) == one
    assert (
        len({tuple(draw(*key)) for key in ((0, 1, 2), (1, 1, 2), (0, 2, 1), (0, 0, 2), (0, 1, 0), (2**40, 1, 2))}) == 6
    )


# Samples -------------------------------------------------------------------------------------------------------------


def test_samples_follow_the_seed_and_leave_the_global_state_alone():
    unet = make_unet("tiny", 8, 1)
    state = torch.get_rng_state()
    one = sample_images(unet, 3, steps=2, seed=5, batch_size=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.shape == (3, 1, 8, 8)
    assert one.dtype == torch.uint8
    assert torch.equal(sample_images(unet, 3, steps=2, seed=5, batch_size=2), one)
    assert not torch.equal(sample_images(unet, 3, steps=2, seed=6, batch_size=2), one)
    with pytest.raises(ValueError, match="steps=1001 is not allowed; it must be 1 to 1000"):
        sample_images(unet, 1, steps=1001)
    with pytest.raises(ValueError, match="count=0 is not allowed"):
        sample_images(unet, 0)


def test_a_grid_holds_every_image_enlarged(tmp_path):
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 8, 8) * 50
    write_grid(images, tmp_path / "new/grid.png")
    grid = numpy.asarray(Image.open(tmp_path / "new/grid.png"))
    assert grid.shape == (2 * 34 + 2, 3 * 34 + 2, 3)  # two rows of three, of 32 pixels and a border of 2
    assert [grid[18 + 34 * (i // 3), 18 + 34 * (i % 3), 0] for i in range(5)] == [0, 50, 100, 150, 200]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["grid.png"]


# Images --------------------------------------------------------------------------------------------------------------


def encoded(value, size=(8, 8), mode="RGB"):
    import io

    stream = io.BytesIO()
    Image.new(mode, size, value).save(stream, format="PNG")
    return stream.getvalue()


def parquet(path, rows, column="image"):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"label": list(range(len(rows))), column: rows}), path)
    return path


def test_digits_are_all_there():
    images = load_unlabelled_images("digits")
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.uint8
    assert (images.min(), images.max()) == (0, 255)


@pytest.mark.parametrize("kind", ["struct", "bytes"])
def test_corrupt_images_of_a_parquet_file_are_counted_and_named(kind, tmp_path, caplog):
    good, cut = encoded((10, 20, 30)), encoded((1, 2, 3))[:-30]
    rows = [good, cut, good, b"no image", None]
    if kind == "struct":
        rows = [{"bytes": row, "path": None} for row in rows]
    with caplog.at_level(logging.WARNING):
        images = load_unlabelled_images(parquet(tmp_path / "train.parquet", rows))
    assert images[:, :, 0, 0].tolist() == [[10, 20, 30]] * 2
    (record,) = caplog.records
    assert "3 of 5 images" in record.getMessage()
    for row in ("row 1", "row 3", "row 4"):
        assert row in record.getMessage()


def test_a_folder_of_images_is_read_in_order_cut_and_resized(tmp_path, caplog):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/2.png").write_bytes(encoded(40, (16, 8), "L"))
    (tmp_path / "1.png").write_bytes(encoded(20, mode="L"))
    (tmp_path / "broken.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no image")
    with caplog.at_level(logging.WARNING):
        images = load_unlabelled_images(tmp_path, size=4)
    assert images[:, 0, 0, 0].tolist() == [20, 40]
    assert images.shape == (2, 1, 4, 4)
    assert "1 of 3 images" in caplog.text
    assert "broken.png" in caplog.text
    assert load_unlabelled_images(tmp_path, size=4, channels=3, max_images=1).shape == (1, 3, 4, 4)


def test_bad_sources_get_sentences(tmp_path):
    with pytest.raises(ValueError, match=r"could not be loaded.*--train_data with a parquet file or a folder.*digits"):
        load_unlabelled_images("cifar10")  # conftest forbids the network
    with pytest.raises(ValueError, match="cannot be read as a parquet file"):
        load_unlabelled_images(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="has no column of encoded images.*its columns are label, text"):
        load_unlabelled_images(parquet(tmp_path / "text.parquet", ["a", "b"], column="text"))
    with pytest.raises(ValueError, match="has no image that can be read"):
        load_unlabelled_images(parquet(tmp_path / "broken.parquet", [b"x", b"y"]))
    with pytest.raises(ValueError, match="row 0 of .* is 16x8 and not square; pass size"):
        load_unlabelled_images(parquet(tmp_path / "wide.parquet", [encoded(0, (16, 8), "L")]))
    with pytest.raises(ValueError, match="channels=2 is not allowed"):
        load_unlabelled_images("digits", channels=2)


# Frechet distance ----------------------------------------------------------------------------------------------------


def stats(mean, covariance):
    mean, covariance = torch.tensor(mean, dtype=torch.float64), torch.tensor(covariance, dtype=torch.float64)
    return frechet.Statistics(mean, covariance, 100)


def test_distance_of_gaussians_equals_the_closed_form():
    # One dimension: (m1 - m2)^2 + (s1 - s2)^2.
    assert frechet.frechet_distance(stats([1.0], [[4.0]]), stats([4.0], [[25.0]])) == pytest.approx(9 + 9, rel=1e-12)
    # Diagonal: the sum of it. 1 + (1 - 3)^2 + (2 - 1)^2.
    one, other = stats([0.0, 1.0], [[1.0, 0], [0, 4]]), stats([1.0, 1.0], [[9.0, 0], [0, 1]])
    assert frechet.frechet_distance(one, other) == pytest.approx(1 + 4 + 1, rel=1e-12)
    # The same variances on swapped axes: 2 (2 - 1)^2.
    one, other = stats([0.0, 0.0], [[1.0, 0], [0, 4]]), stats([0.0, 0.0], [[4.0, 0], [0, 1]])
    assert frechet.frechet_distance(one, other) == pytest.approx(2, rel=1e-12)
    # 2x2 without common axes: tr sqrt(C1 C2) = sqrt(tr(C1 C2) + 2 sqrt(det C1 det C2)).
    a, b = numpy.array([[2.0, 1], [1, 3]]), numpy.array([[5.0, -2], [-2, 1]])
    root = math.sqrt(numpy.trace(a @ b) + 2 * math.sqrt(numpy.linalg.det(a) * numpy.linalg.det(b)))
    expected = numpy.trace(a) + numpy.trace(b) - 2 * root
    found = frechet.frechet_distance(stats([0.0, 0], a.tolist()), stats([0.0, 0], b.tolist()))
    assert found == pytest.approx(expected, rel=1e-12)


def test_distance_of_samples_equals_hand_computed_values():
    # Means 1 and 4, unbiased variances 2 and 8: 9 + (sqrt 2 - sqrt 8)^2 = 11.
    one, other = (
        frechet.compute_statistics(torch.tensor([[0.0], [2.0]])),
        frechet.compute_statistics(torch.tensor([[2.0], [6.0]])),
    )
    assert frechet.frechet_distance(one, other) == pytest.approx(11, rel=1e-12)


def test_equal_sets_are_at_distance_zero_even_with_singular_covariances():
    """10 images, 64 features, far from the origin: a root of the product C1 C2 errs by 1e-5 here."""
    features = 100 + torch.randn(10, 64, dtype=torch.float64)
    one = frechet.compute_statistics(features)
    assert 0 <= frechet.frechet_distance(one, one) < 1e-10
    moved = frechet.compute_statistics(features + 1)
    assert frechet.frechet_distance(one, moved) == pytest.approx(64, abs=1e-9)


def test_distance_agrees_with_scipys_root_of_the_product():
    from scipy.linalg import sqrtm

    one, other = torch.randn(200, 16, dtype=torch.float64), torch.randn(300, 16, dtype=torch.float64) * 2 + 1
    a, b = numpy.cov(one.numpy(), rowvar=False), numpy.cov(other.numpy(), rowvar=False)
    expected = ((one.mean(0) - other.mean(0)) ** 2).sum().item() + numpy.trace(a + b - 2 * sqrtm(a @ b).real)
    found = frechet.frechet_distance(frechet.compute_statistics(one), frechet.compute_statistics(other))
    assert found == pytest.approx(expected, rel=1e-9)


def test_bad_features_get_sentences():
    with pytest.raises(ValueError, match="must be .n, d. with n of at least 2"):
        frechet.compute_statistics(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="NaN or inf"):
        frechet.compute_statistics(torch.tensor([[1.0], [math.nan]]))
    with pytest.raises(ValueError, match="1 features cannot be compared with 2"):
        frechet.frechet_distance(stats([0.0], [[1.0]]), stats([0.0, 0], [[1.0, 0], [0, 1]]))


def test_the_evaluate_module_loads_offline_and_gives_the_same():
    metric = evaluate.load(metric_path("frechet_distance"))
    assert metric.compute(predictions=[[0.0], [2.0]], references=[[2.0], [6.0]])["frechet_distance"] == pytest.approx(
        11
    )
    ours, theirs = numpy.random.default_rng(0).normal(size=(2, 50, 4))
    expected = frechet.frechet_distance(*(frechet.compute_statistics(torch.from_numpy(x)) for x in (ours, theirs)))
    assert metric.compute(predictions=ours, references=theirs)["frechet_distance"] == pytest.approx(expected)
    given = {"mean": theirs.mean(0), "covariance": numpy.cov(theirs, rowvar=False)}
    found = metric.compute(predictions=ours, references=ours, **given)
    assert found["frechet_distance"] == pytest.approx(expected)
    with pytest.raises(ValueError, match="go together"):
        metric.compute(predictions=ours, references=ours, mean=ours.mean(0))


# Statistics that are kept, and networks by name ----------------------------------------------------------------------


def test_statistics_are_computed_once_for_the_same_images(tmp_path, caplog):
    calls = []

    def forward(images):
        calls.append(len(images))
        return images.flatten(1)

    network = frechet.FeatureNetwork("counted", "counted-1", forward)
    images = torch.randint(0, 256, (20, 1, 2, 2), dtype=torch.uint8)
    first = frechet.image_statistics(network, images, cache_dir=tmp_path)
    again = frechet.image_statistics(network, images, cache_dir=tmp_path)
    assert calls == [20]
    assert torch.equal(first.covariance, again.covariance)
    assert torch.equal(first.mean, again.mean)
    assert again.count == 20
    frechet.image_statistics(network, images.flip(0), cache_dir=tmp_path)  # other images
    other = frechet.FeatureNetwork("counted", "counted-2", forward)
    frechet.image_statistics(other, images, cache_dir=tmp_path)  # other weights
    assert calls == [20, 20, 20]
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:20])  # what a full disk leaves, were they not replaced whole
    repaired = frechet.image_statistics(network, images, cache_dir=tmp_path)
    assert torch.equal(repaired.mean, first.mean)
    assert "computed again" in caplog.text


def test_statistics_of_something_else_are_refused(tmp_path):
    frechet.save_statistics(stats([0.0], [[1.0]]), tmp_path / "s.safetensors", "resnet")
    assert frechet.load_statistics(tmp_path / "s.safetensors", "resnet").count == 100
    with pytest.raises(ValueError, match="holds statistics of 'resnet', not of 'vgg'"):
        frechet.load_statistics(tmp_path / "s.safetensors", "vgg")


def small_network():
    """Named by the tests as PACKAGE.MODULE:FACTORY."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_a_distance_is_reported_under_the_name_of_its_network(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    digits = load_unlabelled_images("digits")
    network = frechet.feature_network("test_diffusion:small_network")
    near = frechet.frechet_metrics(digits[:500], digits[500:1000], network)
    far = frechet.frechet_metrics(torch.randint_like(digits[:500], 256), digits[500:1000], network)
    assert set(near) == {"frechet_distance_small_network", "samples", "references"}
    assert far["frechet_distance_small_network"] > 10 * near["frechet_distance_small_network"] > 0
    with pytest.raises(ValueError, match="there is no feature network 'inception'"):
        frechet.feature_network("inception")
    with pytest.raises(ValueError, match="cannot be imported"):
        frechet.feature_network("test_diffusion:none_such")
    with pytest.raises(ValueError, match="could not be loaded"):
        frechet.feature_network("timm:resnet18.a1_in1k")
    with pytest.raises(ValueError, match="one vector for each"):
        frechet.image_features(frechet.FeatureNetwork("flat", "flat", lambda images: images), digits[:2])


def test_resnet20_tells_photographs_from_noise():
    weights = SHARED / "models/resnet20-cifar10.th"
    photographs = SHARED / "cifar10/test.parquet"
    if not weights.exists() or not photographs.exists():
        pytest.skip("needs ../shared/data beside the checkout: models/resnet20-cifar10.th and cifar10/test.parquet")
    images = load_unlabelled_images(photographs, max_images=600)
    network = frechet.feature_network(f"resnet20:{weights}")
    near = frechet.frechet_metrics(images[:300], images[300:], network)["frechet_distance_resnet20"]
    far = frechet.frechet_metrics(torch.randint_like(images[:300], 256), images[300:], network)
    assert near < 3  # 0.17 for 1,017 against 8,068 of them
    assert far["frechet_distance_resnet20"] > 30  # 51 there


def test_weights_that_are_none_are_refused(tmp_path):
    (tmp_path / "x.th").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read as weights of ResNet-20"):
        frechet.feature_network(f"resnet20:{tmp_path / 'x.th'}")
    torch.save({"conv": torch.zeros(1)}, tmp_path / "y.th")
    with pytest.raises(ValueError, match="holds no ResNet-20"):
        frechet.feature_network(f"resnet20:{tmp_path / 'y.th'}")


def test_fid_without_inceptions_weights_says_where_to_put_them(tmp_path, monkeypatch):
    pytest.importorskip("torch_fidelity", reason="FID and IS need torch-fidelity, which is not installed")

    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"Inception's weights.*no route.*download https://.*--features"):
        frechet.inception_metrics(images, images, cache_dir=tmp_path)


def test_fid_without_torch_fidelity_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"pip install torch-fidelity.*--features"):
        frechet.inception_metrics(images, images, cache_dir=tmp_path)
