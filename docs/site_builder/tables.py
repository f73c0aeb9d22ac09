"""Directives that write what stands in the code and in the measurements, so that pages cannot contradict them."""

import inspect
import json
from pathlib import Path

from agr_hf.training_scripts.train_albert import RECIPES as ALBERT_RECIPES
from sphinx.util.docutils import SphinxDirective

from agr_hf.experiments.claims import CLAIMS, read_claims
from agr_hf.optim.registry import OPTIMIZERS, optimizer_info
from agr_hf.tasks.diffusion import RECIPES as DIFFUSION_RECIPES
from agr_hf.tasks.recipes import IMAGE_RECIPES

ROOT = Path(__file__).parents[2]
STEPS = ROOT / "benchmarks/results/step-cpu-2-threads-models.json"
PRECISION = ROOT / "benchmarks/results/low-precision.json"
RELEASED = ROOT / "benchmarks/results/in-backward.json"
MODELS = {
    "bert-small": "BERT-small, 29M parameters",
    "bert-base": "BERT-base, 110M parameters",
    "24x1M": "24 tensors of 1M elements",
    "llama-7b-lora": "LoRA, 448 tensors",
    "300x64x64": "300 tensors of 64x64",
    "1000x8": "1,000 tensors of 8 elements",
}
CONTESTANTS = {
    "agr_adamw": ["AGRAdamW", "AGRAdamW agr=False", "AGRAdamW max_grad_norm", "clip + torch AdamW fused"],
    "agr_adan": ["AGRAdan", "Adan", "timm Adan"],
    "adal": ["AdaL", "AdaL with L2 decay"],
    "adan": ["Adan", "timm Adan"],
}


def make_table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def describe_names(name: str) -> str:
    """Under which names an optimizer is found."""
    info = optimizer_info(name)
    timm = f"`{info.timm_name}`" + (" (timm's own Adan, equal to this one to the bit)" if name == "adan" else "")
    rows = [
        ["class", f"`agr_hf.{info.cls.__name__}`"],
        ["`create_optimizer`", f"`{name}`"],
        ["Trainer's `optim`", f"`{name}`"],
        ["timm's `--opt`", timm],
        ["in papers and cards", info.title],
        ["published in", info.source],
        [
            "state of a parameter",
            ", ".join(f"`{key}`" for key in ("step", *info.cls.state_keys, *info.cls.scalar_state)),
        ],
        ["step on the CPU", "native (C)" if info.cls.native_rule else "operations over lists of tensors"],
        ["`.grad`", "is not changed"],
    ]
    return make_table(["", ""], rows)


def describe_hyperparameters(name: str) -> str:
    """Defaults from the signature, ranges from the options."""
    cls = optimizer_info(name).cls
    betas = "three numbers in [0, 1)" if cls.betas_count == 3 else "two numbers in [0, 1)"
    ranges = {"lr": "a number >= 0", "betas": betas, "eps": "a number >= 0", "weight_decay": "a number >= 0"}
    rows = []
    for key, parameter in inspect.signature(cls).parameters.items():
        if key != "params":
            allowed = ranges.get(key) or cls.options[key].allowed
            rows.append([f"`{key}`", f"`{parameter.default!r}`", allowed])
    return make_table(["argument", "default", "allowed"], rows)


def describe_recipes(name: str) -> str:
    """The recipes of the training scripts that train with an optimizer."""
    rows = []
    for script, recipes in (
        ("train_image_classifier.py", IMAGE_RECIPES), ("train_albert.py", ALBERT_RECIPES),
        ("train_ddpm.py", DIFFUSION_RECIPES),
    ):  # fmt: skip
        for recipe, values in recipes.items():
            if values.get("optim") == name:
                decay = values.get("weight_decay", values.get("adam_weight_decay", ""))
                epochs = values.get("num_train_epochs", values.get("num_epochs", ""))
                numbers = (values["learning_rate"], decay, values["total_batch_size"], epochs)
                rows.append([f"`{recipe}`", f"`{script}`", *map(str, numbers)])
    return make_table(["recipe", "script", "rate", "decay", "batch", "epochs"], rows)


