"""`python gpu_on_gloo.py SCRIPT ARGUMENTS`: on gloo, in processes that accelerate takes for those of GPUs.

accelerate shards on GPUs alone. This leaves untested what only they have: NCCL, streams, pinned memory, kernels.
"""

import os
import runpy
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
CPUOffloadPolicy.__init__.__defaults__ = (False,)  # pin_memory, which needs a driver
sys.argv = sys.argv[1:]
sys.path[0] = str(Path(sys.argv[0]).parent)
runpy.run_path(sys.argv[0], run_name="__main__")
