"""`agr-hf app` in headless Chromium: one command, every tab, phone and desktop, light and dark."""

import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_report import comparison

pytestmark = pytest.mark.browser
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ROOT = Path(__file__).parents[1]
SCREENSHOTS = ROOT / "build/screenshots"
SIZES = {"phone": {"width": 390, "height": 844}, "desktop": {"width": 1280, "height": 900}}


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here; Debian's package chromium has it")
    pytest.importorskip("gradio", reason="gradio is not installed; make test-browser installs it")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed; make test-browser installs it"
    )
    with playwright.sync_playwright() as started:
        # No sandbox: the tests may be run as root, and the pages are our own.
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    comparison(folder / "comparisons/first")
    return folder


@contextmanager
def serve(*command):
    """The address that a command says; Ctrl-C ends it."""
    with subprocess.Popen(
        [sys.executable, "-u", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        said = process.stdout.readline()
        found = re.fullmatch(r"The app is at (http://127\.0\.0\.1:\d+/)\. Stop it with Ctrl-C\.\n", said)
        if not found:
            process.kill()
            pytest.fail(f"the app said {said!r} and {process.stderr.read()}")
        yield found[1]
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()


@pytest.fixture(scope="module")
def address(browser, root):
    with serve("-m", "agr_hf", "app", str(root)) as address:
        yield address


@pytest.fixture
def open_page(browser, address):
    """Opens the app; at the end no error was logged, and nothing was asked of another server."""
    opened, errors, elsewhere = [], [], []

    def watch(request):
        if not request.url.startswith((address, "data:", "blob:")):
            elsewhere.append(request.url)

    def open_one(size="desktop", scheme="light"):
        page = browser.new_page(viewport=SIZES[size], color_scheme=scheme)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", watch)
        page.goto(address)
        page.wait_for_selector("#trajectories polyline", state="attached")
        opened.append(page)
        return page

    yield open_one
    for page in opened:
        page.close()
    assert errors == []
    assert elsewhere == []


def test_optimizers_are_chosen_and_run_step_by_step(open_page):
    page = open_page()
    assert page.locator("#trajectories polyline").count() == 3
    page.get_by_label("Optimizer 4").click()
    page.get_by_role("option", name="Adan(AGR)").click()
    page.get_by_role("button", name="Run").click()
    page.wait_for_function("document.querySelectorAll('#trajectories polyline').length == 4")
    offset = "parseFloat(getComputedStyle(document.querySelector('#trajectories polyline')).strokeDashoffset)"
    early = page.evaluate(offset)
    page.wait_for_timeout(1500)
    assert 0 < page.evaluate(offset) < early
    page.wait_for_function(f"{offset} == 0", timeout=15_000)


def test_an_input_that_is_not_allowed_is_said_in_a_sentence(open_page):
    page = open_page()
    page.get_by_label("Learning rate").first.fill("0")
    page.get_by_role("button", name="Run").click()
    page.get_by_text("AdamW has the learning rate 0; give a number above 0 and at most 100").wait_for()
    page.get_by_role("tab", name="Layers").click()
    page.get_by_label("Model").fill("../../etc")
    page.get_by_label("Model").press("Enter")
    page.get_by_role("button", name="Measure").click()
    page.get_by_text("'../../etc' is not allowed; choose a model from the list").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_every_tab_fits_the_screen_in_both_colour_schemes(size, scheme, open_page):
    page = open_page(size, scheme)

    def check(tab):
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.wait_for_timeout(500)  # until the result has faded in
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / f"{tab}-{size}-{scheme}.png", full_page=True)

    page.get_by_label("Draw step by step").uncheck()
    page.get_by_role("button", name="Run").click()
    page.wait_for_function("!document.querySelector('#trajectories animate')")
    check("trajectories")
    page.get_by_role("tab", name="Layers").click()
    page.get_by_role("button", name="Measure").click()
    page.locator("#layers table").wait_for()
    assert "AGR takes" in page.locator("#layers").inner_text()
    check("layers")
    page.get_by_role("tab", name="Reports").click()
    report = page.frame_locator("#report iframe")
    report.get_by_role("heading", name="Verdicts").wait_for()
    assert "95% interval +0.65 to +1.15" in report.locator("body").inner_text()
    # The report and the app around it have the same colours: light text in both, or dark text in both.
    brightness = "element => Math.max(...getComputedStyle(element).color.match(/\\d+/g).slice(0, 3).map(Number))"
    for text in (report.locator("h1"), page.locator("h1")):
        assert (text.evaluate(brightness) > 128) == (scheme == "dark")
    check("report")


@pytest.mark.parametrize("path", ["/etc/passwd", "{root}/comparisons/first/comparison.json", "../../../etc/passwd"])
def test_the_server_hands_out_no_file(path, address, root):
    for route in ("gradio_api/file=", "file=", "gradio_api/file/", "static/"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{address}{route}{path.format(root=root)}")
        assert caught.value.code in (403, 404)


def test_the_space_starts_with_its_comparison(browser, tmp_path):
    shutil.copytree(ROOT / "space", tmp_path / "space")
    with serve(str(tmp_path / "space/app.py")) as address:
        page = browser.new_page()
        page.goto(address)
        page.get_by_role("tab", name="Reports").click()
        page.frame_locator("#report iframe").get_by_text("AdaL against Adam, distance").wait_for()
        page.close()
