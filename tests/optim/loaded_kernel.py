"""Loads the kernel as a user does, takes steps in the Triton kernels under Triton's interpreter, prints what it saw as JSON.

Run by test_kernel_hub.py in a process of its own, with TRITON_INTERPRET=1; agr_hf is not imported here.
"""

import importlib
import json
import sys
from pathlib import Path

import torch


def take_steps(optimizer, param):
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def main():
    how, *rest = sys.argv[1:]
    import kernels

    if how == "local":  # LOCAL_KERNELS names the folder
        kernel = kernels.get_kernel("user/agr-hf", version=1)
    else:
        kernel = kernels.load_kernel("user/agr-hf", lockfile=Path(rest[0]))
    gpu = importlib.import_module(f"{kernel.__name__}.optim.backends.gpu")
    ways = {}
    for way, devices in (("triton", ("cpu",)), ("lists", ())):
        gpu.DEVICES = devices
        param = torch.nn.Parameter(torch.linspace(-1, 1, 600).view(20, 30))
        optimizer = kernel.AGRAdamW([param], lr=0.1, weight_decay=0.1)
        take_steps(optimizer, param)
        part = type(optimizer.plan.parts[0])
        ways[way] = {"part": f"{part.__module__}.{part.__qualname__}", "param": param.tolist()}
    print(json.dumps({
        "name": kernel.__name__, "file": kernel.__file__, "version": kernel.__version__, "names": kernel.list_optimizers(),
        "imports_agr_hf": "agr_hf" in sys.modules, **ways,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
