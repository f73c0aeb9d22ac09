"""What the scripts share around a run: its folder, how it ends, and the parts of its record."""

from __future__ import annotations

import atexit
import hashlib
import logging
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agr_hf.errors import UserError, describe_missing
from agr_hf.integrations.checkpoints import latest_checkpoint
from agr_hf.optim.flags import agr_flags
from agr_hf.optim.flattened import layer_groups
from agr_hf.texts import public

if TYPE_CHECKING:
    import torch

# Data sets that come with packages.
EMBEDDED = ("digits", "pydoc-topics")
# Words in the name of a metric of which less is better, beside those that end with "loss" or "error".
SMALLER = frozenset("perplexity ppl distance fid kid mse rmse mae mape nll wer cer ter bpb bpc brier ece eer".split())


def run_main(main: Callable[[], Any]) -> None:
    """Run a script's `main`: an error for the user and a missing extra are said in a sentence, others keep their traceback.

    The first process logs what happens, the others only warnings. Processes of a launcher destroy their process group at
    the end, as NCCL asks for.

    Raises:
        SystemExit: `main` raised a `UserError`.
    """
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(name)s: %(message)s")
    try:
        main()
    except UserError as error:
        raise SystemExit(f"{Path(main.__code__.co_filename).name}: {error}") from None
    except ModuleNotFoundError as error:
        missing = describe_missing(error)
        if missing is None:
            raise
        raise SystemExit(f"{Path(main.__code__.co_filename).name}: {missing}") from None
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        has_gloo_threads = "gloo" in distributed.get_backend()
        distributed.destroy_process_group()
        if has_gloo_threads:
            # They outlive their group, and now and then abort a process that has finished its work while the interpreter
            # ends (pytorch/pytorch#190489). What has to happen at the end happens here.
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


def refuse_used(
    output_dir: str | os.PathLike[str],
    resume: str | None,
    latest: Callable[[Path], Path | None] = latest_checkpoint,
) -> None:
    """Raise UserError where a new run would overwrite another one, or leave its checkpoints among its own.

    Args:
        output_dir: the run's folder.
        resume: `--resume_from_checkpoint`.
        latest: what "latest" means, `latest_checkpoint` of Trainer's or `latest_state` of Accelerate's.
    """
    folder = Path(output_dir)
    finished = (folder / "results.json").exists()
    if resume is None and (finished or next(folder.glob("checkpoint-*"), None)):
        raise UserError(
            f"{folder} holds a run already; go on with it (--resume_from_checkpoint latest), or pass another --output_dir"
        )
    if resume == "latest" and finished and latest(folder) is None:
        raise UserError(f"{folder} holds a finished run, and no checkpoint to go on from; pass another --output_dir")


def plain(value: Any) -> Any:
    """JSON of a value: numbers that are not finite become None, the machine's paths their last part, the rest text."""
    if isinstance(value, Mapping):
        return {public(str(key)): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int)):
        return value
    return public(str(getattr(value, "value", value)))


def commit() -> str | None:
    """The git commit of the checkout that the package runs from, with "-dirty" where files differ; None outside of one."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        run = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(run, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def describe_dataset(
    name: str,
    examples: int,
    files: Sequence[str | None] = (),
    pinned: tuple[str, str] | None = None,
    *,
    split: str,
    evaluated: int | None = None,
    complete: bool = True,
    config: str | None = None,
) -> dict[str, Any]:
    """What a run was trained and evaluated on, for its record: of files, only names and digests are known to others.

    Args:
        name: as the script was given it: of a data set that comes with a package, a local folder or file, or a Hub id.
        examples: number of training examples.
        files: given in the place of the data set; None entries are left out. The default set's name is not theirs: where
            no other was given, they are called as the first of them.
        pinned: Hub id and revision that the name stands for.
        split: that the metrics are of.
        evaluated: number of its examples that they are of.
        complete: whether these are all that the split has.
        config: configuration of a Hub data set that has several.
    """
    evaluation = {"split": split, "evaluated": evaluated, "complete": complete}
    given = [Path(file) for file in files if file is not None]
    if given and name in EMBEDDED:
        name = given[0].stem
    if given or Path(name).exists():
        known = {"files": [file.name for file in given], "sha256": list(map(_digest, given))}
        return {"name": Path(name).name, **known, "examples": examples, **evaluation}
    hub_id, revision = pinned or (None if name in EMBEDDED else name, None)
    return {
        "name": name, "hub_id": hub_id, "revision": revision, "config": config, "examples": examples, **evaluation
    }  # fmt: skip


def _digest(path: Path) -> str | None:
    """SHA-256 of a file, in hexadecimal; None for a folder."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# What a group holds besides the hyperparameters of the run.
