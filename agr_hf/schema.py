"""Tables of JSON that may be a stranger's, checked against typed dictionaries by huggingface_hub.

A module that declares such a dictionary has no `from __future__ import annotations`: types that are texts are not checked.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import validate_typed_dict

from agr_hf.texts import one_line

Number = int | float


def check_entries(table: Any, schema: Any) -> None:
    """What a schema names has its types, and is there where the schema needs it; other entries may be of any kind.

    Args:
        table: of JSON, or a list of tables.
        schema: a `TypedDict` with types that huggingface_hub's strict dataclasses know.

    Raises:
        ValueError: an entry is missing, or there is no table.
        StrictDataclassError: an entry has another type; `find_reason` says which.
    """
    for one in table if isinstance(table, list) else [table]:
        if not isinstance(one, dict):
            raise ValueError(f"{schema.__name__} expected a dict, got {type(one).__name__}")
        missing = sorted(schema.__required_keys__ - one.keys())
        if missing:
            raise ValueError(f"Field {missing[0]!r} is missing in {schema.__name__}")
        validate_typed_dict(schema, {name: one[name] for name in schema.__annotations__ if name in one})


def find_reason(error: BaseException) -> str:
    """What was said at the place where a check failed, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(str(error).partition(". Errors: ")[0])[:300]
