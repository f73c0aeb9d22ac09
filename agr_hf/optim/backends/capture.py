"""What torch.compile and CUDA graphs may not record of a step."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def untraced(function: F) -> F:
    """Keep torch.compile out of a function. Where nothing is traced the function is called as it is: torch's own guard takes
    ten microseconds of a step that comes after a backward pass."""
    guarded = torch._disable_dynamo(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (guarded if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return call  # type: ignore[return-value]


def check_graph_capture(optimizer: torch.optim.Optimizer) -> None:
    """Raise RuntimeError, as torch's optimizers do, where a recorded step would repeat its count: without `capturable`."""
    if not (torch.cuda.is_initialized() or torch.xpu.is_initialized()):
        return  # nobody records, and torch's check takes as long as a hundred small tensors
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):  # new and old torch
        if hasattr(optimizer, name):
            getattr(optimizer, name)()
            return
