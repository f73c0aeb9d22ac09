"""Model cards and curves, from a run's `results.json` and nothing else."""

from __future__ import annotations

import importlib.resources
import json
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agr_hf.errors import UserError
from agr_hf.optim.registry import OPTIMIZERS
from agr_hf.tasks.record import RunRecord
from agr_hf.texts import code_span, markdown, one_line

CITATION = """@misc{agr2024,
  title = {Adaptive Gradient Regularization: A Faster and Generalizable Optimization Technique for Deep Neural
    Networks},
  author = {Jiang, Huixiu and Yang, Ling and Bao, Yu and Si, Rutong and Yang, Sikun},
  year = {2024},
  eprint = {2407.16944},
  archivePrefix = {arXiv}
}
@misc{adal2021,
  title = {AdaL: Adaptive Gradient Transformation Contributes to Convergences and Generalizations},
  author = {Zhang, Hongwei and Zou, Weidong and Zhao, Hongbo and Ming, Qi and Yan, Tijin and Xia, Yuanqing and Cao, Weipeng},
  year = {2021},
  eprint = {2107.01525},
  archivePrefix = {arXiv}
}"""
LAYERS_SHOWN = 10
MOST_PANELS = 6  # of metrics, in the picture
LEAST_SPAN = 0.1  # of an axis, as a share of its largest value
# What FID and IS are of, by the field's convention.
SAMPLES = 50_000
# What the Hub takes for the id of a data set, and for a tag.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")


@dataclass(frozen=True)
class Task:
    """What cards say of one workload.

    Attributes:
        what: the model, in words.
        library, pipeline: as the Hub names them.
        split: that the metrics are of.
        metrics: the names of the metrics that the Hub shows, by their key in `results.json`; the first is the main one.
        usage: Python that loads the model, with {repo_id} in it.
    """

    what: str
    library: str | None
    pipeline: str | None
    split: str
    metrics: Mapping[str, str]
    usage: str


TASKS: dict[str, Task] = {
    "image-classification": Task(
        what="An image classifier",
        library="transformers",
        pipeline="image-classification",
        split="test",
        metrics={"accuracy": "Top-1 accuracy", "top5_accuracy": "Top-5 accuracy", "loss": "Test loss"},
        usage="""from agr_hf.tasks.classifiers import register_small_image_models
from transformers import AutoImageProcessor, AutoModelForImageClassification

register_small_image_models()  # networks for small images are timm's with other stems
processor = AutoImageProcessor.from_pretrained({repo_id})
model = AutoModelForImageClassification.from_pretrained({repo_id})""",
    ),
    "demo": Task(
        what="The demo's image classifier",
        library="transformers",
        pipeline="image-classification",
        split="test",
        metrics={"test_accuracy": "Test accuracy", "test_loss": "Test loss", "loss": "Validation loss"},
        usage="""from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained({repo_id})""",
    ),
    "albert": Task(
        what="An ALBERT, for masked words and the order of sentences,",
        library="transformers",
        pipeline="fill-mask",
        split="validation",
        metrics={
            "sop_accuracy": "Sentence-order accuracy",
            "masked_accuracy": "Masked accuracy",
            "perplexity": "Perplexity of masked pieces",
            "loss": "Validation loss",
        },
        usage="""from transformers import AlbertForPreTraining, AutoTokenizer

model = AlbertForPreTraining.from_pretrained({repo_id})
tokenizer = AutoTokenizer.from_pretrained({repo_id})""",
    ),
    "ddpm": Task(
        what="A diffusion model of images",
        library="diffusers",
        pipeline="unconditional-image-generation",
        split="train",
        metrics={"fid": "FID", "inception_score": "Inception score", "loss": "Training loss"},
        usage="""from diffusers import DDIMPipeline

pipeline = DDIMPipeline.from_pretrained({repo_id})
images = pipeline(batch_size=16, num_inference_steps=100).images""",
    ),
}


