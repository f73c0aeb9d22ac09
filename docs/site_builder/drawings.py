"""Drawings (SVG under docs/images) become part of their page, so that their colours follow light and dark."""

from pathlib import Path

from docutils import nodes


def inline_drawings(app, doctree, docname):
    for image in list(doctree.findall(nodes.image)):
        path = Path(app.srcdir) / image["uri"]
        if path.suffix == ".svg" and path.parent.name == "images":
            drawing = path.read_text(encoding="utf-8")
            image.replace_self(nodes.raw("", f'<div class="drawing">{drawing}</div>', format="html"))


def setup(app):
    app.connect("doctree-resolved", inline_drawings)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
