"""A training that a test kills: says through a pipe when it begins, and writes its end as safetensors."""

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
    torch.set_num_threads(1)
    agr_hf.register()
    args = arguments(
        folder / "run",
        optim="agr_adamw",
        max_steps=STEPS,
        lr_scheduler_type="cosine",
        save_strategy="steps",
        save_steps=7,
        save_total_limit=2,
        logging_steps=50,
    )
    model = small_model()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    callbacks = [Slow(pipe), SuspendAGR(at_epoch=20), SaveOptimizerState()]
    train(trainer_of(model, args, callbacks=callbacks), "latest")
    with replaced_file(folder / "end.safetensors") as temporary:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, temporary)
