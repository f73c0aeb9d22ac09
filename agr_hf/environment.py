"""The conditions of a result: versions and device. No path, user or host name."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

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


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
