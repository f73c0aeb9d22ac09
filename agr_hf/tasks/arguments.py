"""The command line of a script: dataclasses with recipes, what was given on it, and what of it others may repeat."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import HfArgumentParser

from agr_hf.tasks.recipes import apply_recipe, given_arguments


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


class ScriptParser(HfArgumentParser):
    """HfArgumentParser with recipes, that takes whole names only.

    A field's metadata may have `repeatable`: whether `agr-hf resume` and `reproduce` take the argument over from a run of
    others. True (the default), False, or a pattern that all of the value must match.

    Args:
        *kinds: dataclasses of arguments, one of them with `recipe`.
        recipes: values by the name of a recipe; see `apply_recipe`.
        description: for --help.
        **defaults: win over those of the dataclasses.

    Attributes:
        repeatable: what the metadata says, by argument.
    """

    def __init__(
        self, *kinds: type, recipes: Mapping[str, Mapping[str, Any]], description: str | None = None, **defaults: Any
    ) -> None:
        self.repeatable: dict[str, bool | str] = {}
        self.recipes = recipes
        super().__init__(
            kinds, allow_abbrev=False, description=description, epilog=f"Recipes: {', '.join(recipes) or 'none'}",  # type: ignore[arg-type]
            formatter_class=_Help,
        )  # fmt: skip
        self.set_defaults(**defaults)

    def add_argument(self, *names: str, repeatable: bool | str = True, **options: Any) -> argparse.Action:
        """As of any parser; HfArgumentParser passes the metadata of a field here."""
        action = super().add_argument(*names, **options)
        self.repeatable[action.dest] = repeatable if action.dest != "help" else False
        return action

    def parse(self, argv: Sequence[str] | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The dataclasses, with the defaults of the recipe; and what the command line itself gave.

        Args:
            argv: None for the command line of this process.

        Raises:
            SystemExit: the command line is refused; the message says why.
        """
        apply_recipe(self, self.recipes, argv)
        given = given_arguments(self, argv)  # before the other, which raises ValueError for an unknown argument
        # A file of arguments beside the script would be in no record.
        return self.parse_args_into_dataclasses(argv, look_for_args_file=False), given
