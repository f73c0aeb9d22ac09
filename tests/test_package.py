"""A wheel holds what a checkout has: nothing in pyproject.toml finds the packages by itself."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import agr_hf

ROOT = Path(__file__).parents[1]
FOLDERS = {"agr_hf": "agr_hf", "model_cards": "agr_hf/model_cards", "training_scripts": "agr_hf/training_scripts"}
BUILD = "import setuptools.build_meta as backend; backend.build_wheel('dist')"


def test_the_wheel_has_every_module_template_and_metric_card(tmp_path):
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path)
    sources = {
        f"{packaged}/{path.relative_to(tmp_path / folder).as_posix()}"
        for folder, packaged in FOLDERS.items()
        for path in (tmp_path / folder).rglob("*")
        if path.suffix in (".py", ".jinja", ".typed", ".c", ".h")
        or (folder == "training_scripts" and path.suffix in (".sbatch", ".yaml", ".json"))
        or (folder == "agr_hf" and path.name in ("README.md", "requirements.txt"))
    }
    subprocess.run([sys.executable, "-c", BUILD], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("agr_hf/")}
    packed = {name for name in packed if not name.endswith(".so")}  # is there where there is a compiler
    assert packed == sources
    assert "agr_hf/model_cards/card.md.jinja" in packed
    assert "agr_hf/training_scripts/train_ddpm.py" in packed


def test_the_version_is_the_same_everywhere():
    assert f"\nversion: {agr_hf.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {agr_hf.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_sdist_builds_the_extension(tmp_path):
    """Headers that are missing in it would be noticed by those only who have no wheel."""
    shutil.copytree(
        ROOT, tmp_path / "checkout", ignore=shutil.ignore_patterns(".*", "__pycache__", "*.so", "build", "dist")
    )
    build = "import setuptools.build_meta as backend; backend.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path / "checkout", check=True, capture_output=True)
    (sdist,) = (tmp_path / "checkout/dist").glob("*.tar.gz")
    with tarfile.open(sdist) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "agr_hf/optim/backends").glob("*.[ch]")}
    assert sources <= names
