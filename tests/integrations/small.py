"""A small real job: a ViT of 13,000 parameters on digits, through Trainer and in a plain loop."""

import torch
from torch.utils.data import Subset
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from agr_hf.tasks.digits import digits_model, load_digits


def small_model(seed=0):
    set_seed(seed)
    return digits_model(hidden_size=24, num_hidden_layers=1, intermediate_size=32, num_attention_heads=2)


def small_data(n=128):
    return Subset(load_digits()["train"], range(n))


def arguments(folder, **options):
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 16,
        "max_steps": 20,
        "learning_rate": 3e-3,
        "weight_decay": 0.05,
        "adam_beta1": 0.8,
        "adam_epsilon": 1e-7,
        "lr_scheduler_type": "constant",
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**defaults, **options})


class Recorder:
    """A collator that keeps every batch, so that a plain loop can be given the same."""

    def __init__(self):
        self.batches = []

    def __call__(self, rows):
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        self.batches.append({key: value.clone() for key, value in batch.items()})
        return batch


def trainer_of(model, args, cls=Trainer, **options):
    trainer = cls(model=model, args=args, train_dataset=options.pop("train_dataset", small_data()), **options)
    trainer.remove_callback(PrinterCallback)
    return trainer


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def plain_loop(model, optimizer, batches, max_grad_norm=1.0):
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.clip_next_step(max_grad_norm)  # test_clipping.py compares it with clipping before the step
        optimizer.step()
    return model


def stock_groups(model, weight_decay):
    """Trainer's groups by hand: matrices and bare parameters decay, biases and norms do not."""
    named = list(model.named_parameters())
    still = {name for name, _ in named if "bias" in name or "layernorm" in name}
    return [
        {"params": [p for name, p in named if name not in still], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name in still], "weight_decay": 0.0},
    ]


def same_bits(model, other):
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)
