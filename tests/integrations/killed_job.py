"""A training that a test kills: says through a pipe when it begins, and writes its end as safetensors."""

import os
import time

import torch
from safetensors.torch import save_file
from small import arguments, small_model, trainer_of
from transformers import TrainerCallback

import agr_hf
from agr_hf.files import replaced_file
from agr_hf.integrations.callbacks import SaveOptimizerState, SuspendAGR
from agr_hf.integrations.trainer import train

STEPS = 240


class Slow(TrainerCallback):
    def __init__(self, pipe):
        self.pipe = pipe

    def on_train_begin(self, *args, **kwargs):
        self.pipe.send("training")

    def on_step_end(self, *args, **kwargs):
        time.sleep(0.01)


def run(folder, pipe):
    args = job_arguments(folder, max_steps=STEPS, save_steps=7, save_total_limit=2)
    callbacks = [Slow(pipe), SuspendAGR(at_epoch=20), SaveOptimizerState()]
    trainer = trainer_of(model_with_dropout(), args, callbacks=callbacks)
    train(trainer, "latest")
    write_end(folder, trainer.model)


def run_rank(folder, rank, port, dies_at=None):
    """One of two processes; the second dies where it would write its random states at step `dies_at`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    args = job_arguments(folder, max_steps=10, save_steps=3, save_total_limit=1)
    trainer = trainer_of(model_with_dropout(), args)
    save = trainer._save_rng_state

    def save_or_die(output_dir):
        if rank == 1 and trainer.state.global_step == dies_at:
            os._exit(9)
        save(output_dir)

    trainer._save_rng_state = save_or_die
    train(trainer, "latest")
    if rank == 0:
        write_end(folder, trainer.model)
    torch.distributed.destroy_process_group()


def job_arguments(folder, **options):
    torch.set_num_threads(1)
    agr_hf.register()
    options |= {"optim": "agr_adamw", "lr_scheduler_type": "cosine", "save_strategy": "steps", "logging_steps": 50}
    return arguments(folder / "run", **options)


def model_with_dropout():
    model = small_model()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    return model


def write_end(folder, model):
    with replaced_file(folder / "end.safetensors") as temporary:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, temporary)
