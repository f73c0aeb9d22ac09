"""`agr-hf run`: scripts that know nothing of the package, alone and behind launchers."""

import runpy
import subprocess
import sys

import launching
import pytest

SCRIPT = """
import sys, os, multiprocessing
import beside  # a module of the script's folder
from transformers import HfArgumentParser, TrainingArguments

def look(queue):
    from timm.optim import create_optimizer_v2
    import torch
    name = type(create_optimizer_v2(torch.nn.Linear(2, 2), "agradamw", lr=0.1)).__name__
    queue.put((__name__, TrainingArguments("unused", optim="agr_adan", report_to="none").optim.value, name))

if __name__ == "__main__":
    rank = os.environ.get("RANK", "alone")
    if sys.argv[1] == "workers":
        for method in ("spawn", "fork", "forkserver"):
            context = multiprocessing.get_context(method)
            queue = context.Queue()
            process = context.Process(target=look, args=(queue,))
            process.start()
            print(method, *queue.get(timeout=60))
            process.join()
        sys.exit(7)
    if sys.argv[1] == "fail":
        raise ValueError("of the script")
    arguments, = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    print(f"{rank}: {arguments.optim.value} {sys.argv} {os.path.basename(__file__)}\\n", end="")
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "beside.py").write_text("")
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def run(arguments, log):
    code = launching.exit_code(
        launching.run_as_main, runpy.run_module, "agr_hf", ["run", *map(str, arguments)], str(log)
    )
    return code, log.read_text()


def test_workers_know_the_names_and_the_exit_code_is_the_scripts(script, tmp_path):
    code, out = run([script, "workers"], tmp_path / "log")
    assert code == 7, out
    assert "spawn __mp_main__ agr_adan AGRAdamW" in out
    assert "fork __main__ agr_adan AGRAdamW" in out
    assert "forkserver __mp_main__ agr_adan AGRAdamW" in out


def test_arguments_are_the_scripts_and_its_folder_is_on_the_path(script, tmp_path):
    code, out = run([script, "--output_dir", "unused", "--optim", "agr_adamw", "--report_to", "none"], tmp_path / "log")
    assert code == 0, out
    assert f"alone: agr_adamw ['{script}', '--output_dir', 'unused'" in out
    code, out = run([script, "--help"], tmp_path / "log")
    assert code == 0
    assert "agr_adamw" in out
    assert "agr-hf" not in out


def test_a_module_is_found_in_the_current_folder(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["-m", "script", "--output_dir", "unused", "--optim", "adal", "--report_to", "none"]
    code, out = run(arguments, tmp_path / "log")
    assert code == 0, out
    assert "alone: adal" in out
    assert "script.py" in out


def test_the_scripts_own_traceback_comes_out(script, tmp_path):
    code, out = run([script, "fail"], tmp_path / "log")
    assert code == 1
    assert f'File "{script}", line' in out
    assert out.endswith("ValueError: of the script\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nothing.py"], "agr-hf: there is no script 'nothing.py'"),
        (["-m", "nothing.at.all"], "agr-hf: there is no module 'nothing.at.all'"),
        ([], "the following arguments are required: target"),
    ],
)
def test_what_is_not_there_is_said(arguments, sentence, tmp_path):
    code, out = run(arguments, tmp_path / "log")
    assert code in (1, 2)
    assert sentence in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "ranks"),
    [
        (["torch.distributed.run", "--standalone", "--nproc-per-node", "2"], ["0", "1"]),
        (["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"], ["alone"]),
    ],
    ids=["torchrun", "accelerate"],
)
def test_behind_launchers(launcher, ranks, script, tmp_path):
    optim = ["--output_dir", "unused", "--optim", "agr_adamw", "--report_to", "none", "--use_cpu", "True"]
    command = [sys.executable, "-m", *launcher, "-m", "agr_hf", "run", script, *optim]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert found.returncode == 0, found.stderr
    for rank in ranks:
        assert f"{rank}: agr_adamw" in found.stdout