def describe_cost(name: str) -> str:
    """What a step takes, as a ratio to torch's fused AdamW, and the conditions."""
    found = json.loads(STEPS.read_text(encoding="utf-8"))
    ratios = {(row["model"], row["contestant"]): row["ratio"] for row in found["rows"] if row["status"] == "measured"}
    columns = CONTESTANTS[name]
    rows = [[title, *(f"{ratios[model, contestant]:.2f}" for contestant in columns)] for model, title in MODELS.items()]
    conditions = (
        f"Time of a step divided by that of `torch.optim.AdamW(fused=True)` on the same tensors: medians of interleaved "
        f"rounds, {found['torch_threads']} threads, {found['device']}, torch {found['versions']['torch']}. Measured by "
        f"`make bench` and kept in `benchmarks/results/{STEPS.name}`."
    )
    return f"{make_table(['', *columns], rows)}\n\n{conditions}"


def describe_claims(names: str) -> str:
    """Claims with their verdicts, as a list: it can be read on a phone."""
    found = read_claims(ROOT / "docs/claims")
    lines = []
    for name in names.split():
        claim = CLAIMS[name]
        finding = claim.judge(found[name]["measured"]) if name in found else None
        what = "Not measured."
        if finding:
            verdict, effect = (text[0].upper() + text[1:] for text in (finding.verdict, finding.effect))
            what = f"**{verdict}** (n = {finding.n}). {effect}."
        lines.append(f"- `{name}` ({claim.paper}, {claim.where}): {claim.says}. {what}")
    return "\n".join(lines)


def describe_optimizers(_: str) -> str:
    rows = [
        [f"[{info.cls.__name__}]({name}.md)", f"`{name}`", info.description, info.source]
        for name, info in OPTIMIZERS.items()
        if info.ours
    ]
    return make_table(["class", "name", "what it is", "published in"], rows)


def describe_precision(_: str) -> str:
    """Validation losses in bfloat16 beside float32."""
    found = json.loads(PRECISION.read_text(encoding="utf-8"))
    titles = {
        "digits": "A ViT of 105,000 parameters on scikit-learn's digits",
        "albert": "A small ALBERT on the embedded text",
    }
    texts = []
    for name, workload in found["workloads"].items():
        if "table" not in workload:
            continue
        rows = [
            [
                row["variant"],
                f"{row['bytes']:.0f}",
                f"{row['loss']:.4f}",
                f"{row['more_loss']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]" if "low" in row else "",
                row.get("verdict", ""),
            ]
            for row in workload["table"]
        ]
        head = ["parameters", "bytes of a parameter", "validation loss", "above float32, 95% interval", "verdict"]
        texts.append(f"{titles[name]}, {min(row['n'] for row in workload['table'])} seeds:\n\n{make_table(head, rows)}")
    conditions = (
        f"The bytes are of a parameter, its gradient and its state. A difference of {found['margin']} does not matter here. "
        f"Measured by `python benchmarks/low_precision.py` on {found['environment']['device']}, torch "
        f"{found['environment']['versions']['torch']}, and kept in `benchmarks/results/{PRECISION.name}`."
    )
    return "\n\n".join([*texts, conditions])


def describe_released(_: str) -> str:
    """Memory of a step inside of the backward pass."""
    found = json.loads(RELEASED.read_text(encoding="utf-8"))
    after, inside = (found["ways"][way] for way in ("after the backward pass", "inside of it"))
    return (
        f"BERT-base ({after['parameters'] / 1e6:.0f} million float32 parameters), one text of {found['tokens']} tokens, "
        f"{found['device']}: {inside['peak_mib']:,.0f} MiB at most instead of {after['peak_mib']:,.0f}. The largest "
        f"gradient, of the embedding, stays. Measured by `python benchmarks/in_backward.py`; GPUs: not measured."
    )


class MarkdownDirective(SphinxDirective):
    """Parses the Markdown that `write` returns for the directive's argument."""

    required_arguments = 0
    optional_arguments = 1
    final_argument_whitespace = True
    write = None

    def run(self):
        for path in (STEPS, PRECISION, RELEASED, *sorted((ROOT / "docs/claims").glob("*.json"))):
            self.env.note_dependency(str(path))
        return self.parse_text_to_nodes(type(self).write(" ".join(self.arguments)))


def setup(app):
    for name, write in {
        "names": describe_names, "hyperparameters": describe_hyperparameters, "recipes": describe_recipes,
        "cost": describe_cost, "claims": describe_claims, "optimizers": describe_optimizers,
        "precision": describe_precision, "released": describe_released,
    }.items():  # fmt: skip
        app.add_directive(name, type(name, (MarkdownDirective,), {"write": staticmethod(write)}))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
