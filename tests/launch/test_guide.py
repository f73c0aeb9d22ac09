"""docs/scaling.md: its commands, one after the other, as a reader copies them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documents import read_blocks
from launchers import ROOT, environment

GUIDE = ROOT / "docs/scaling.md"
# "sh" marks what needs GPUs, several hosts, or a script that is not here.
RUN, SHOWN = ([block.strip("\n") + "\n" for block in read_blocks(GUIDE, language)] for language in ("bash", "sh"))


def test_every_file_and_option_that_the_guide_names_is_there():
    text = GUIDE.read_text()
    for name in re.findall(r"(?:training_scripts|agr_hf|docs)/[\w/.-]+\w", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(\w+\.yaml|zero\d\.json)`", text):
        assert (ROOT / "training_scripts/accelerate_configs" / name).exists(), name
    launchers = {"python", "torchrun", "accelerate", "agr-hf", "export", "sbatch"}
    commands = [line for block in RUN + SHOWN for line in block.replace("\\\n", " ").splitlines()]
    assert {command.split()[0] for command in commands} == launchers


@pytest.mark.launch
@pytest.mark.timeout(1200)
def test_its_commands_work_one_after_the_other(tmp_path):
    for name in ("training_scripts", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-x", "-c", "\n".join(RUN)], cwd=tmp_path, env=environment(PATH=path), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    runs = {folder.name for folder in (tmp_path / "runs").iterdir() if (folder / "results.json").exists()}
    assert runs == {"one", "two", "ddp", "fsdp2"}
    assert (tmp_path / "runs/loop/model/model.safetensors").exists()
