"""Checks in several processes on the CPU, joined by gloo."""

import os

import torch
import torch.distributed as dist


def spawn(check, tmp_path, world=2):
    """Run a function that can be pickled on each of `world` ranks."""
    arguments = (check, str(tmp_path / "store"), world)
    torch.multiprocessing.start_processes(run, arguments, nprocs=world, start_method="forkserver")


def run(rank, check, store, world):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        check()
    finally:
        dist.destroy_process_group()
    # Not by sys.exit: gloo's threads outlive their group here, and one that lets go of its last tensor while the
    # interpreter ends aborts the process (pytorch/pytorch#190489).
    os._exit(0)
