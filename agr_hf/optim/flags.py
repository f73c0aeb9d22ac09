"""A group's `agr`: one answer for all of its parameters, or one for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def agr_flags(group: Mapping[str, Any]) -> list[bool]:
    """Whether AGR is wanted for each parameter of a group; a group that does not say wants it for all."""
    flags = group.get("agr", True)
    return list(flags) if isinstance(flags, list) else [bool(flags)] * len(group["params"])