def model_card(
    run: RunRecord,
    repo_id: str,
    *,
    curves: bool = False,
    samples: str | None = None,
    resumable: bool = False,
    compared: bool = False,
) -> str:
    """The text of README.md for a run.

    Args:
        run: what `read_record` gives.
        repo_id: where it is published.
        curves: whether `curves.png` is beside it.
        samples: path of a grid of samples beside it.
        resumable: whether the training state is published.
        compared: whether a report of `agr-hf compare` is beside it.

    Raises:
        UserError: the run is of a task that cards do not know.
    """
    from jinja2 import Environment, StrictUndefined

    task = find_task(run)
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)  # text is escaped by the filters
    environment.filters.update(md=markdown, code=code_span, number=_number)
    template = importlib.resources.files("agr_hf.model_cards").joinpath("card.md.jinja").read_text(encoding="utf-8")
    optimizer = run.optimizer
    info = OPTIMIZERS.get(optimizer)
    gradients = run.gradients
    layers = sorted((gradients.get("layers") or {}).items(), key=lambda item: -(item[1].get("effect") or 0.0))
    statistics = dict.fromkeys(("effect", "largest_share", "log_mean", "log_std"))
    layers = [(name, {**statistics, **layer}) for name, layer in layers]
    effect = (gradients.get("overall") or {}).get("effect")
    return environment.from_string(template).render(
        metadata=metadata(run, repo_id),
        title=title(run),
        task={"what": task.what, "usage": task.usage.format(repo_id=json.dumps(repo_id))},
        optimizer=info.title if info else optimizer,
        source=info.source if info else "of another package" if run.own_script else "Trainer's own",
        own_script=run.own_script,
        dataset=_dataset_words(run.dataset),
        evaluation=_evaluation_words(run.dataset, run.metrics),
        metrics=[(name, value) for name, value in _metrics(task, run.metrics) if value is not None],
        curves=curves,
        compared=compared,
        samples=urllib.parse.quote(samples) if samples else None,
        uses_agr=optimizer.startswith("agr_") or run.config.get("agr_attached") is True,
        effect=None if effect is None else 100 * effect,
        measurements=gradients.get("measurements"),
        layers=layers[:LAYERS_SHOWN],
        hidden=max(len(layers) - LAYERS_SHOWN, 0),
        groups=run.optimizer_groups,
        command=one_line(run.command).replace("```", "` ` `"),
        repo_id=repo_id,
        resumable=resumable,
        conditions=_conditions(run),
        citation=CITATION,
    )


def find_task(run: RunRecord) -> Task:
    """The workload of a run; UserError where cards do not know it."""
    if run.own_script:
        return _own_task(run)
    if run.task not in TASKS:
        raise UserError(f"there is no card for the task {run.task!r}; the tasks are {', '.join(TASKS)}")
    return TASKS[run.task]


def _own_task(run: RunRecord) -> Task:
    """Of a user's script: what its record says of the model, and every number that it measured."""
    config = run.config
    cls, base = config.get("model_class"), config.get("base_model")
    cls = cls if cls and re.fullmatch(r"[A-Za-z_]\w*", cls) else None
    loaded = "{repo_id}"
    if config.get("library") == "peft" and cls and _hub_id(base):
        usage = (
            f"from peft import PeftModel\nfrom transformers import {cls}\n\n"
            f'model = PeftModel.from_pretrained({cls}.from_pretrained("{base}"), {loaded})'
        )
    elif config.get("library") == "transformers" and cls:
        usage = f"from transformers import {cls}\n\nmodel = {cls}.from_pretrained({loaded})"
    else:
        usage = (
            "from huggingface_hub import hf_hub_download\nfrom safetensors.torch import load_file\n\n"
            f'weights = load_file(hf_hub_download({loaded}, "model.safetensors"))  # for the author\'s own class'
        )
    best = str(config.get("metric_for_best_model") or "").removeprefix("eval_")
    names = sorted((key for key in run.metrics if key not in ("loss", "train_loss")), key=lambda key: key != best)
    labels = {name: name.replace("_", " ") for name in names} | {"loss": "Evaluation loss"}
    if "loss" not in run.metrics:
        labels["train_loss"] = "Training loss"
    return Task(
        what=f"A {cls}" if cls else "A model",
        library=config.get("library") if config.get("library") in ("transformers", "peft") else None,
        pipeline=_hub_id(run.task) if run.task != "other" else None,
        split="evaluation",
        metrics=labels,
        usage=usage,
    )


