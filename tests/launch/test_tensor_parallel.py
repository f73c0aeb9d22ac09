"""Trainer with a model that transformers shares out by its tp_plan."""

import json
import sys

import pytest
import torch
from launchers import ON_GLOO, TORCHRUN, run
from transformers import LlamaConfig, LlamaForCausalLM

SCRIPT = "tests/launch/language_model.py"
ALONE = [sys.executable]


def trained(folder, name, *command):
    output = folder / f"{name}.json"
    run([*command, SCRIPT, folder / "model", output, *(["--tp"] if name == "tp" else [])])
    found = json.loads(output.read_text())
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in found["weights"].items()}, found[
        "grad_norms"
    ]


@pytest.mark.launch
@pytest.mark.timeout(900)
def test_tensor_parallel_in_trainer_is_one_process_and_clips_by_the_same_norm(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, num_key_value_heads=4, tie_word_embeddings=False, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    whole, norms = trained(tmp_path, "whole", *ALONE)
    parallel, same_norms = trained(tmp_path, "tp", *TORCHRUN, "--standalone", "--nproc-per-node", 2, *ON_GLOO)
    assert same_norms == pytest.approx(norms, rel=1e-5)
    run([*ALONE, SCRIPT, tmp_path / "model", tmp_path / "adamw.json", "--optim", "adamw_torch_fused"])
    without = json.loads((tmp_path / "adamw.json").read_text())["weights"]
    effect = sum(float((whole[name] - torch.tensor(without[name])).square().sum()) for name in whole) ** 0.5
    apart = sum(float((whole[name] - parallel[name]).square().sum()) for name in whole) ** 0.5
    assert apart < 0.01 * effect, (apart, effect)
