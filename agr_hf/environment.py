"""The conditions of a result: versions, device, and what computes a step here. No path, user or host name."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from agr_hf.texts import public

if TYPE_CHECKING:
    import torch

PACKAGES = ("agr-hf", "torch", "transformers", "accelerate", "datasets", "diffusers", "evaluate", "timm")


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Versions of what is installed, the device, and how many threads torch uses on the CPU.

    Args:
        device: that the result is from. Default: a CUDA device where there is one.
    """
    import torch

    cuda = torch.cuda.is_available() and (device is None or device.type == "cuda")

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "devices": torch.cuda.device_count() if cuda else 1,
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def describe_backends() -> dict[str, Any]:
    """Which backends of the step are there: true, or `{"available": False, "why": ..., "what_to_do": ...}`."""
    import torch

    from agr_hf.optim.backends import gpu, native

    multi_tensor = "on a GPU the multi-tensor path serves"
    if gpu.why_not():
        triton: Any = {
            "available": False,
            "why": f"Triton cannot be imported: {gpu.why_not()}",
            "what_to_do": f"install triton, which torch's packages for Linux bring, for a GPU; without it, {multi_tensor}",
        }
    elif not any(getattr(torch, device).is_available() for device in gpu.DEVICES):
        triton = {
            "available": False,
            "why": "torch sees no GPU (CUDA, ROCm or XPU)",
            "what_to_do": "it is not needed on a CPU; where a GPU is, install the torch of its driver (https://pytorch.org)",
        }
    else:
        triton = True
    missing = {
        "available": False,
        "why": public(f"its extension was not built: {native.WHY_NOT}"),
        "what_to_do": "install a C compiler (gcc or clang) and install agr-hf again from source: pip install "
        "--force-reinstall --no-deps --no-binary agr-hf agr-hf",
    }
    return {
        "native": missing if native.WHY_NOT else True,
        "triton": triton,
        "multi_tensor": True,
    }


def describe_instructions() -> str | None:
    """The instruction set that the native step computes with: avx512, avx2 or baseline."""
    from agr_hf.optim.backends import native

    return None if native.WHY_NOT else native.select_instructions()


def explain_slow_steps() -> list[str]:
    """What of the surroundings makes a step on the CPU slow, a sentence each."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    if threads >= cores or threads > 1:
        return []
    if os.environ.get("OMP_NUM_THREADS") == "1":
        reason = "OMP_NUM_THREADS=1 is set, as torchrun and accelerate launch set it for every process"
    else:
        reason = "torch was limited to one thread"
    return [
        f"A step on the CPU uses 1 of {cores} cores: {reason}. Set OMP_NUM_THREADS to the cores of a process before the "
        "launch, or call torch.set_num_threads."
    ]


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
