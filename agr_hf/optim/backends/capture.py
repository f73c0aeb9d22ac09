"""Recording a step into a CUDA graph."""

import torch


def check_graph_capture(optimizer: torch.optim.Optimizer) -> None:
    """Raise RuntimeError, as torch's optimizers do, where a recorded step would repeat its count: without `capturable`."""
    if not (torch.cuda.is_initialized() or torch.xpu.is_initialized()):
        return  # nobody records, and torch's check takes as long as a hundred small tensors
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):  # new and old torch
        if hasattr(optimizer, name):
            getattr(optimizer, name)()
            return
