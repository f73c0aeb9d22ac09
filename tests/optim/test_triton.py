"""The Triton kernels: what they compute, under Triton's interpreter, and that they compile for the GPUs there are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="needs triton, which torch brings on Linux")

HERE = Path(__file__).parent
TABLES = "addresses rest chunk_row chunk_at first_chunk numel flags slots first_random"
NUMBERS = "numbers steps chunk_norms chunk_squares given_norms norms norms_before norms_after skipped chunk_sums sums"


@pytest.mark.timeout(900)
def test_the_kernels_are_right_under_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted.py")]
    found = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]


def compile_kernel(name, target, **constants):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from agr_hf.optim.backends import triton_kernels

    kernel = getattr(triton_kernels, name)
    types = dict.fromkeys(TABLES.split(), "*i64") | dict.fromkeys(NUMBERS.split(), "*fp64") | {"rows": "i32"}
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    source = ASTSource(
        kernel, signature, constexprs={(kernel.arg_names.index(key),): v for key, v in constants.items()}
    )
    return triton.compile(source, target=GPUTarget(*target)).asm


@pytest.mark.parametrize("target", [("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)], ids=str)
@pytest.mark.parametrize("adan", [False, True])
def test_the_kernels_compile_without_a_gpu(target, adan, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes = {"CHUNK": 32_768, "BLOCK": 1024}
    modes = {"SQUARES": adan, "COUPLED_ONLY": False, "HANDED_OUT": adan, "HAS_REST": adan}
    binary = {"cuda": "cubin", "hip": "hsaco"}[target[0]]
    assert compile_kernel("sums_kernel", target, **modes, **sizes)[binary]
    choices = {"ADAN": adan, "NORMS_GIVEN": adan, "HAS_REST": adan, "DRAWS": adan, "KEEPS_NORM": adan, "SKIPS": adan}
    assert compile_kernel("update_kernel", target, **choices, **sizes)[binary]
    assert compile_kernel("add_chunks_kernel", target, BLOCK=128)[binary]
