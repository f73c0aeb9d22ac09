"""The functions behind `agr-hf app`, its interface, and the Space. tests/test_app_in_browser.py opens it."""

import re
import socket
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from test_report import EVIL, comparison

from agr_hf.cli import main
from agr_hf.errors import UserError
from agr_hf.experiments import any_model, inspect, views
from agr_hf.experiments.app import build_app, run_app
from agr_hf.experiments.views import (
    DEMO_MODEL,
    find_comparisons,
    find_models,
    show_layers,
    show_report,
    show_trajectories,
)
from agr_hf.tasks.digits import digits_model
from agr_hf.tasks.functions import FUNCTIONS, sample_heights, trajectory

ROOT = Path(__file__).parents[1]
SMALL = {"hidden_size": 24, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2}
needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed; the extra app has it")


def pictures(html):
    """The charts in some HTML; malformed SVG fails here."""
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html) if "aria-label" in svg]


def test_each_chosen_optimizer_is_drawn_to_its_last_point():
    html = show_trajectories("rosenbrock", [("adam", 0.03), ("", 0.1), ("adal", 0.1)], 50)
    (picture,) = pictures(html)
    assert len(picture.findall(".//polyline")) == 2
    end = trajectory(FUNCTIONS["rosenbrock"], "adal", 0.1, 50)[-1]
    assert f"AdaL, learning rate 0.1 ends at ({end[0]:.3g}, {end[1]:.3g})" in picture.attrib["aria-label"]
    distance = (end - torch.ones(2)).norm().item()
    assert f"{distance:.2g}</td>" in html


def test_a_line_is_animated_from_its_start_to_its_end_or_drawn_at_once():
    (moving,) = pictures(show_trajectories("rastrigin", [("sgd", 0.1)], 30, animated=True))
    (still,) = pictures(show_trajectories("rastrigin", [("sgd", 0.1)], 30, animated=False))
    values = [float(value) for value in moving.find(".//polyline/animate").attrib["values"].split(";")]
    assert (values[0], values[-1]) == (1, 0)
    assert values == sorted(values, reverse=True)
    assert still.find(".//animate") is None
    line = still.find(".//polyline").attrib
    assert len(line["points"].split()) == 31
    assert "stroke-dasharray" not in line


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=lambda function: function.name)
def test_contour_lines_keep_the_height_of_their_level(function):
    lines = views._contour_lines(function)
    assert len(lines) > 10
    heights = sample_heights(function, 20)[2]
    allowed = 0.05 * (heights.max() - heights.min())  # lines are straight between the points of the grid
    for line in lines[::7]:
        found = function.value(torch.tensor(line, dtype=torch.float64))
        found = found.add(1e-3).log() if function.logarithmic else found
        assert found.max() - found.min() < allowed


