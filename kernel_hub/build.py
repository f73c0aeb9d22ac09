"""Write the optimizers as a folder that the `kernels` library loads: `python kernel_hub/build.py build/kernel`.

The folder has a variant without compiled code for each kind of device. A variant is the package's `optim` with relative
imports, because `kernels` loads it under another name, beside an installed agr_hf or without one. On a GPU a step runs in
Triton kernels, which Triton compiles where they run; on the CPU it uses operations over lists of tensors.
"""

import argparse
import ast
import hashlib
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "agr_hf"
BACKENDS = ("cpu", "cuda", "rocm", "xpu")
VERSION = 1  # of the interface; `get_kernel(..., version=1)` takes the branch v1
IMPORT = re.compile(r"^(\s*)from agr_hf(\.[\w.]+)? import", re.MULTILINE)
INIT = '''"""AGR and AdaL, optimizers of the package agr-hf, whose step on a GPU runs in Triton kernels."""

from .optim import *
from .optim import __all__
from .version import __version__
'''


def make_imports_relative(text: str, depth: int) -> str:
    """The source of a module, `depth` folders below the package, without the package's name in its imports.

    Raises:
        ValueError: an import of the package is written in another form.
    """
    text = IMPORT.sub(lambda found: f"{found[1]}from {'.' * (depth + 1)}{(found[2] or '').lstrip('.')} import", text)
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        if any(name.split(".")[0] == "agr_hf" for name in names):
            raise ValueError(f"line {node.lineno} imports agr_hf; write it as: from agr_hf.MODULE import NAME")
    return text


def collect_files() -> dict[str, str]:
    """Paths in a variant, and what they hold."""
    paths = [PACKAGE / "errors.py", PACKAGE / "version.py", *sorted((PACKAGE / "optim").rglob("*.py"))]
    files = {"__init__.py": INIT}
    for path in paths:
        name = path.relative_to(PACKAGE)
        files[name.as_posix()] = make_imports_relative(path.read_text(encoding="utf-8"), len(name.parts) - 1)
    return files


def build(output: Path) -> Path:
    """Write the folder, in the place of an earlier one; returns it."""
    files = collect_files()
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:8]
    shutil.rmtree(output / "build", ignore_errors=True)
    for backend in BACKENDS:
        variant = output / "build" / f"torch-{backend}"
        metadata = {
            "name": "agr-hf", "id": f"_agr_hf_{backend}_{digest}", "version": VERSION, "license": "Apache-2.0",
            "python-depends": [], "backend": {"type": backend},
        }  # fmt: skip
        for name, text in {**files, "metadata.json": json.dumps(metadata, indent=2) + "\n"}.items():
            path = variant / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    shutil.copy(Path(__file__).with_name("README.md"), output)
    return output


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder, as build/kernel")
    print(build(parser.parse_args().output))
