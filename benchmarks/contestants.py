"""Who takes part in the benchmark of the step, on which lists of parameters, and what each is allowed to cost."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import nn

REFERENCE, CLIPPED = "torch AdamW fused", "clip + torch AdamW fused"
LR, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-4, 0.01, 1.0

# What a step must read and write for each float32 element, if it does so once: p, m, v and g are read and p, m and v
# written; AGR and AdaL read g twice, and clipping needs no third reading. torch's clipping reads g, then scales it in place.
# Adan keeps one moment and the last gradient more.
ADAMW_BYTES, AGR_BYTES, ADAN_BYTES = 28, 28 + 4, 44
CLIP_BYTES = 4 + 8


@dataclass(frozen=True)
class Contestant:
    """An optimizer as its users get it, that is with the defaults of its package.

    Attributes:
        make: parameters -> the optimizer.
        bytes: the least that a step must read and write for each float32 element.
        group: see `Model.groups`.
        package: the distribution that it comes from, where that is not a dependency.
        against: a second contestant to measure it with in the same rounds, beside the reference.
        clips: whether `clip_grad_norm_` is called before the step.
        tensors: float32 numbers that it keeps for each element, two sets of gradients included.
        compiles: whether its first steps take many seconds.
        ours: whether this package implements it.
    """

    name: str
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    bytes: int = ADAMW_BYTES
    group: str = "others"
    package: str | None = None
    against: str | None = None
    clips: bool = False
    tensors: int = 5
    compiles: bool = False
    ours: bool = False

    def build(self, params: list[nn.Parameter]) -> tuple[torch.optim.Optimizer, Callable[[], object]]:
        """The optimizer, and a function that takes a whole step of it."""
        optimizer = self.make(params)
        if not self.clips:
            return optimizer, optimizer.step

        def clip_and_step() -> None:
            nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM)
            optimizer.step()

        return optimizer, clip_and_step

    def is_installed(self) -> bool:
        try:
            return self.package is None or bool(version(self.package))
        except PackageNotFoundError:
            return False


def made_by(module: str, cls: str, **options):
    """A function that makes the class of that name; the module is imported when it is called."""

    options = {"weight_decay": WEIGHT_DECAY} | options

    def make(params):
        return getattr(importlib.import_module(module), cls)(params, lr=LR, **options)

    return make


def make_compiled_adamw(params):
    optimizer = made_by("torch.optim", "AdamW")(params)
    optimizer.step = torch.compile(optimizer.step)
    return optimizer


def make_compiled_lists(params):
    optimizer = made_by("agr_hf", "AGRAdamW", foreach=True, capturable=params[0].is_cuda)(params)
    optimizer.step = torch.compile(optimizer.step)
    return optimizer


def make_schedulefree_adamw(params):
    optimizer = made_by("schedulefree", "AdamWScheduleFree")(params)
    optimizer.train()  # it refuses to step otherwise
    return optimizer


def enlist_torch(name, group="others", **options):
    return Contestant(name, made_by("torch.optim", "AdamW", **options), group=group)


def enlist_ours(name, cls, bytes, group, *, against=None, tensors=5, **options):
    make = made_by("agr_hf", cls, **options)
    return Contestant(name, make, bytes, group, against=against, tensors=tensors, ours=True)


def enlist_other(package, module, cls, bytes=ADAMW_BYTES, *, tensors=5, **options):
    name = f"{package} {cls}"
    return Contestant(name, made_by(module, cls, **options), bytes, package=package, tensors=tensors)


_LIST = (
    enlist_torch(REFERENCE, "core", fused=True),
    enlist_ours("AGRAdamW", "AGRAdamW", AGR_BYTES, "core"),
    Contestant(CLIPPED, made_by("torch.optim", "AdamW", fused=True), ADAMW_BYTES + CLIP_BYTES, "core", clips=True),
    enlist_ours("AGRAdamW max_grad_norm", "AGRAdamW", AGR_BYTES, "core", against=CLIPPED, max_grad_norm=MAX_GRAD_NORM),
    enlist_ours("AGRAdamW agr=False", "AGRAdamW", ADAMW_BYTES, "main", agr=False),
    enlist_ours("AdaL", "AdaL", AGR_BYTES, "main", weight_decay=0.0),  # its default
    # L2 decay is part of the gradient whose norm is taken: the parameter is read twice as well.
    enlist_ours("AdaL with L2 decay", "AdaL", AGR_BYTES + 4, "main"),
    enlist_ours("Adan", "Adan", ADAN_BYTES, "others", tensors=7),
    enlist_ours("AGRAdan", "AGRAdan", ADAN_BYTES + 4, "others", against="timm Adan", tensors=7),
    enlist_other("timm", "timm.optim", "Adan", ADAN_BYTES, tensors=7, no_prox=False),
    enlist_other("pytorch-optimizer", "pytorch_optimizer", "Adan", ADAN_BYTES, tensors=7),
    enlist_torch("torch AdamW for-loop", foreach=False, fused=False),
    enlist_torch("torch AdamW foreach", foreach=True),
    enlist_other("timm", "timm.optim", "NAdamW"),
    # pytorch-optimizer's AdamW is torch's own class; this is the closest to it with a step of its own.
    enlist_other("pytorch-optimizer", "pytorch_optimizer", "StableAdamW"),
    enlist_other("torch-optimi", "optimi", "AdamW"),
    Contestant("schedulefree AdamW", make_schedulefree_adamw, package="schedulefree"),
    # A C++ loop that is compiled when one is first made, which takes a minute or more.
    enlist_other("deepspeed", "deepspeed.ops.adam", "DeepSpeedCPUAdam"),
    Contestant("torch AdamW compiled", make_compiled_adamw, group="compiled", compiles=True),
    enlist_ours("AGRAdamW foreach", "AGRAdamW", AGR_BYTES, "others", foreach=True),
    Contestant("AGRAdamW foreach compiled", make_compiled_lists, AGR_BYTES, "compiled", compiles=True, ours=True),
    Contestant("flashoptim FlashAdamW", made_by("flashoptim", "FlashAdamW"), package="flashoptim"),
    Contestant("heavyball AdamW", made_by("heavyball", "AdamW"), group="compiled", package="heavyball", compiles=True),
)
CONTESTANTS = {contestant.name: contestant for contestant in _LIST}


@dataclass(frozen=True)
class Model:
    """The parameters of a model, by shape.

    Attributes:
        shapes: () -> the shapes, computed from a configuration where the model is that of a library; no weights are made.
        groups: of contestants, that run on it by default.
        budget: of AGRAdamW's step on the CPU, against the reference.
    """

    name: str
    shapes: Callable[[], list[tuple[int, ...]]]
    groups: tuple[str, ...] = ("core", "main")
    budget: float = 1.12


def shapes_on_meta(build: Callable[[], nn.Module]) -> Callable[[], list[tuple[int, ...]]]:
    """The shapes of a module's parameters, tied ones once, without their memory."""

    def shapes():
        with torch.device("meta"):
            return [tuple(p.shape) for p in build().parameters()]

    return shapes


