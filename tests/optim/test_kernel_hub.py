"""The folder for the Kernel Hub: built from the package, loaded by `kernels` from a folder and at a locked revision."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from loaded_kernel import take_steps

import agr_hf

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "kernel_hub/build.py"))
REVISION, OTHER = "1" * 40, "2" * 40
needs_kernels = pytest.mark.skipif(
    not (find_spec("kernels") and find_spec("triton")), reason="kernels is not installed: make test-kernels installs it"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return SCRIPT["build"](tmp_path_factory.mktemp("kernel"))


def load(*arguments, **environment):
    """What loaded_kernel.py saw in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("loaded_kernel.py")), *map(str, arguments)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", **environment}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def test_a_variant_holds_every_module_of_the_optimizers_and_no_import_of_the_package(folder):
    modules = {path.relative_to(ROOT / "agr_hf") for path in (ROOT / "agr_hf/optim").rglob("*.py")}
    for backend in ("cpu", "cuda", "rocm", "xpu"):
        variant = folder / "build" / f"torch-{backend}"
        assert modules <= {path.relative_to(variant) for path in variant.rglob("*.py")}
        assert json.loads((variant / "metadata.json").read_text())["backend"] == {"type": backend}
    assert "from ...optim.part import" in (variant / "optim/backends/gpu.py").read_text()


@pytest.mark.parametrize(
    ("source", "depth", "wanted"),
    [
        ("from agr_hf.errors import UserError", 0, "from .errors import UserError"),
        ("def f():\n    from agr_hf.optim.step import S", 1, "def f():\n    from ..optim.step import S"),
        ("from agr_hf import agr", 2, "from ... import agr"),
        ("from agr_hfx import agr", 1, "from agr_hfx import agr"),
    ],
)
def test_imports_are_made_relative(source, depth, wanted):
    assert SCRIPT["make_imports_relative"](source, depth) == wanted


def test_an_import_in_another_form_is_refused():
    with pytest.raises(ValueError, match=r"line 1 imports agr_hf; write it as"):
        SCRIPT["make_imports_relative"]("import agr_hf.optim", 1)


@needs_kernels
def test_a_local_kernel_steps_in_triton_like_the_package(folder):
    found = load("local", LOCAL_KERNELS=f"user/agr-hf={folder}")
    assert found["file"].startswith(str(folder / "build"))
    assert found["version"] == agr_hf.__version__
    assert found["names"] == agr_hf.list_optimizers()
    assert not found["imports_agr_hf"]
    assert found["triton"]["part"] == f"{found['name']}.optim.backends.gpu.GPUPart"
    assert found["lists"]["part"] == f"{found['name']}.optim.backends.lists.ListsPart"
    param = torch.nn.Parameter(torch.linspace(-1, 1, 600).view(20, 30))
    take_steps(agr_hf.AGRAdamW([param], lr=0.1, weight_decay=0.1), param)
    for way in ("triton", "lists"):
        torch.testing.assert_close(torch.tensor(found[way]["param"]), param.detach(), rtol=3e-5, atol=3e-5)


@needs_kernels
def test_a_locked_revision_is_loaded_and_no_other(folder, tmp_path):
    """From a cache of the Hub with two revisions, as a download leaves it."""
    for revision in (REVISION, OTHER):
        snapshot = tmp_path / "cache/kernels--user--agr-hf/snapshots" / revision
        shutil.copytree(folder, snapshot)
        for version in snapshot.rglob("version.py"):
            version.write_text(f'__version__ = "{revision}"\n')
    (tmp_path / "cache/kernels--user--agr-hf/refs").mkdir()
    (tmp_path / "cache/kernels--user--agr-hf/refs/v1").write_text(OTHER)
    from kernels._rust import KernelDependency, KernelLock, KernelLocks, KernelVersion

    locks = {KernelDependency(repo_id="user/agr-hf", version=KernelVersion.Version(1)): KernelLock(commit=REVISION)}
    (tmp_path / "kernels.lock").write_text(KernelLocks(locks=locks).to_json())
    found = load("locked", tmp_path / "kernels.lock", KERNELS_CACHE=str(tmp_path / "cache"))
    assert found["version"] == REVISION
    assert REVISION in found["file"]
