"""The step inside of real training: its share of a plain loop, and clipping and step of a default Trainer run."""

from __future__ import annotations

import statistics
import tempfile
import time

import torch
from contestants import CLIPPED, CONTESTANTS, REFERENCE, Contestant, build_bert_small, build_resnet18
from measure import no_garbage_collection, synchronize
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import agr_hf

LOOP_CONTESTANTS = (REFERENCE, "AGRAdamW", CLIPPED, "AGRAdamW max_grad_norm")
TRAINER_NAMES = ("adamw_torch_fused", "agr_adamw")
BATCH, TOKENS, IMAGE = 4, 64, 64
WARM_UP = 2  # steps that make state, plans and caches


class TrainingLoop:
    """A model, a batch, and an optimizer of a contestant."""

    def __init__(self, build, make_batch, contestant: Contestant, device: str) -> None:
        torch.manual_seed(0)
        self.name = contestant.name
        self._device = device
        self._model = build().to(device)
        self._batch = make_batch(device)
        self._optimizer, self._step = contestant.build(list(self._model.parameters()))

    def run_once(self) -> tuple[float, float]:
        """Seconds of the step, and of forward, backward and step."""
        synchronize(self._device)
        start = time.perf_counter()
        compute_loss(self._model, self._batch).backward()
        synchronize(self._device)
        backward_end = time.perf_counter()
        self._step()
        synchronize(self._device)
        step_end = time.perf_counter()
        self._optimizer.zero_grad()
        return step_end - backward_end, time.perf_counter() - start


def compute_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    if "input_ids" in batch:
        return model(**batch).loss
    return nn.functional.cross_entropy(model(batch["images"]), batch["labels"])


def make_text(device: str) -> dict:
    ids = torch.randint(1000, 30000, (BATCH, TOKENS), device=device)
    return {"input_ids": ids, "labels": ids}


def make_images(device: str) -> dict:
    images = torch.randn(4 * BATCH, 3, IMAGE, IMAGE, device=device)
    return {"images": images, "labels": torch.randint(1000, (4 * BATCH,), device=device)}


WORKLOADS = {
    f"resnet18, {4 * BATCH} images of {IMAGE}x{IMAGE}": (build_resnet18, make_images),
    f"bert-small, {BATCH} texts of {TOKENS} tokens": (build_bert_small, make_text),
}


def measure_shares(rounds: int, device: str) -> list[dict]:
    """The step's share of forward, backward and step in a plain loop; the contestants' turns alternate."""
    rows = []
    for workload, (build, make_batch) in WORKLOADS.items():
        loops = [TrainingLoop(build, make_batch, CONTESTANTS[name], device) for name in LOOP_CONTESTANTS]
        times: dict[str, list[tuple[float, float]]] = {loop.name: [] for loop in loops}
        with no_garbage_collection():
            for turn in range(WARM_UP + rounds):
                for loop in loops:
                    seconds = loop.run_once()
                    if turn >= WARM_UP:
                        times[loop.name].append(seconds)
        rows += [
            {
                "workload": workload,
                "contestant": name,
                "milliseconds": 1e3 * statistics.median(step for step, _ in pairs),
                "milliseconds_of_all": 1e3 * statistics.median(whole for _, whole in pairs),
                "share": statistics.median(step / whole for step, whole in pairs),
            }
            for name, pairs in times.items()
        ]
    return rows


class StepClock(TrainerCallback):
    """Seconds from the end of each backward pass to the end of the step: clipping, norm and step.

    Nothing of Trainer is replaced: its clipping moves into the step only where its methods are those that agr_hf knows.
    """

    def __init__(self, device: str) -> None:
        self.seconds: list[float] = []
        self._device = device
        self._start = 0.0

    def start_behind(self, training_step):
        def run(*args, **kwargs):
            loss = training_step(*args, **kwargs)
            synchronize(self._device)
            self._start = time.perf_counter()
            return loss

        return run

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        synchronize(self._device)
        self.seconds.append(time.perf_counter() - self._start)


def time_trainer_run(optim: str, steps: int, device: str) -> float:
    """Median seconds that clipping, norm and step take in a Trainer run with its default of max_grad_norm."""
    torch.manual_seed(0)
    text = torch.randint(1000, 30000, ((WARM_UP + steps) * BATCH, TOKENS))
    clock = StepClock(device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, optim=optim, max_steps=WARM_UP + steps, per_device_train_batch_size=BATCH,
            save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=device == "cpu",
        )  # fmt: skip
        trainer = Trainer(
            build_bert_small(), arguments, train_dataset=[{"input_ids": ids, "labels": ids} for ids in text],
            callbacks=[clock],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.training_step = clock.start_behind(trainer.training_step)
        with no_garbage_collection():
            trainer.train()
    return statistics.median(clock.seconds[WARM_UP:])


def measure_trainer(runs: int, steps: int, device: str) -> dict:
    """Runs with AGR by name and with torch's fused AdamW, alternating; the ratio is the median of the pairs."""
    agr_hf.register()
    pairs = [{name: time_trainer_run(name, steps, device) for name in TRAINER_NAMES} for _ in range(runs)]
    reference, ours = TRAINER_NAMES
    return {
        "workload": f"bert-small, {BATCH} texts of {TOKENS} tokens, max_grad_norm 1.0",
        "runs": runs,
        "steps": steps,
        "milliseconds": {name: 1e3 * statistics.median(pair[name] for pair in pairs) for name in TRAINER_NAMES},
        "ratio": statistics.median(pair[ours] / pair[reference] for pair in pairs),
    }
