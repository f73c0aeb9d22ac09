"""Formulas as SVG when the site is built: no script, no font and no network when it is read."""

import html

import ziamath
from docutils import nodes
from sphinx.util.docutils import SphinxTranslator

# The units of an SVG are pixels of a font of this size; widths in em follow the reader's font.
FONT_SIZE = 24


def draw_formula(tex: str, is_inline: bool) -> str:
    """A formula as an SVG element whose baseline is that of the line of text around it."""
    formula = ziamath.Latex(tex, size=FONT_SIZE, inline=is_inline, color="currentColor")
    drawing = formula.svgxml()
    width, height = (float(drawing.attrib.pop(name)) / FONT_SIZE for name in ("width", "height"))
    _, top, _, full_height = map(float, drawing.attrib["viewBox"].split())
    below_baseline = (top + full_height) / FONT_SIZE
    drawing.attrib |= {
        "class": "formula",
        "role": "img",
        "aria-label": tex.strip(),
        "style": f"width:{width:.3f}em;height:{height:.3f}em;vertical-align:{-below_baseline:.3f}em",
    }
    return ziamath.zmath.ET.tostring(drawing, encoding="unicode")


def visit_inline(self: SphinxTranslator, node: nodes.math) -> None:
    self.body.append(draw_formula(node.astext(), is_inline=True))
    raise nodes.SkipNode


def visit_block(self: SphinxTranslator, node: nodes.math_block) -> None:
    self.body.append(f'<div class="formula-block" tabindex="0" title="{html.escape(node.astext().strip())}">')
    self.body.append(draw_formula(node.astext(), is_inline=False))
    self.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("svg", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
