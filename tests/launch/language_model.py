"""A user's script: a small language model in Trainer, whole or in tensor parallel (transformers' tp_plan).

python language_model.py MODEL_FOLDER OUTPUT.json [--tp] [--optim NAME]
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import ParallelismConfig
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import agr_hf

parser = argparse.ArgumentParser()
parser.add_argument("model", type=Path)
parser.add_argument("output", type=Path)
parser.add_argument("--tp", action="store_true")
parser.add_argument("--optim", default="agr_adamw")
given = parser.parse_args()

agr_hf.register()
settings = {}
if given.tp:
    torch.distributed.init_process_group("gloo")
    settings = {"parallelism_config": ParallelismConfig(tp_size=torch.distributed.get_world_size())}
model = AutoModelForCausalLM.from_pretrained(given.model, **({"tp_plan": "auto"} if given.tp else {}))
texts = [torch.randint(0, 64, (12,), generator=torch.Generator().manual_seed(i)) for i in range(32)]
args = TrainingArguments(
    given.output.parent / "trainer", optim=given.optim, max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2,
    lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none", seed=1, **settings,
)  # fmt: skip
trainer = Trainer(model, args, train_dataset=[{"input_ids": text, "labels": text} for text in texts])
trainer.train()
norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
weights = {
    name: (param.full_tensor() if hasattr(param, "full_tensor") else param).tolist()
    for name, param in model.named_parameters()
}
if trainer.is_world_process_zero():
    given.output.write_text(json.dumps({"weights": weights, "grad_norms": norms}))
