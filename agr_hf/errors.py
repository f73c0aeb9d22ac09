"""The error whose message is written for the user: commands and scripts show it as a sentence, without a traceback."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

# Modules of the extra `train`, and what pip calls them.
EXTRA = {
    **{
        name: name
        for name in ("datasets", "diffusers", "evaluate", "filelock", "matplotlib", "optuna", "scipy", "timm")
    },
    "sklearn": "scikit-learn",
    "torch_fidelity": "torch-fidelity",
    "torchvision": "torchvision",
}


class UserError(ValueError):
    """What was asked for cannot be done; the message says why, and what to do instead."""


def describe_missing(error: ModuleNotFoundError) -> str | None:
    """A sentence for a missing package of the extra `train`; None for another module, whose traceback says more."""
    package = EXTRA.get((error.name or "").partition(".")[0])
    return package and (
        f"{package} is not installed; install it with pip install {package}, or all that the experiments need with "
        f'pip install "agr-hf[train]"'
    )


def suggest(given: str, known: Iterable[str]) -> str:
    """Words to follow a name that is nearly one of those known: " (did you mean X?)"; none for others."""
    near = get_close_matches(given, list(known), n=1, cutoff=0.75)
    return f" (did you mean {near[0]}?)" if near else ""
