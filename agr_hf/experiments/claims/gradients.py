"""Claims about gradients, seen in short runs on scikit-learn's digits: their law, their norms, their noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from scipy import stats
from torch import Tensor, nn

from agr_hf.experiments.claims.claim import Claim, Finding, Setting, interval
from agr_hf.optim.registry import create_optimizer
from agr_hf.optim.statistics import gradient_statistics
from agr_hf.tasks.classifiers import classifier
from agr_hf.tasks.digits import Images, load_digits

BATCH = 64


def digits_network(name: str, seed: int) -> nn.Module:
    """One of `classifier`'s networks for the digits, from the given seed."""
    torch.manual_seed(seed)
    return classifier(name, 8, 1, [str(i) for i in range(10)], [0.5], [0.5])


def compute_loss(model: nn.Module, data: Images, index: Tensor) -> Tensor:
    return model(pixel_values=data.pixel_values[index], labels=data.labels[index]).loss


def train_on_digits(
    name: str, optimizer: str, seed: int, steps: int, lr: float
) -> Iterator[tuple[int, nn.Module, torch.optim.Optimizer, Images]]:
    """Train; at every step, its number and the model with the gradients of a batch, before the optimizer takes them."""
    model, data = digits_network(name, seed), load_digits()["train"]
    made = create_optimizer(optimizer, model, lr=lr, weight_decay=0.0)
    draws = torch.Generator().manual_seed(seed)
    for step in range(steps):
        made.zero_grad()
        compute_loss(model, data, torch.randint(len(data), (BATCH,), generator=draws)).backward()
        yield step, model, made, data
        made.step()


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of the weights that AGR works on by default: those of two dimensions or more."""
    return {
        name: param.grad
        for name, param in model.named_parameters()
        if param.grad is not None and param.squeeze().ndim >= 2
    }


# ----------------------------------------------------------------------------------------------- lognormal

# Laws of |g| with two free parameters or one, fitted by moments or likelihood: a Kolmogorov distance each.
MAGNITUDES: dict[str, Callable[[numpy.ndarray], Any]] = {
    "lognormal": lambda x: stats.lognorm(s=numpy.log(x).std(), scale=numpy.exp(numpy.log(x).mean())),
    "half-normal (g is normal)": lambda x: stats.halfnorm(scale=numpy.sqrt((x**2).mean())),
    "exponential (g is Laplace)": lambda x: stats.expon(scale=x.mean()),
    "Weibull": lambda x: _weibull(x),
}  # fmt: skip


def _weibull(x: numpy.ndarray) -> Any:
    # log X of a Weibull variable has the deviation pi / (k sqrt(6)) and the mean log(scale) - 0.5772 / k.
    shape = numpy.pi / (numpy.log(x).std() * numpy.sqrt(6))
    return stats.weibull_min(c=shape, scale=numpy.exp(numpy.log(x).mean() + 0.5772156649 / shape))


QUANTILES = [0.001, 0.003, 0.01, 0.03, *(0.05 * k for k in range(1, 20)), 0.97, 0.99, 0.997, 0.999]


def measure_lognormal(setting: Setting) -> dict[str, Any]:
    """Kolmogorov's distance of each layer's |g| from four laws, early and late in training; quantiles of the first seed."""
    rows, quantiles, steps = [], [], setting.options["steps"]
    for network in ("vit-micro", "resnet-micro", "mlp"):
        for seed in range(setting.seeds):
            for step, model, _, _ in train_on_digits(network, "adamw", seed, max(steps) + 1, 1e-3):
                if step not in steps:
                    continue
                for layer, grad in matrices(model).items():
                    x = grad.abs().flatten().double().numpy()
                    x = x[x > 0]
                    if len(x) < 100:
                        continue
                    logarithm = numpy.log(x)
                    distances = {
                        law: round(float(stats.kstest(x, fit(x).cdf).statistic), 5) for law, fit in MAGNITUDES.items()
                    }
                    head = {"network": network, "layer": layer, "step": step}
                    rows.append({**head, "seed": seed, "elements": len(x), "zeros": int(grad.numel() - len(x)),
                                 "distance": distances, "log_skewness": round(float(stats.skew(logarithm)), 4)})  # fmt: skip
                    if seed == 0 and step == max(steps):
                        standard = (logarithm - logarithm.mean()) / logarithm.std()
                        quantiles.append(
                            {**head, "log_quantiles": numpy.quantile(standard, QUANTILES).round(4).tolist()}
                        )
            print(f"{network}, seed {seed}: {len(rows)} tensors")
    return {"steps": steps, "optimizer": "adamw", "rows": rows, "quantiles": quantiles}


def draw_lognormal(found: Mapping[str, Any], path: Path) -> None:
    """QQ plots of ln|g|, a line for each layer, against a normal law; beside it what normal gradients would give."""
    from matplotlib.figure import Figure

    networks = list(dict.fromkeys(of["network"] for of in found["quantiles"]))
    normal = stats.norm.ppf(QUANTILES)
    # ln|g| of a normal g: what is drawn where gradients are not lognormal but normal.
    half = numpy.log(stats.halfnorm.ppf(QUANTILES))
    draws = numpy.log(numpy.abs(numpy.random.default_rng(0).normal(size=100_000)))
    half = (half - draws.mean()) / draws.std()
    figure = Figure(figsize=(4 * len(networks), 3.8), layout="constrained")
    for axes, network in zip(figure.subplots(1, len(networks), squeeze=False)[0], networks, strict=True):
        for of in found["quantiles"]:
            if of["network"] == network:
                axes.plot(normal, of["log_quantiles"], color="tab:blue", linewidth=0.8, alpha=0.6)
        axes.plot(normal, normal, color="black", linewidth=1, label="|g| lognormal")
        axes.plot(normal, half, "--", color="tab:red", linewidth=1, label="g normal")
        axes.set(title=network, xlabel="normal quantiles", ylabel="quantiles of ln|g|, standardized", ylim=(-6, 4))
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def judge_lognormal(found: Mapping[str, Any]) -> Finding:
    """Nearly lognormal: a distance below 0.05, and nearest of the four distributions, in most tensors."""
    seeds = sorted({row["seed"] for row in found["rows"]})
    nearest, near, distance, skewness = [], [], [], []
    for seed in seeds:
        rows = [row for row in found["rows"] if row["seed"] == seed]
        nearest.append(numpy.mean([min(row["distance"], key=row["distance"].get) == "lognormal" for row in rows]))
        near.append(numpy.mean([row["distance"]["lognormal"] < 0.05 for row in rows]))
        distance.append(numpy.median([row["distance"]["lognormal"] for row in rows]))
        skewness.append(numpy.median([row["log_skewness"] for row in rows]))
    mean, low, high = interval(distance)
    laws = list(found["rows"][0]["distance"])
    medians = {law: float(numpy.median([row["distance"][law] for row in found["rows"]])) for law in laws}
    others = ", ".join(f"{law} {value:.3f}" for law, value in medians.items() if law != "lognormal")
    effect = (
        f"Kolmogorov's distance of |g| from a lognormal distribution: median {mean:.3f} ({low:.3f} to {high:.3f}); from "
        f"others: {others}; lognormal is the nearest of the four in {numpy.mean(nearest):.0%} of the tensors; "
        f"log|g| is skewed to the left ({numpy.mean(skewness):.2f})"
    )
    majority, close = interval(nearest), interval(near)
    if majority[1] > 0.5 and close[1] > 0.5:
        verdict = "confirmed"
    elif majority[2] < 0.5 and close[2] < 0.5:
        verdict = "contradicted"
    else:
        verdict = "in part"
    return Finding(verdict, effect, n=len(seeds))


# ----------------------------------------------------------------------------------------------- theorem 4.2


def measure_smaller_rate(setting: Setting) -> dict[str, Any]:
    """|m| with Psi over |m| without, by tenths of |m|: both averages of the same gradients of a run with AdamW(AGR)."""
    tenths: list[list[float]] = []
    for seed in range(setting.seeds):
        raw: dict[str, Tensor] = {}
        run = train_on_digits("vit-micro", "agr_adamw", seed, setting.options["steps"], 1e-3)
        for _, model, optimizer, _ in run:  # noqa: B007 (the optimizer is looked at when the run is over)
            for name, grad in matrices(model).items():
                raw.setdefault(name, torch.zeros_like(grad)).lerp_(grad, 0.1)
        by_tenth: list[list[Tensor]] = [[] for _ in range(10)]
        flags = {p for group in optimizer.param_groups if group.get("agr") for p in group["params"]}
        for name, param in model.named_parameters():
            if param not in flags or name not in raw:
                continue
            ratio = (optimizer.state[param]["exp_avg"] / raw[name]).flatten()
            for tenth, index in enumerate(raw[name].abs().flatten().argsort().chunk(10)):
                by_tenth[tenth].append(ratio[index].median())
        tenths.append([1 - float(torch.stack(of).mean()) for of in by_tenth])
        print(f"seed {seed}: the rate is smaller by {tenths[-1][0]:.1e} to {tenths[-1][-1]:.1e}")
    return {"network": "vit-micro", "reduction_by_tenth_of_size": tenths}


def judge_smaller_rate(found: Mapping[str, Any]) -> Finding:
    tenths = found["reduction_by_tenth_of_size"]
    first, last = interval([of[0] for of in tenths]), interval([of[-1] for of in tenths])
    more = interval([of[-1] - of[0] for of in tenths])
    effect = (
        f"where averaged gradients are smallest (a tenth of all elements) AGR shortens a step by {100 * first[0]:.2g}% "
        f"({100 * first[1]:.2g} to {100 * first[2]:.2g}%), where they are largest by {100 * last[0]:.2g}% "
        f"({100 * last[1]:.2g} to {100 * last[2]:.2g}%): a rate of 1e-3 becomes {1e-3 * (1 - last[0]):.6g}"
    )
    verdict = "confirmed" if more[1] > 0 else "contradicted" if more[2] < 0 else "cannot tell"
    return Finding(verdict, effect, n=len(tenths))


# ----------------------------------------------------------------------------------------------- AdaL's norms and noise


def measure_norms_fall(setting: Setting) -> dict[str, Any]:
    """l1 norms of the layers' gradients, the mean of the last tenth of a run over that of the first."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for network in ("mlp", "resnet-micro"):
        for seed in range(setting.seeds):
            norms: dict[str, list[float]] = {}
            for _, model, _, _ in train_on_digits(network, "adal", seed, setting.options["steps"], 1e-3):
                for layer, found in gradient_statistics(matrices(model).items()).items():
                    norms.setdefault(layer, []).append(found.l1_norm)
            tenth = max(1, setting.options["steps"] // 10)
            for layer, values in norms.items():
                ratio = float(numpy.mean(values[-tenth:]) / numpy.mean(values[:tenth]))
                ratios.setdefault(network, {}).setdefault(layer, []).append(ratio)
            print(f"{network}, seed {seed}")
    return {"steps": setting.options["steps"], "optimizer": "adal", "last_tenth_over_first": ratios}


def judge_norms_fall(found: Mapping[str, Any]) -> Finding:
    """In every layer of both networks: by the interval of log(last / first) over the seeds."""
    words, falls, rises = [], [], []
    for network, layers in found["last_tenth_over_first"].items():
        bounds = [interval(list(numpy.log(values))) for values in layers.values()]
        falls += [high < 0 for _, _, high in bounds]
        rises += [low > 0 for _, low, _ in bounds]
        middle = numpy.exp(numpy.median([mean for mean, _, _ in bounds]))
        words.append(f"{network}: to {middle:.2g} of the first tenth in the median of {len(bounds)} layers, falling in "
                     f"{sum(high < 0 for _, _, high in bounds)}")  # fmt: skip
    verdict = "confirmed" if all(falls) else "contradicted" if sum(rises) > len(rises) / 2 else "in part"
    first = next(iter(found["last_tenth_over_first"].values()))
    return Finding(verdict, "; ".join(words), n=len(next(iter(first.values()))))


def tail_index(noise: Tensor, block: int = 100) -> float:
    """The index alpha of a symmetric stable law, 2 for a normal one (Simsekli et al. 2019, theorem 2): its estimator by
    sums of blocks. `noise` has (n,) elements, of which whole blocks are used."""
    x = noise[: noise.numel() // block * block].double()
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))].view(-1, block)
    inverse = (x.sum(1).abs().log().mean() - x.abs().log().mean()) / numpy.log(block)
    return float(1 / inverse)


