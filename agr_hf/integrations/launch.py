"""What a launcher was asked for against what came of it: processes that train alone, sharding that does not take place."""

from __future__ import annotations

import functools
import logging
import os
from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType

from agr_hf.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

LOCAL_ADDRESSES = ("127.0.0.1", "localhost", "::1")


def check_launch(launched: Accelerator | TrainingArguments) -> None:
    """Refuse processes that train alone although others were started with them, and warn where nothing is sharded.

    accelerate says neither. `accelerate launch --cpu` starts one process on each machine and joins them to nothing,
    whatever `--num_machines` and `--num_processes` say; processes of `torchrun` on machines without a GPU are joined only
    if `cpu=True` (Trainer: `use_cpu=True`) is given too. On a CPU an FSDP or DeepSpeed plugin becomes DDP.

    `agr_hf.register` and `trainer_optimizer` have Trainer check this before it trains; a loop calls it itself.

    Args:
        launched: the loop's Accelerator, or Trainer's arguments.

    Raises:
        ValueError: this process trains alone, and others of the same job do too.
    """
    # Trainer's arguments hold the state that its Accelerator will have.
    state: Any = getattr(launched, "distributed_state", launched)
    if state.distributed_type == DistributedType.NO:
        _refuse_lonely_processes()
    sharding = _sharding_asked_for(launched)
    if sharding and state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        _warn_once(
            f"{sharding} was asked for, but on a CPU accelerate wraps the model in DDP: each process holds all parameters "
            "and all of the optimizer's state. The result is that of DDP; sharding needs GPUs"
        )


def _refuse_lonely_processes() -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise UserError(
            f"{processes} processes were started, and each of them would train alone, on the same data, into the same "
            "folder: accelerate does not join processes without GPUs by default. Pass "
            "--use_cpu true (Trainer) or cpu=True (Accelerator; --cpu in this package's loops), or set ACCELERATE_USE_CPU=1"
        )
    # What accelerate's launcher sets for a process that it expects others beside, and starts alone.
    alone = "ACCELERATE_MIXED_PRECISION" in os.environ and "LOCAL_RANK" not in os.environ
    address = os.environ.get("MASTER_ADDR")
    if not alone or address is None or "MASTER_PORT" not in os.environ:
        return
    if address in LOCAL_ADDRESSES:
        _warn_once(
            "accelerate launch was asked for several processes and started one: it does so with --cpu. For more use "
            "training_scripts/accelerate_configs/cpu.yaml, or torchrun"
        )
        return
    raise UserError(
        f"accelerate launch was asked for several machines (the first is {address}) and joins them to nothing: each would "
        "train alone, on the same data, into the same folder. It does so with --cpu, and for one GPU a machine without "
        "--multi_gpu. Start torchrun on each machine, or accelerate launch with --multi_gpu (without GPUs: with "
        "ACCELERATE_USE_CPU=1 in the environment, and without --cpu)"
    )


def _sharding_asked_for(launched: Accelerator | TrainingArguments) -> str | None:
    def is_set(name: str) -> bool:
        return os.environ.get(name, "").lower() in ("1", "true")

    if is_set("ACCELERATE_USE_FSDP") or getattr(launched, "fsdp", None):
        return "FSDP"
    # Trainer's arguments do not know yet what its Accelerator makes of DeepSpeed.
    if is_set("ACCELERATE_USE_DEEPSPEED") and not hasattr(launched, "distributed_state"):
        return "DeepSpeed"
    return None


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
