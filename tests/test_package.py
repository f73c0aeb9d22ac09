"""A wheel holds what a checkout has: nothing in pyproject.toml finds the packages by itself."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

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
