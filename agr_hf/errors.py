"""The error whose message is written for the user: commands and scripts show it as a sentence, without a traceback."""

from __future__ import annotations

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