def _hub_id(name: str | None) -> str | None:
    """A name that the Hub takes; None in the place of another."""
    return name if name and HUB_ID.fullmatch(name) else None


def title(run: RunRecord) -> str:
    """A name for people: model, data, optimizer."""
    config = run.config
    model = config.get("model_name") or (f"U-Net {config['unet']}" if config.get("unet") else "ALBERT")
    info = OPTIMIZERS.get(run.optimizer)
    name = run.dataset.get("name", "its data")
    return f"{model} on {name}, {info.title if info else run.optimizer}"


def metadata(run: RunRecord, repo_id: str) -> str:
    """The YAML header, as the Hub understands it: valid whatever the names in it are."""
    from huggingface_hub import EvalResult, ModelCardData

    task, dataset = find_task(run), run.dataset
    hub_id = _hub_id(dataset.get("hub_id"))
    name = one_line(dataset.get("name") or "unknown")
    evaluations = [
        EvalResult(
            task_type=task.pipeline or "other",
            dataset_type=hub_id or re.sub(r"[^\w.]+", "-", name).strip("-") or "unknown",
            dataset_name=name,
            dataset_config=dataset.get("config") if hub_id else None,
            dataset_split=dataset.get("split") or task.split,
            dataset_revision=dataset.get("revision") if hub_id else None,
            metric_type=re.sub(r"[^\w.\-]", "_", key),
            metric_name=label,
            metric_value=value,
        )
        for key, label, value in shown_metrics(task, run.metrics)
        if key != "train_loss" and (key != "loss" or task.split != "train")  # a training loss evaluates nothing
    ]
    data = ModelCardData(
        library_name=task.library,
        # Hub and pipeline() show every picture in RGB, which a grey model does not take.
        pipeline_tag=task.pipeline if run.config.get("channels") != 1 or task.library == "diffusers" else None,
        tags=[tag for tag in ("agr-hf", run.optimizer, run.task) if _hub_id(tag)],
        datasets=[hub_id] if hub_id else None,
        metrics=[evaluation.metric_type for evaluation in evaluations if evaluation.metric_type != "loss"] or None,
        base_model=_hub_id(run.config.get("base_model")),
        model_name=repo_id.split("/")[-1] if evaluations else None,
        eval_results=evaluations or None,
    )
    return data.to_yaml().strip()


def evaluation_file(run: RunRecord) -> str | None:
    """`.eval_results/agr_hf.yaml`: the main metric on a complete split of a data set of the Hub; None where there is none.

    The Hub lists such results beside those of others, so a loss, a part of a split, a distance of fewer than 50,000 samples
    or on a network of the user's choice is not among them.
    """
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    task, dataset = find_task(run), run.dataset
    shown = [entry for entry in shown_metrics(task, run.metrics) if entry[0] in task.metrics and entry[0] != "loss"]
    hub_id = _hub_id(dataset.get("hub_id"))
    if not hub_id or not shown or not dataset.get("complete"):
        return None
    samples = run.metrics.get("samples")
    if run.task == "ddpm" and not (isinstance(samples, int) and samples >= SAMPLES):
        return None
    key, label, value = shown[0]
    entry = EvalResultEntry(
        dataset_id=hub_id,
        task_id=f"{task.pipeline}_{key}",
        value=value,
        dataset_revision=dataset.get("revision"),
        date=run.finished,
        notes=f"{label} on the {dataset.get('split') or task.split} split, one run with seed {run.seed}",
    )
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)


