"""`agr-hf inspect`: local folders, timm, datasets; its numbers against Psi itself."""

import importlib.util
import json
import math
import sys

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForPreTraining,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

from agr_hf import agr
from agr_hf.cli import main
from agr_hf.experiments import any_model
from agr_hf.experiments import inspect as inspect_module
from agr_hf.experiments.any_model import compute_loss, random_batches
from agr_hf.experiments.inspect import Layer, measure, verdict
from agr_hf.tasks.classifiers import classifier
from agr_hf.tasks.digits import digits_model, load_digits


def inspected(tmp_path, capsys, *arguments):
    assert main(["inspect", *map(str, arguments), "--output", str(tmp_path / "out"), "--batches", "3"]) == 0
    assert (tmp_path / "out/inspect.png").read_bytes().startswith(b"\x89PNG")
    return capsys.readouterr().out, json.loads((tmp_path / "out/inspect.json").read_text())


def test_a_timm_architecture(tmp_path, capsys):
    out, results = inspected(tmp_path, capsys, "resnet18", "--batch-size", 2, "--rows", 3)
    layers = {layer["name"]: layer for layer in results["layers"]}
    assert len(layers) == 21
    assert 0 < layers["fc.weight"]["effect"] < 0.01
    # timm's residual branches begin behind weights of zero, and get gradients after some steps.
    assert all(layer["zeros"] < 1 for layer in layers.values())
    assert results["steps_before"] == 3
    assert "Measured after 3 steps of AdamW" in out
    assert "more got a gradient" not in out
    assert "and 18 more with less effect" in out


@pytest.mark.parametrize(
    "model",
    [
        lambda: digits_model(hidden_size=24, num_hidden_layers=1, intermediate_size=32, num_attention_heads=2),
        lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=32)),
        lambda: BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)),
        lambda: AlbertForPreTraining(
            AlbertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=16, vocab_size=50, embedding_size=8)
        ),
    ],
    ids=["vit", "gpt2", "bert", "albert"],
)
def test_a_local_folder(model, tmp_path, capsys):
    model().save_pretrained(tmp_path / "model")
    out, results = inspected(tmp_path, capsys, tmp_path / "model")
    assert all(0 <= layer["effect"] < 1 for layer in results["layers"])
    assert "AGR takes" in out
    assert str(tmp_path) not in json.dumps(results)


def test_a_dataset_of_images_in_a_parquet_file(tmp_path, capsys):
    digits = load_digits()["train"]
    from PIL import Image as Picture

    pictures = [Picture.fromarray(((p[0] + 1) * 127).byte().numpy()) for p in digits.pixel_values[:40]]
    rows = {"image": pictures, "label": digits.labels[:40].tolist()}
    features = Features({"image": Image(), "label": Value("int64")})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "digits.parquet")
    digits_model().save_pretrained(tmp_path / "model")
    out, results = inspected(tmp_path, capsys, tmp_path / "model", "--dataset", tmp_path / "digits.parquet")
    assert results["batches"] == "batches of digits.parquet"
    assert "Random batches" not in out


def test_a_folder_of_images_and_no_other(tmp_path, capsys, monkeypatch):
    digits = load_digits()["train"]
    from PIL import Image as Picture

    for place, count in ((tmp_path / "mine", 6), (tmp_path / "here/others", 40)):
        for i in range(count):
            (place / str(i % 2)).mkdir(parents=True, exist_ok=True)
            Picture.fromarray(((digits.pixel_values[i][0] + 1) * 127).byte().numpy()).save(place / f"{i % 2}/{i}.png")
    digits_model().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path / "here")
    _, results = inspected(tmp_path, capsys, tmp_path / "model", "--dataset", tmp_path / "mine", "--batch-size", "2")
    assert results["batches"] == "batches of mine"
    assert results["count"] == 3  # of the eight asked for: it has six images


