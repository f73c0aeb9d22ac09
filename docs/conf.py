"""Sphinx configuration of the site: `make docs` builds it, with every warning an error."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from agr_hf import __version__

project = "agr_hf"
author = "the authors of agr_hf"
copyright = "the authors of agr_hf, Apache-2.0"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "site_builder.docstrings",
    "site_builder.drawings",
    "site_builder.formulas",
    "site_builder.tables",
]
exclude_patterns = ["site_builder/**"]
html_theme = "furo"
html_title = f"agr_hf {__version__}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "svg"
html_copy_source = False
html_show_sphinx = False

# GitHub shows the same files: $formulas$, tables and links are those of its Markdown.
myst_enable_extensions = ["dollarmath", "substitution"]
myst_heading_anchors = 4
myst_dmath_double_inline = True

default_role = "code"
# Of other projects, whose pages a reader without a network does not have.
nitpick_ignore_regex = [("py:.*", r"(torch|accelerate|transformers)\..*")]
autodoc_typehints = "none"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 90
python_display_short_literal_types = True
napoleon_use_rtype = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"