def draw_curves(run: RunRecord, path: Any) -> bool:
    """Loss and metrics by epoch as PNG; False where there are fewer than two epochs."""
    from matplotlib.figure import Figure

    epochs = run.epochs
    if len(epochs) < 2:
        return False
    task = find_task(run)
    losses = {"train_loss": "Training loss", "loss": task.metrics["loss"]}
    panels = [list(losses.items())]
    panels += [[(key, label)] for key, label in task.metrics.items() if key not in losses][:MOST_PANELS]
    drawn = []
    for panel in panels:
        series = [(label, [(e["epoch"], e[key]) for e in epochs if _is_drawn(e.get(key))]) for key, label in panel]
        series = [(label, points) for label, points in series if points]
        if series:
            drawn.append(series)
    if not drawn:
        return False
    figure = Figure(figsize=(4 * len(drawn), 3.3), layout="constrained")
    for axes, series in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        for label, points in series:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 40 else None)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        low, high = axes.get_ylim()
        wide = LEAST_SPAN * max(abs(low), abs(high))
        if high - low < wide:  # a change of a fraction of a percent is no collapse
            axes.set_ylim((low + high - wide) / 2, (low + high + wide) / 2)
        axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(series), frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return True


def _is_drawn(value: Any) -> bool:
    """Whether matplotlib can put a number on an axis: the width of the axis must be a float too."""
    return isinstance(value, (int, float)) and abs(value) < 1e100


def shown_metrics(task: Task, metrics: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Key, label and value of the metrics that the Hub shows, finite numbers only."""
    labels = dict(task.metrics)
    labels |= {key: f"Fréchet distance, {key[17:]}" for key in metrics if key.startswith("frechet_distance_")}
    order = sorted(labels, key=lambda key: key == "loss")
    return [
        (key, labels[key], metrics[key])
        for key in order
        if isinstance(metrics.get(key), (int, float)) and not isinstance(metrics[key], bool)
    ]


def _metrics(task: Task, metrics: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Every metric of the run: those that the Hub shows first."""
    shown = shown_metrics(task, metrics)
    keys = {key for key, _, _ in shown}
    return [(label, value) for _, label, value in shown] + [(k, v) for k, v in metrics.items() if k not in keys]


def _dataset_words(dataset: Mapping[str, Any]) -> str:
    name = dataset.get("name") or "unknown data"
    words = f"{name} ({dataset['examples']:,} training examples)" if dataset.get("examples") else name
    return f"{words} from {', '.join(dataset['files'])}" if dataset.get("files") else words


def _evaluation_words(dataset: Mapping[str, Any], metrics: Mapping[str, Any]) -> str | None:
    """What the metrics are of, where the run wrote it down."""
    if not dataset.get("split"):
        return None
    of = f"{dataset['evaluated']:,} examples" if dataset.get("evaluated") else "examples"
    if isinstance(metrics.get("samples"), int):
        of = f"{metrics['samples']:,} samples, against {of}"
    part = "" if dataset.get("complete") or "complete" not in dataset else ", a part of it"
    return f"on {of} of the split {dataset['split']!r}{part}"


def _conditions(run: RunRecord) -> list[tuple[str, str]]:
    versions = run.versions
    seconds = run.seconds
    rows = {
        "seed": run.seed,
        "finished": run.finished,
        "training time": f"{seconds:,.0f} s" if isinstance(seconds, (int, float)) else None,
        "device": run.device,
        "processes": run.processes,
        "threads": run.torch_threads,
        "commit of agr_hf": run.commit,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()) or None,
    }
    return [(key, str(value)) for key, value in rows.items() if value is not None]


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–" if value is None else markdown(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