def test_a_run_that_diverges_is_drawn_as_far_as_it_is_finite(monkeypatch):
    points = torch.tensor([[-2.0, 2.0], [1e30, 0.0], [float("nan"), 0.0], [1.0, 1.0]], dtype=torch.float64)
    points[-1] = float("inf")
    monkeypatch.setattr(views, "trajectory", lambda *_: points)
    html = show_trajectories("rosenbrock", [("sgd", 1.0)], 3, animated=False)
    (picture,) = pictures(html)
    assert len(picture.find(".//polyline").attrib["points"].split()) == 2
    assert "nan" not in picture.find(".//polyline").attrib["points"]
    assert "diverged</td>" in html


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("himmelblau", [("adam", 0.1)], 10), "there is no function 'himmelblau'; choose one of rastrigin, rosenbrock"),
        (("rosenbrock", [("adam", 0.1)], 1001), "1001 steps are not allowed; choose 1 to 1,000"),
        (("rosenbrock", [("adam", 0.1)], float("nan")), "nan steps are not allowed"),
        (("rosenbrock", [("", 0.1), (None, None)], 10), "no optimizer is chosen"),
        (("rosenbrock", [("adam", None)], 10), "Adam has no learning rate; give a number above 0"),
        (("rosenbrock", [("adam", -1)], 10), "Adam has the learning rate -1"),
        (("rosenbrock", [("os:system", 1)], 10), "there is no optimizer 'os:system'"),
    ],
)
def test_an_input_that_is_not_allowed_gets_a_sentence(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        show_trajectories(*arguments)


def test_the_layers_of_a_saved_model_are_those_that_inspect_measures(tmp_path):
    digits_model(**SMALL).save_pretrained(tmp_path / "models/mine")
    assert find_models(tmp_path) == ["models/mine"]
    done = []
    html = show_layers(tmp_path, "models/mine", 2, 4, lambda: done.append(1))
    torch.manual_seed(0)
    model = any_model.load_model(str(tmp_path / "models/mine"))
    torch.manual_seed(0)
    layers = inspect.measure(model, any_model.random_batches(model, 4, 2))
    for layer in layers:
        assert layer.name in html
        assert f"{layer.effect:.1e}</td>" in html
    assert "Random batches have random labels" in html
    assert done == [1, 1]
    assert len(pictures(html)) == 1


def test_the_demo_model_is_measured_on_digits_and_always_alike(tmp_path):
    first, again = (show_layers(tmp_path, DEMO_MODEL, 2, 4) for _ in range(2))
    assert first == again
    assert "2 batches of digits of 4" in first
    assert "exactly zero" not in first  # it has been trained
    assert "Random batches" not in first


def test_weights_in_a_pickle_are_not_loaded(tmp_path):
    model = digits_model(**SMALL)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled/pytorch_model.bin")
    assert isinstance(any_model.load_model(str(tmp_path / "pickled")), type(model))
    with pytest.raises(UserError, match="safetensors"):
        any_model.load_model(str(tmp_path / "pickled"), safetensors_only=True)
    assert find_models(tmp_path) == []


def test_a_model_that_is_too_large_is_refused_before_its_weights_are_read(tmp_path):
    digits_model(**SMALL).save_pretrained(tmp_path / "mine")
    (tmp_path / "mine/model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"parameters, and at most 100 are allowed here; run agr-hf inspect"):
        any_model.load_model(str(tmp_path / "mine"), max_parameters=100)
    with pytest.raises(UserError, match=r"'resnet18' has 11,689,512 parameters"):
        any_model.load_model("resnet18", max_parameters=1e6)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc", "models/../../outside", "outside", ".hidden", "", "https://example.org/x"]
)
def test_no_other_local_folder_is_read_as_a_model(name, tmp_path, monkeypatch):
    for folder in ("outside", "root/models", "root/.hidden"):
        digits_model(**SMALL).save_pretrained(tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is not allowed; choose a model from the list"):
        show_layers(tmp_path / "root", name)


def test_a_report_is_shown_in_a_frame_without_scripts(tmp_path):
    comparison(tmp_path / "runs/first", script=EVIL)
    assert find_comparisons(tmp_path) == ["runs/first"]
    html = show_report(tmp_path, "runs/first")
    assert 'sandbox=""' in html
    assert "<script" not in html
    assert "&amp;lt;script" in html  # escaped for the page in the frame, and again for the attribute
    assert "95% interval +0.65 to +1.15" in html


@pytest.mark.parametrize("name", ["../outside", "/etc", "inside/../../outside", None, "", "nothing"])
def test_no_comparison_outside_of_the_folder_is_read(name, tmp_path):
    comparison(tmp_path / "outside")
    comparison(tmp_path / "root/inside")
    with pytest.raises(UserError, match="below the folder of the app; choose one from the list"):
        show_report(tmp_path / "root", name)


def test_links_and_names_that_lead_out_of_the_folder_are_refused(tmp_path):
    comparison(tmp_path / "outside")
    root = tmp_path / "root"
    comparison(root / "linked")
    (root / "linked/runs/other").symlink_to(tmp_path / "outside/runs")
    (root / "whole").symlink_to(tmp_path / "outside")
    comparison(root / "named", cells=[{"optimizer": "adamw", "settings": {}, "folder": "../../../outside/runs/adamw"}])
    assert find_comparisons(root) == ["linked", "named"]
    with pytest.raises(UserError, match="leads out of the folder of the app"):
        show_report(root, "linked")
    with pytest.raises(UserError, match="must be a folder's name"):
        show_report(root, "named")


def test_a_comparison_that_compare_did_not_write_gets_a_sentence(tmp_path):
    comparison(tmp_path / "odd", comparisons=[{"optimizer": 3}])
    with pytest.raises(
        UserError, match="odd holds no finished comparison of agr-hf compare .Field 'baseline' is missing"
    ):
        show_report(tmp_path, "odd")


def test_a_missing_gradio_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install '.[app]'" in error


@needs_gradio
def test_a_missing_folder_is_one_sentence(capsys):
    assert main(["app", "nowhere"]) == 1
    assert capsys.readouterr().err == (
        "agr-hf: there is no folder 'nowhere'; give one with models and comparisons, or none for this folder\n"
    )


@needs_gradio
def test_a_port_in_use_is_one_sentence(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert main(["app", str(tmp_path), "--port", str(port)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"agr-hf: port {port} is in use; choose another one with --port")


@needs_gradio
def test_the_interface_computes_one_thing_at_a_time_and_has_no_public_functions(tmp_path):
    built = build_app(tmp_path)
    assert built._queue.max_size == 16
    assert built._queue.default_concurrency_limit == 1
    assert all(function.api_visibility == "private" for function in built.fns.values())


def test_the_space_starts_this_app_with_the_extra_of_the_package():
    from huggingface_hub import metadata_load

    header = metadata_load(ROOT / "space/README.md")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = (ROOT / "space/requirements.txt").read_text().split("\n")
    assert f"{project['name']}[app]" in requirements
    (gradio,) = [text for text in project["optional-dependencies"]["app"] if text.startswith("gradio")]
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    assert header["sdk"] == "gradio"
    assert header["sdk_version"] in Requirement(gradio).specifier
    assert header["python_version"] in SpecifierSet(project["requires-python"])
    assert header["license"] == project["license"].lower()
    assert len(header["short_description"]) <= 60  # the Hub's limit
    source = (ROOT / "space" / header["app_file"]).read_text()
    namespace = {"__name__": "space", "__file__": str(ROOT / "space/app.py")}
    exec(compile(source, header["app_file"], "exec"), namespace)
    assert namespace["run_app"] is run_app