def test_what_cannot_be_inspected_gets_a_sentence(tmp_path, capsys):
    assert main(["inspect", "nobody/nothing", "--output", str(tmp_path / "out")]) == 1
    assert "'nobody/nothing' is no local folder with a model, no architecture of timm" in capsys.readouterr().err
    digits_model().save_pretrained(tmp_path / "model")
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    arguments = ["inspect", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--dataset", str(tmp_path / "table.csv")]) == 1
    assert "has the columns a, b; this model takes image and label" in capsys.readouterr().err
    assert main([*arguments, "--dataset", str(tmp_path / "none.parquet")]) == 1
    assert f"agr-hf: there is no file '{tmp_path}/none.parquet'\n" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main([*arguments, "--dataset", str(tmp_path / "empty")]) == 1
    assert "empty' cannot be loaded" in capsys.readouterr().err
    (tmp_path / "words.txt").write_text("a word\n")
    assert main([*arguments, "--dataset", str(tmp_path / "words.txt")]) == 1
    assert "has the columns text; this model takes image and label" in capsys.readouterr().err
    with pytest.raises(ValueError, match="ReLU has no"):
        measure(nn.ReLU(), iter([]))


def test_effect_and_noise_are_those_of_the_gradients():
    torch.manual_seed(0)
    model = digits_model(hidden_size=24, num_hidden_layers=1, intermediate_size=32, num_attention_heads=2)
    batches = list(random_batches(model, 4, 5))
    layers = {layer.name: layer for layer in measure(model, iter(batches))}
    grads = []
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        grads.append(model.classifier.weight.grad.double().clone())
    effects = sorted(((agr(g) - g).norm() / g.norm()).item() for g in grads)
    assert layers["classifier.weight"].effect == pytest.approx(effects[2], rel=1e-4)
    mean = sum(grads) / 5
    noise = math.sqrt(sum((g - mean).square().sum() for g in grads) / sum(g.square().sum() for g in grads))
    assert layers["classifier.weight"].noise == pytest.approx(noise, rel=1e-4)


def test_the_verdict_counts_what_it_says():
    layers = [Layer("small", 10, 0.05, 0.1, 0.5, 0.0, 1.0), Layer("large", 10_000, 0.001, 0.01, 0.5, 0.0, 1.0)]
    text = verdict(layers)
    assert "2.5% of the gradient's length in the median layer" in text or "2.6%" in text
    assert "at most 5% (small, 10 weights); 1 of 2 layers lose more than 1%" in text


def test_a_folder_of_transformers_needs_no_timm_and_no_matplotlib(tmp_path, capsys, monkeypatch):
    model = BertForMaskedLM(BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    model.save_pretrained(tmp_path / "model")
    absent = {"timm", "matplotlib"}
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)
    found = importlib.util.find_spec
    for module in (inspect_module, any_model):
        monkeypatch.setattr(module, "find_spec", lambda name: None if name in absent else found(name))
    arguments = ["inspect", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--batches", "2"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "AGR takes" in out
    assert "no picture without matplotlib: pip install matplotlib" in out
    arguments[1] = "resnet18"
    assert main(arguments) == 1
    assert "timm is not installed (pip install timm)" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "package"), [("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")])
def test_a_missing_extra_is_one_sentence(module, package, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["demo", "--output", str(tmp_path / "x"), "--seeds", "1", "--epochs", "1"]) == 1
    assert not list((tmp_path / "x").iterdir())  # before the training
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith(f"agr-hf: {package} is not installed; install it with pip install {package}")
    assert last.endswith('pip install "agr-hf[train]"')


def test_a_module_of_no_extra_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "agr_hf.experiments.inspect", None)
    with pytest.raises(ModuleNotFoundError):
        main(["inspect", "x", "--output", str(tmp_path)])


def test_our_own_networks_for_small_images_are_known(tmp_path, capsys):
    classifier("resnet18", 8, 1, list("0123456789"), (0.3,), (0.4,)).save_pretrained(tmp_path / "model")
    _, results = inspected(tmp_path, capsys, tmp_path / "model", "--batch-size", 2)
    assert len(results["layers"]) == 21


def test_padding_is_no_label():
    model = BertForMaskedLM(BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).eval()
    ids, mask = torch.randint(20, (2, 6)), torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    found = compute_loss(model, {"input_ids": ids, "attention_mask": mask})
    wanted = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    assert found == wanted != model(input_ids=ids, attention_mask=mask, labels=ids).loss


def test_images_are_normalized_as_the_model_was_trained(tmp_path):
    from timm import create_model

    from agr_hf.experiments.any_model import _normalization

    assert _normalization(create_model("resnet18"), "resnet18") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    model = classifier("resnet18", 8, 1, list("01"), (0.3,), (0.4,))
    model.save_pretrained(tmp_path)
    assert [list(part) for part in _normalization(model, str(tmp_path))] == [[0.3], [0.4]]
    assert _normalization(digits_model(), "nowhere/nothing") == ([0.5], [0.25])
