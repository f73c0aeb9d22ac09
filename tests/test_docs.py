"""The pages under docs/: their Python runs, their links lead somewhere; and the site that `make docs` writes of them."""

import html.parser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from documents import PAGES, ROOT, find_anchors, find_links, find_missing_modules, read_blocks

from agr_hf.optim.registry import OPTIMIZERS

OURS = [name for name, info in OPTIMIZERS.items() if info.ours]
SITE = ROOT / "site"
WITH_PYTHON = [page for page in PAGES if read_blocks(page, "python")]


def page_name(page):
    return page.relative_to(ROOT / "docs").as_posix()


@pytest.mark.parametrize("page", WITH_PYTHON, ids=page_name)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    missing = set()
    for block in read_blocks(page, "python"):
        lacks = find_missing_modules(block)
        missing |= set(lacks)
        if not lacks:
            exec(compile(block, str(page), "exec"), namespace)
    if missing:
        names = " ".join(sorted(missing))
        pytest.skip(f"all blocks but those with {names} ran: pip install {names}")


@pytest.mark.parametrize(
    "page", [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))], ids=lambda p: p.name
)
def test_the_links_of_a_page_lead_to_files_and_headings(page):
    for link in find_links(page):
        if urlparse(link).scheme:
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else (page.parent / unquote(path)).resolve()
        # Of the site's pages none may name a folder: it would be taken for a page of that name.
        assert target.is_file() or (target.is_dir() and page not in PAGES), link
        if anchor and target.suffix == ".md":
            assert anchor in find_anchors(target), link


@pytest.mark.parametrize("name", OURS)
def test_every_optimizer_has_a_page_with_the_same_sections(name):
    text = (ROOT / f"docs/optimizers/{name}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {OPTIMIZERS[name].cls.__name__}\n")
    for section in ("When to use it", "When not to use it", "The rule", "Cost", "Hyperparameters", "API"):
        assert f"\n## {section}\n" in text
    assert f":pyobject: {name}\n" in text


def test_every_page_is_in_the_contents_of_the_site():
    listed = {line.strip() for block in read_blocks(ROOT / "docs/index.md", "{toctree}") for line in block.splitlines()}
    assert {page_name(page).removesuffix(".md") for page in PAGES} - {"index"} <= listed


# ------------------------------------------------------------------------------------------------ the site, as written


class Page(html.parser.HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if tag == "link" and "stylesheet" in (attrs.get("rel") or ""):
            self.loads.append(attrs["href"])
        if tag in ("script", "img", "iframe", "source") and attrs.get("src"):
            self.loads.append(attrs["src"])


@pytest.fixture(scope="module")
def site():
    if not (SITE / "index.html").exists():
        pytest.fail("there is no site/index.html; make docs writes it")
    return {path: Page(path) for path in sorted(SITE.rglob("*.html"))}


@pytest.mark.docs
def test_the_site_has_25_pages_and_one_for_each_optimizer(site):
    pages = {path.relative_to(SITE).as_posix() for path in site} - {"genindex.html", "py-modindex.html", "search.html"}
    assert len(pages) >= 25
    assert {f"optimizers/{name}.html" for name in OURS} <= pages


@pytest.mark.docs
def test_no_link_of_the_site_is_broken_and_none_leaves_for_what_it_shows(site):
    for path, page in site.items():
        for link in [*page.links, *page.loads]:
            parts = urlparse(link)
            if parts.scheme or parts.netloc:
                assert link in page.links, f"{path}: {link} would need a network"
                continue
            target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            assert target.exists(), f"{path}: {link}"
            if parts.fragment and target.suffix == ".html":
                assert unquote(parts.fragment) in site[target].ids, f"{path}: {link}"


@pytest.mark.docs
def test_the_styles_of_the_site_load_nothing_from_elsewhere():
    for style in SITE.rglob("*.css"):
        assert "url(http" not in style.read_text(encoding="utf-8").replace('"', "").replace("'", ""), style
        assert "@import" not in style.read_text(encoding="utf-8"), style


@pytest.mark.docs
def test_the_search_index_knows_every_page():
    index = Path(SITE / "searchindex.js").read_text(encoding="utf-8")
    assert all(f'"{page_name(page).removesuffix(".md")}"' in index for page in PAGES)
