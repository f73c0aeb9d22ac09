"""Processes that are forked from a server which has imported torch and transformers: that takes longest."""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path


def exit_code(function, *arguments):
    """Of a process that calls a function."""
    process = multiprocessing.get_context("forkserver").Process(target=function, args=arguments)
    process.start()
    process.join(280)
    process.kill()  # where it hangs
    process.join()
    return process.exitcode


def run_module(module, arguments, log):
    """`python -m MODULE ARGUMENTS`, to its good end; what it and its processes print is in the file `log`."""
    assert exit_code(run_as_main, runpy.run_module, module, list(map(str, arguments)), log) == 0, Path(log).read_text()[
        -3000:
    ]


def run_script(script, arguments, log):
    """The exit code of `python SCRIPT ARGUMENTS`; what it prints is in the file `log`."""
    return exit_code(run_as_main, runpy.run_path, str(script), list(map(str, arguments)), log)


def run_as_main(run, name, arguments, log):
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.argv = [name, *arguments]
    run(name, run_name="__main__")
