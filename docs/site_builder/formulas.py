"""Formulas as SVG when the site is built: no script, no font and no network when it is read."""

import html
import re
from xml.etree import ElementTree

import ziamath
from docutils import nodes
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxTranslator

# The units of an SVG are pixels of a font of this size; widths in em follow the reader's font.
FONT_SIZE = 24
ALIGNED = re.compile(r"\s*\\begin\{aligned\}(.*)\\end\{aligned\}\s*", re.DOTALL)


def draw_formula(tex: str, is_inline: bool) -> str:
    """A formula as an SVG element whose baseline is that of the line of text around it."""
    formula = ziamath.Latex(tex, size=FONT_SIZE, inline=is_inline, color="currentColor")
    drawing = formula.svgxml()
    width, height = (float(drawing.attrib.pop(name)) / FONT_SIZE for name in ("width", "height"))
    _, top, _, full_height = map(float, drawing.attrib["viewBox"].split())
    below_baseline = (top + full_height) / FONT_SIZE
    if height > 5:
        raise ExtensionError(f"a delimiter of this formula grows without end, size it by \\Bigl and \\Bigr: {tex}")
    drawing.attrib |= {
        "class": "formula",
        "style": f"width:{width:.3f}em;height:{height:.3f}em;vertical-align:{-below_baseline:.3f}em",
    }
    return ElementTree.tostring(drawing, encoding="unicode")


def draw_block(tex: str) -> str:
    """A displayed formula. Aligned lines are rows of a table, whose browser aligns them better than ziamath does."""
    aligned = ALIGNED.fullmatch(tex)
    if not aligned:
        return draw_formula(tex, is_inline=False)
    rows = [[draw_formula(cell, is_inline=False) for cell in row.split("&")] for row in re.split(r"\\\\", aligned[1])]
    lines = ("".join(f"<span>{cell}</span>" for cell in row) for row in rows)
    return '<span class="formula-rows">' + "".join(f"<span>{line}</span>" for line in lines) + "</span>"


def visit_inline(self: SphinxTranslator, node: nodes.math) -> None:
    tex = html.escape(node.astext().strip())
    self.body.append(f'<span role="img" aria-label="{tex}">{draw_formula(node.astext(), is_inline=True)}</span>')
    raise nodes.SkipNode


def visit_block(self: SphinxTranslator, node: nodes.math_block) -> None:
    tex = html.escape(node.astext().strip())
    self.body.append(
        f'<div class="formula-block" role="img" aria-label="{tex}" tabindex="0">{draw_block(node.astext())}</div>\n'
    )
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("svg", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
