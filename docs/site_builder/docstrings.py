"""Docstrings are written with Markdown's single backticks; autodoc reads reStructuredText."""

import re

CODE = re.compile(r"`([^`]+)`")


def convert_backticks(app, what, name, obj, options, lines):
    pieces = CODE.split("\n".join(lines))
    for i, piece in enumerate(pieces):
        # Outside of code a bar is a norm and a trailing underscore an index, and neither is markup.
        pieces[i] = f"``{' '.join(piece.split())}``" if i % 2 else re.sub(r"(\||(?<=\w)_(?!\w))", r"\\\1", piece)
    lines[:] = "".join(pieces).split("\n")


def setup(app):
    app.connect("autodoc-process-docstring", convert_backticks, priority=100)  # before napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}
