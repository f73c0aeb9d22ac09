"""`python dying_loop.py ARGUMENTS`: accelerate_loop.py, whose DYING_RANK ends by SIGKILL at DYING_PLACE in its first start.

STEP_SECONDS lets each step take longer; each start prints "first step" before its own.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

import accelerate
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

LOOP = Path(__file__).parents[2] / "training_scripts/accelerate_loop.py"
RANK, PLACE = os.environ.get("DYING_RANK"), os.environ.get("DYING_PLACE")
FIRST_START = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
STEPS_BEFORE = 9  # the first checkpoint is of step 5
SAVES_BEFORE = 1


def die():
    if FIRST_START and os.environ["RANK"] == RANK:
        os.kill(os.getpid(), signal.SIGKILL)


def counted(function, calls_before, place, after=False):
    """`function`, in whose call behind `calls_before` others this process may die: before it, or after it."""
    calls = 0

    def call(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > calls_before and place == PLACE and not after:
            die()
        result = function(*args, **kwargs)
        if calls > calls_before and place == PLACE and after:
            die()
        return result

    return call


def slow_step(optimizer, args, kwargs):
    if not slow_step.trained:
        os.write(1, b"first step\n")  # one write: the ranks share a file
    slow_step.trained = True
    time.sleep(float(os.environ.get("STEP_SECONDS", "0")))


slow_step.trained = False
register_optimizer_step_pre_hook(slow_step)
Accelerator = accelerate.Accelerator
# The others wait for the gradients of a rank that dies in its backward pass.
Accelerator.backward = counted(Accelerator.backward, STEPS_BEFORE, "collective")
# Its own files are written, those of the others may not be, and nothing has its name yet.
Accelerator.save_state = counted(Accelerator.save_state, SAVES_BEFORE, "save", after=True)
register_optimizer_step_post_hook(counted(lambda *args: None, STEPS_BEFORE, "step"))
sys.argv[0] = str(LOOP)
runpy.run_path(str(LOOP), run_name="__main__")
