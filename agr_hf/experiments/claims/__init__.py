"""The claims of both papers, and two of the package's own: what each says, and what a measurement says of it.

A measurement is a JSON file, `NAME.json`; its verdict comes from what is in it and from nothing else.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from agr_hf.environment import environment
from agr_hf.errors import UserError
from agr_hf.experiments.claims import cost, gradients, theory, training
from agr_hf.experiments.claims.claim import SIZES, VERDICTS, Claim, Finding, Setting
from agr_hf.files import replaced_file, write_text
from agr_hf.tasks.runs import commit, plain
from agr_hf.texts import public

__all__ = [
    "CLAIMS",
    "SIZES",
    "VERDICTS",
    "Claim",
    "Finding",
    "Setting",
    "claims_table",
    "criteria",
    "read_claims",
    "run_claim",
]

_ORDER = """
    agr-norm agr-jacobian agr-smaller-rate agr-cost agr-lognormal agr-ddpm agr-digits agr-cifar agr-tiny-imagenet
    agr-albert agr-suspended agr-faster-smoother adal-functions adal-accuracy adal-loss adal-norms-fall adal-noise
    adal-regret adal-vit rule scope
""".split()
_ALL = {claim.name: claim for module in (theory, gradients, cost, training) for claim in module.CLAIMS}
CLAIMS: dict[str, Claim] = {name: _ALL.pop(name) for name in _ORDER}


def run_claim(
    name: str,
    size: str,
    output: str | os.PathLike[str],
    *,
    seeds: int | None = None,
    workers: int = 1,
    arguments: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure a claim, write `NAME.json` (and `NAME.png`, where it has a picture) under `output`, and return the JSON.

    Args:
        name: a key of `CLAIMS`.
        size: one of the claim's sizes.
        output: folder; runs of a training claim are kept under `output/runs` and not repeated.
        seeds: in the place of the claim's number.
        workers: runs at a time.
        arguments: for the training script, such as the place of files.

    Raises:
        UserError: there is no such claim, or it is not offered at that size.
        RuntimeError: runs failed.
    """
    if name not in CLAIMS:
        raise UserError(f"there is no claim {name!r}; the names are {', '.join(CLAIMS)}")
    claim = CLAIMS[name]
    if size not in claim.sizes:
        raise UserError(f"{name} is not measured at the size {size!r}; it is at {', '.join(claim.sizes)}")
    setting = claim.sizes[size]
    setting = replace(
        setting, output=Path(output) / "runs", workers=workers, arguments=tuple(arguments),
        seeds=setting.seeds if seeds is None else seeds,
    )  # fmt: skip
    measured = json.loads(json.dumps(plain(claim.measure(setting))))
    finding = claim.judge(measured)
    extra = ["--", *map(public, arguments)] if arguments else []
    command = ["agr-hf", "claim", "run", name, "--size", size, *(["--seeds", str(seeds)] if seeds else []), *extra]
    found = plain({
        "claim": name, "size": size, "command": shlex.join(command), "verdict": finding.verdict, "effect": finding.effect,
        "n": finding.n, "measured": measured, "commit": commit(), **environment(),
    })  # fmt: skip
    Path(output).mkdir(parents=True, exist_ok=True)
    # A line for each entry: the values of all seeds would make thousands.
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in found.items())
    write_text(Path(output) / f"{name}.json", f"{{\n{lines}\n}}\n")
    if claim.draw:
        with replaced_file(Path(output) / f"{name}.png") as path:
            claim.draw(measured, path)
    return found


def read_claims(folder: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Measurements in a folder by claim."""
    found = {}
    for name in CLAIMS:
        path = Path(folder) / f"{name}.json"
        if path.exists():
            try:
                found[name] = json.loads(path.read_text(encoding="utf-8"))
                found[name]["measured"], found[name]["size"]
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{path} is no measurement of a claim ({error!r}); measure it again: agr-hf claim run {name}"
                ) from None
    return found


def claims_table(found: Mapping[str, Mapping[str, Any]], links: str | None = None) -> str:
    """All claims as a Markdown table, with the verdicts of those that were measured, and with a link to the file of each in
    the folder `links`."""
    lines = ["| claim | of | says | verdict | effect | n | size |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for name, claim in CLAIMS.items():
        own = found.get(name)
        verdict, effect, n, size = "not measured", "", "", "only " + ", ".join(claim.sizes)
        if own:
            finding = claim.judge(own["measured"])
            verdict, effect, n, size = f"**{finding.verdict}**", finding.effect, str(finding.n), own["size"]
            if given := own.get("command", "").partition(" -- ")[2]:
                size += f", with {given}"
        shown = f"[`{name}`]({links}/{name}.json)" if own and links else f"`{name}`"
        cells = [shown, f"{claim.paper}, {claim.where}", claim.says, verdict, effect, n, size]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def criteria() -> str:
    """What would confirm and contradict each claim, as a Markdown list."""
    return "\n".join(
        f"- `{name}`: confirmed by: {claim.confirmed_by}; contradicted by: {claim.contradicted_by}."
        for name, claim in CLAIMS.items()
    )