def build_resnet18():
    return importlib.import_module("torchvision.models").resnet18()


def build_vit_base():
    return importlib.import_module("timm").create_model("vit_base_patch16_224")


def build_albert_base():
    from transformers import AlbertConfig, AlbertForMaskedLM

    return AlbertForMaskedLM(AlbertConfig(hidden_size=768, num_attention_heads=12, intermediate_size=3072))


def build_bert_small():
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=2048)
    )


def build_bert_base():
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig())


def build_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config())


def build_ddpm_unet():
    """DDPM's for CIFAR-10."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0,
        freq_shift=1,
        flip_sin_to_cos=False,
        norm_eps=1e-6,
    )


def lora_shapes(rank=8, layers=32, hidden=4096, intermediate=11008):
    """LoRA on the seven linear layers of each block of a 7B llama: A is rank x in, B is out x rank."""
    attention = [(hidden, hidden)] * 4
    mlp = [(hidden, intermediate)] * 2 + [(intermediate, hidden)]
    return [shape for n_in, n_out in attention + mlp for shape in ((rank, n_in), (n_out, rank))] * layers


def shapes_of_size(numel):
    """Tensors of a million elements, or one of fewer."""
    return [(1000, 1000)] * (numel // 10**6) or [(numel // 1000, 1000)]


MOST = ("core", "main", "others")
MODELS = {
    model.name: model
    for model in (
        Model("resnet18", shapes_on_meta(build_resnet18), MOST),
        Model("vit-base", shapes_on_meta(build_vit_base)),
        Model("albert-base", shapes_on_meta(build_albert_base)),
        Model("bert-small", shapes_on_meta(build_bert_small), (*MOST, "compiled")),
        Model("bert-base", shapes_on_meta(build_bert_base)),
        Model("gpt2", shapes_on_meta(build_gpt2)),
        Model("ddpm-unet", shapes_on_meta(build_ddpm_unet), MOST),
        Model("llama-7b-lora", lora_shapes, MOST, 0.85),
        Model("24x1M", lambda: [(1024, 1024)] * 24),
        Model("300x64x64", lambda: [(64, 64)] * 300, MOST, 0.45),
        Model("1000x8", lambda: [(8,)] * 1000, budget=0.30),
        *(
            Model(f"{numel:.0e}".replace("+0", ""), lambda numel=numel: shapes_of_size(numel), ("core",))
            for numel in (10**5, 3 * 10**5, 10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8, 3 * 10**8)
        ),
    )
}
SIZES = [name for name, model in MODELS.items() if model.groups == ("core",)]
QUICK_MODELS = ["resnet18", "bert-small", "llama-7b-lora", "300x64x64", "1000x8", "1e5", "1e6", "1e7"]


def step_budget(contestant: str, model: Model, device: str) -> float | None:
    """The ratio to stay below: to `Contestant.against`, or where there is none to the reference."""
    if device == "cuda":
        return {"AGRAdamW": 1.15, "AGRAdamW max_grad_norm": 0.85}.get(contestant)
    return {"AGRAdamW": model.budget, "AGRAdamW max_grad_norm": 0.78, "AdaL": 1.15, "AGRAdan": 0.35}.get(contestant)


def memory_budget(numel: int) -> float:
    """Bytes that a step of ours may need at its peak beyond what it found: 1% of the parameters or 4 MiB."""
    return max(0.01 * 4 * numel, 4 * 2**20)


TRAINER_BUDGET = 0.85