def measure_noise(setting: Setting) -> dict[str, Any]:
    """Tail index of the gradient noise that each optimizer steps on, as section 2.4 of the paper defines it."""
    found: dict[str, list[float]] = {"sgd": [], "adam": [], "adal": []}
    rates = {"sgd": 0.05, "adam": 1e-3, "adal": 1e-3}
    for seed in range(setting.seeds):
        for name in found:
            average: Tensor | None = None
            steps, indices = setting.options["steps"], []
            for step, model, _, data in train_on_digits("mlp", name, seed, steps, rates[name]):
                noise = _noise(model, data, scaled=name == "adal")
                average = noise if average is None or name == "sgd" else 0.9 * average + 0.1 * noise
                if step >= steps // 2 and step % 10 == 0:
                    indices.append(tail_index(average[average != 0]))
            found[name].append(float(numpy.mean(indices)))
        print(f"seed {seed}: " + ", ".join(f"{name} {values[-1]:.3f}" for name, values in found.items()))
    return {"network": "mlp", "tail_index": found}


def _noise(model: nn.Module, data: Images, *, scaled: bool) -> Tensor:
    """Gradient of all examples less that of the batch, with AdaL each times its layer's l1 norm; flat."""
    params = [param for param in model.parameters() if param.grad is not None]
    batch = [param.grad.clone() for param in params if param.grad is not None]
    whole = torch.autograd.grad(compute_loss(model, data, torch.arange(len(data))), params)
    factors = [(a.abs().sum(), b.abs().sum()) if scaled else (1.0, 1.0) for a, b in zip(whole, batch, strict=True)]
    return torch.cat([(p * a - q * b).flatten() for a, b, (p, q) in zip(whole, batch, factors, strict=True)])