NO_OPTIONS = ("params", "agr", "agr_step", "agr_suspended", "initial_lr")


def optimizer_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Every hyperparameter of each parameter group, at the start of its schedule; and what the group holds."""
    found = []
    for group in layer_groups(optimizer):
        values = {key: value for key, value in group.items() if key not in NO_OPTIONS}
        values["lr"] = group.get("initial_lr", group["lr"])
        if "agr" in group:
            values["agr"] = f"{sum(agr_flags(group))} of {len(group['params'])} tensors"
        values = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in values.items()}
        counts = {"tensors": len(group["params"]), "parameters": sum(map(count_elements, group["params"]))}
        found.append({**values, **counts})
    return found


def count_elements(param: torch.Tensor) -> int:
    """The elements of the whole parameter: under ZeRO stage 3 it is empty itself."""
    return getattr(param, "ds_numel", param.numel())


def lower_is_better(metric: str) -> bool:
    """Of a metric by the words of its name: losses, perplexities, distances and errors."""
    return any(word in SMALLER or word.endswith(("loss", "error")) for word in re.split(r"[\W_]+", metric.lower()))


def summarize_gradients(entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What AGR did to the gradients in a run: means over its measurements, of the largest share the maximum.

    Args:
        entries: Trainer's `log_history`, or any mappings with the keys of `GradientStatistics`.

    Returns:
        "measurements", "overall" and "layers", each a mapping of the statistics; empty where nothing was measured.
    """
    values: dict[str, dict[str, list[tuple[float, float]]]] = {}
    measurements = 0
    for entry in entries:
        if not any(key.startswith("gradients/") for key in entry):
            continue
        weight = entry.get("gradients/overall/measurements", 1)
        measurements += weight
        for key, value in entry.items():
            name, _, statistic = key.removeprefix("gradients/").rpartition("/")
            if key.startswith("gradients/") and statistic != "measurements":
                values.setdefault(name, {}).setdefault(statistic, []).append((value, weight))
    if not measurements:
        return {}
    layers = {
        name: {
            key: max(value for value, _ in of)
            if key == "largest_share"
            else sum(value * weight for value, weight in of) / sum(weight for _, weight in of)
            for key, of in statistics.items()
        }
        for name, statistics in values.items()
    }
    layers.setdefault("overall", {})
    return {"measurements": measurements, "overall": layers.pop("overall"), "layers": layers}


def evaluation_metrics(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What `Trainer.evaluate` found, without the prefix and without how long it took."""
    found = {key.removeprefix("eval_"): value for key, value in entry.items() if key.startswith("eval_")}
    return without_timings(found)


def without_timings(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of an evaluation without how long it took."""
    timings = re.compile(r"(.*_)?runtime|.*_per_second|(.*_)?model_preparation_time")
    return {key: value for key, value in metrics.items() if not timings.fullmatch(key)}


def summarize_epochs(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Trainer's log as one mapping for each epoch: the mean training loss since the last, and what evaluation found.

    Of a second evaluation at the same step only the metrics are taken that the first has not: those of another data set.
    """
    epochs: list[dict[str, Any]] = []
    losses: list[tuple[float, int]] = []  # and of how many steps each is the mean
    last = 0
    for entry in log_history:
        if "loss" in entry:
            losses.append((entry["loss"], entry["step"] - last))
            last = entry["step"]
        if not any(key.startswith("eval_") for key in entry):
            continue
        if epochs and epochs[-1]["step"] == entry["step"]:
            epochs[-1] = {**epochs[-1], **{k: v for k, v in evaluation_metrics(entry).items() if k not in epochs[-1]}}
        else:
            steps = sum(steps for _, steps in losses)
            loss = sum(loss * steps for loss, steps in losses) / steps if steps else None
            epochs.append(
                {"epoch": entry["epoch"], "step": entry["step"], "train_loss": loss, **evaluation_metrics(entry)}
            )
            losses = []
    return epochs
