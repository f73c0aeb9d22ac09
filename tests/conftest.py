import os
import tempfile

# Before torch is imported: the tests must give the same bits wherever they run.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="agr-hf-tests-")  # not the user's, nor that of another worker
if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: more threads wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Tests that are of several processes have them forked by a server that has imported this, which takes longest, once.
multiprocessing.set_forkserver_preload(
    ["torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "transformers.trainer", "agr_hf.tasks.digits"]
)

# No deadline: machines that run tests are shared.
settings.register_profile("agr_hf", deadline=None)
settings.load_profile("agr_hf")


@pytest.fixture(autouse=True)
def _leave_nothing_of_a_run():
    """`agr-hf run` changes the process that it runs in, and those that it starts; the tests of others follow in it."""
    config = multiprocessing.current_process()._config
    yield
    config.pop("agr_hf", None)
    trainer = sys.modules.get("transformers.trainer")
    if trainer is not None:
        from agr_hf.integrations.recording import AutomaticRecord

        trainer.DEFAULT_CALLBACKS[:] = [kept for kept in trainer.DEFAULT_CALLBACKS if kept is not AutomaticRecord]


POSTGRES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)


@pytest.fixture(scope="session")
def postgres():
    """The URL of a PostgreSQL server of its own, on a socket."""
    if POSTGRES is None:
        pytest.skip("PostgreSQL is not installed; Debian's package postgresql has it")
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed; make test-postgres installs it")
    # Not below pytest's own folders, which are root's alone: the server refuses to run as root. Sockets need short paths.
    folder = Path(tempfile.mkdtemp(prefix="agr-hf-postgres-"))
    owner = []
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
        owner = ["runuser", "-u", "postgres", "--"]
    control = [*owner, POSTGRES.parent / "pg_ctl", "-D", folder / "data", "-w"]
    made = [*owner, POSTGRES, "-D", folder / "data", "-U", "tester", "-A", "trust"]
    subprocess.run(made, check=True, capture_output=True, cwd="/")
    options = f"-c listen_addresses='' -c unix_socket_directories={folder}"
    subprocess.run(
        [*control, "-l", folder / "log", "-o", options, "start"], check=True, stdout=subprocess.DEVNULL, cwd="/"
    )
    yield f"postgresql+psycopg2://tester@/postgres?host={folder}"
    subprocess.run([*control, "-m", "immediate", "stop"], check=True, capture_output=True, cwd="/")
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: none here; run `make test-gpu` where one is"))


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


def pytest_addoption(parser):
    parser.addoption("--summary", metavar="FILE", help="write how many tests passed, and on which device, as JSON")


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--summary"):
        from agr_hf.environment import environment

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        counts = {kind: len(terminalreporter.stats.get(kind, [])) for kind in ("passed", "failed", "error", "skipped")}
        failures = [report.nodeid for report in terminalreporter.stats.get("failed", [])]
        text = json.dumps({**counts, "failures": failures, **environment(device)}, indent=2)
        Path(config.getoption("--summary")).write_text(text + "\n")
