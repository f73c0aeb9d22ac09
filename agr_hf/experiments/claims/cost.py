"""The claim that AGR costs nothing: a step beside torch's, and the whole training step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from agr_hf.experiments.claims.claim import Claim, Finding, Setting, interval
from agr_hf.optim.registry import create_optimizer


def measure_cost(setting: Setting) -> dict[str, Any]:
    """Rounds of one training step with each: the optimizer's part and the whole, beside torch's fused AdamW.

    Each has a model of its own; which goes first changes with the round.
    """
    from transformers import BertConfig, BertForMaskedLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = BertConfig(hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=2048)
    made: dict[str, tuple[Any, torch.optim.Optimizer]] = {}
    for name, registered, options in (("AdamW", "adamw", {"fused": True}), ("AdamW(AGR)", "agr_adamw", {})):
        torch.manual_seed(0)
        model: Any = BertForMaskedLM(config)
        model.to(device)
        made[name] = model, create_optimizer(registered, model, lr=1e-4, **options)
    tokens = torch.randint(config.vocab_size, (8, 64), device=device)
    seconds: dict[str, dict[str, list[float]]] = {name: {"step": [], "whole": []} for name in made}
    for index in range(setting.options["rounds"] + 3):
        for name in sorted(made, reverse=index % 2 == 1):
            model, optimizer = made[name]
            start = _now(device)
            optimizer.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            before = _now(device)
            optimizer.step()
            end = _now(device)
            if index >= 3:
                seconds[name]["step"].append(end - before)
                seconds[name]["whole"].append(end - start)
    return {
        "model": "BERT-small, 28.8 million parameters, batches of 8 x 64 tokens",
        "threads": torch.get_num_threads(),
        "ratios": {
            part: [a / b for a, b in zip(seconds["AdamW(AGR)"][part], seconds["AdamW"][part], strict=True)]
            for part in ("step", "whole")
        },
        "median_milliseconds": {
            name: {part: 1000 * statistics.median(values) for part, values in parts.items()}
            for name, parts in seconds.items()
        },
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def judge_cost(found: Mapping[str, Any]) -> Finding:
    """No additional time: the interval of the whole training step's ratio lies below 1.02."""
    step, whole = (interval(_middle(found["ratios"][part])) for part in ("step", "whole"))
    effect = (
        f"the step takes {step[0]:.3f} times that of torch's fused AdamW ({step[1]:.3f} to {step[2]:.3f}), the whole "
        f"training step {whole[0]:.3f} times ({whole[1]:.3f} to {whole[2]:.3f}), {found['model']}; intervals of the "
        f"medians of groups of {max(3, len(found['ratios']['step']) // 10)} measurements"
    )
    verdict = "confirmed" if whole[2] < 1.02 else "contradicted" if whole[1] > 1.02 else "cannot tell"
    return Finding(verdict, effect, n=len(_middle(found["ratios"]["step"])))


def _middle(ratios: list[float]) -> list[float]:
    """Medians of tenths of the rounds: a shared machine has moments of its own."""
    size = max(3, len(ratios) // 10)
    groups = [sorted(ratios[i : i + size]) for i in range(0, len(ratios) - size + 1, size)]
    return [statistics.median(group) for group in groups]


CLAIMS = [
    Claim(
        "agr-cost", "AGR", "section 3", "no additional computational cost and training time",
        "the interval of a whole training step lies below 1.02 times the time", "it lies above",
        measure_cost, judge_cost, {"small": Setting(options={"rounds": 60}), "gpu": Setting(options={"rounds": 200})},
    ),
]  # fmt: skip
