"""Run the native step under a sanitizer, or valgrind: `make test-sanitizers`.

    python tests/sanitizers.py address|thread|memcheck

It builds native.c again, with the sanitizer and without the package, and steps through tables of shapes that hypothesis
draws, in threads of its own: OpenMP's are not instrumented. Every tensor ends where its allocation ends, so that a reading
past it is seen. It imports no torch, whose own findings would drown ours.
"""

import ctypes
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from array import array
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "agr_hf/optim/backends/native.c"
FLAGS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
    "memcheck": [],
}


def build(kind, folder):
    library = folder / "_native.abi3.so"
    include = sysconfig.get_paths()["include"]
    command = ["cc", "-std=c11", "-O1", "-g", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
    subprocess.run(
        [
            *command,
            "-Wno-psabi",
            "-fPIC",
            "-shared",
            "-pthread",
            *FLAGS[kind],
            f"-I{include}",
            str(SOURCE),
            "-o",
            str(library),
            "-lm",
            "-ldl",
        ],
        check=True,
    )
    return library


def check(library, examples):
    """In a process that has the sanitizer loaded."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    spec = importlib.util.spec_from_file_location("_native", library)
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    sizes = st.sampled_from([0, 1, 7, 15, 16, 17, 63, 64, 65, 513, 65_535, 65_536, 65_537, 140_000])

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(st.tuples(sizes, st.integers(0, 255), st.booleans()), min_size=1, max_size=6),
        st.sampled_from([0, 1]),
        st.sampled_from([0, 1, 3, 5, 8]),
        st.integers(1, 4),
        st.booleans(),
        st.booleans(),
    )
    def step(rows, rule, mode, threads, kahan, at_random):
        states = 2 if rule == 0 else 4
        memory, addresses = [], []
        if kahan:  # every parameter is bfloat16
            rows = [(n, flags | 16, live) for n, flags, live in rows]

        def block(n, width):
            memory.append(libc.malloc(max(n * width, 1)))
            ctypes.memset(memory[-1], 0, n * width)
            return memory[-1]

        columns = [[block(n, 2 if flags & 16 else 4) for n, flags, _ in rows]]
        columns.append([block(n, 2 if flags & 32 else 4) if live else 0 for n, flags, live in rows])
        columns += [[block(n, 2 if flags & 64 and k == 0 else 4) for n, flags, _ in rows] for k in range(states)]
        if kahan:
            columns.append([block(n, 2) for n, _, _ in rows])
        for column in columns:
            addresses += column
        fixed = array("q", [n for n, _, _ in rows] + [flags for _, flags, _ in rows])
        numbers = array("d", [1.0, 0.1, 0.1, 0.9, 0.1, 0.99, 0.01, 1.0, 1e-8, 1.0, 0.1, 1.0, 1e-8, 0.0, 0.0, 0.0])
        first = array("q", range(len(rows))) if at_random else b""
        norms, squares, before = (array("d", bytes(8 * len(rows))) for _ in range(3))
        native.run(
            rule, states, mode, threads, array("q", addresses), fixed, array("q", bytes(8 * len(rows))), numbers, norms,
            squares, before.buffer_info()[0] if rule else 0, first,
        )  # fmt: skip
        for address in memory:
            libc.free(address)

    step()


def main(kind):
    with tempfile.TemporaryDirectory() as folder:
        library = build(kind, Path(folder))
        command = [sys.executable, __file__, "--inside", str(library), "20" if kind == "memcheck" else "200"]
        environment = {**os.environ, "PYTHONMALLOC": "malloc", "ASAN_OPTIONS": "detect_leaks=0"}
        if kind == "memcheck":
            command = ["valgrind", "--errors-for-leak-kinds=none", "--quiet", *command]
        else:
            name = {"address": "libasan.so", "thread": "libtsan.so"}[kind]
            runtime = subprocess.run(
                ["cc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
            ).stdout
            environment["LD_PRELOAD"] = runtime.strip()
        found = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    # valgrind finds fault with Python itself too.
    ours = kind != "memcheck" or any(name in found.stderr for name in ("native.c", "kernels.h"))
    if found.returncode or (ours and found.stderr):
        sys.exit(f"{found.stderr}\n{kind}: see above")
    print(f"{kind}: nothing found")


if __name__ == "__main__":
    if sys.argv[1] == "--inside":
        check(sys.argv[2], int(sys.argv[3]))
    else:
        main(sys.argv[1])