def judge_noise(found: Mapping[str, Any]) -> Finding:
    """Nearer: |alpha of AdaL - alpha of SGD| less than |alpha of Adam - alpha of SGD|, paired over the seeds."""
    index = {name: numpy.asarray(values) for name, values in found["tail_index"].items()}
    nearer = interval(list(abs(index["adam"] - index["sgd"]) - abs(index["adal"] - index["sgd"])))
    shown = []
    for name, title in (("sgd", "SGD"), ("adam", "Adam"), ("adal", "AdaL")):
        mean, low, high = interval(list(index[name]))
        shown.append(f"{title} {mean:.3f} ({low:.3f} to {high:.3f})")
    effect = (
        f"tail index: {', '.join(shown)}; AdaL is nearer to SGD than Adam is by {nearer[0]:.3f} "
        f"({nearer[1]:.3f} to {nearer[2]:.3f})"
    )
    verdict = "confirmed" if nearer[1] > 0 else "contradicted" if nearer[2] < 0 else "cannot tell"
    return Finding(verdict, effect, n=len(index["sgd"]))


CLAIMS = [
    Claim(
        "agr-lognormal", "AGR", "section 2, after Chmiel et al. 2020", "gradients are approximately lognormal",
        "|g| of most layers is within 0.05 of a lognormal distribution (Kolmogorov), and nearer to it than to three others",
        "most layers are neither", measure_lognormal, judge_lognormal,
        {"small": Setting(seeds=8, options={"steps": [0, 50, 200]})}, draw_lognormal,
    ),
    Claim(
        "agr-smaller-rate", "AGR", "theorem 4.2", "AGR is a smaller learning rate where gradients are large",
        "the step shrinks more for the largest averages than for the smallest", "it shrinks less",
        measure_smaller_rate, judge_smaller_rate, {"small": Setting(seeds=8, options={"steps": 100})},
    ),
    Claim(
        "adal-norms-fall", "AdaL", "section 2.3, figures 1 and 2", "l1 norms of the gradients fall during training",
        "they fall in every layer of an MLP and of a ResNet", "they rise in most",
        measure_norms_fall, judge_norms_fall, {"small": Setting(seeds=8, options={"steps": 400})},
    ),
    Claim(
        "adal-noise", "AdaL", "section 2.4, figure 3", "the gradient noise of AdaL is nearer to SGD's than Adam's is",
        "its tail index is nearer to SGD's", "Adam's is nearer",
        measure_noise, judge_noise, {"small": Setting(seeds=8, options={"steps": 200})},
    ),
]  # fmt: skip
