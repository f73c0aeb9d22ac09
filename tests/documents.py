"""Markdown pages: their blocks of code and their links."""

import ast
import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md"))


def read_blocks(page, language):
    """The blocks of a language, those in comments included, each behind as many empty lines as precede it in the page."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in found]


def find_missing_modules(block):
    """Top-level modules that a block imports and that are not installed."""
    names = set()
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return sorted(name for name in names if importlib.util.find_spec(name) is None)


def read_text(page):
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def find_links(page):
    """Targets of links and images, outside of code."""
    return re.findall(r"\[[^\]]*\]\(\s*([^)\s]+)\s*\)", re.sub(r"`[^`\n]*`", "", read_text(page)))


def find_anchors(page):
    """Anchors of headings, as GitHub and the site name them."""
    headings = re.findall(r"^#+ (.*)$", read_text(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
