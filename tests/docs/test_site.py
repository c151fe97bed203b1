"""The built site: its links, and a walk through it in headless Chromium.

    CYBN_GALLERY_SEEDS=1 sphinx-build -W docs site
    CYBN_SITE=site pytest -m slow tests/docs/test_site.py

If CYBN_SCREENSHOTS is a folder, a picture of each page of the walk is saved there.
"""

import os
import shutil
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import cybn

SITE = Path(os.environ.get("CYBN_SITE", "site"))
WALK = {
    "home": "index.html",
    "fifteen": "fifteen-minutes.html",
    "api": "api/cybn.batch_norm.html",
    "gallery": "auto_gallery/plot_drift.html",
    "math": "math.html",
    "tables": "performance-tables.html",
}
SIZES = {"wide": (1280, 900), "phone": (390, 844)}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--no-first-run"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SITE / "index.html").exists(), reason="no site: run sphinx-build -W docs site first"
    ),
]


class Anchors(HTMLParser):
    """The anchors that a page defines, and the targets of its links."""

    def __init__(self, page):
        super().__init__()
        self.names, self.links = set(), set()
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.names |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        self.links |= {attrs[key] for key in ("href", "src") if attrs.get(key)}


@pytest.fixture(scope="module")
def pages():
    found = SITE.resolve().rglob("*.html")
    return {page: Anchors(page) for page in found if "_static" not in page.parts}


def test_links_lead_to_a_page_and_a_heading(pages):
    broken = []
    for page, anchors in pages.items():
        for link in anchors.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            there = page.parent / unquote(url.path) if url.path else page
            there = (SITE.resolve() / url.path.lstrip("/")) if url.path.startswith("/") else there
            there = there.resolve() / "index.html" if there.is_dir() else there.resolve()
            known = pages[there].names if there in pages else set()
            if not there.exists() or (
                url.fragment and there in pages and unquote(url.fragment) not in known
            ):
                broken.append(f"{page.relative_to(SITE.resolve())}: {link}")
    assert len(pages) > 80
    assert not broken, "\n".join(broken)


def test_nothing_is_loaded_from_elsewhere(pages):
    """The site works without a network connection."""
    for page in pages:
        text = page.read_text("utf-8")
        assert 'src="http' not in text, page
        assert 'rel="stylesheet" href="http' not in text, page


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=os.fspath(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=chromium, args=FLAGS)
        yield launched
        launched.close()


def left(request):
    """Return whether a request was aborted because the walk went on to the next page."""
    return "ERR_ABORTED" in (request.failure or "")


@pytest.fixture
def opened(browser, address):
    """Return a function that opens a page of the site; fail if the browser reported problems."""
    complaints, contexts = [], []

    def show(path, size="wide", scheme="light"):
        width, height = SIZES[size]
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: m.type == "error" and complaints.append(f"{path}: {m.text}"))
        page.on("pageerror", lambda error: complaints.append(f"{path}: {error}"))
        page.on("requestfailed", lambda r: left(r) or complaints.append(f"{path}: {r.url} failed"))
        page.goto(address + path, wait_until="load")
        return page

    yield show
    for context in contexts:
        context.close()
    assert not complaints, "\n".join(complaints)


WIDER = """() => [...document.querySelectorAll('.bd-article *')].filter(e =>
    e.getBoundingClientRect().right > window.innerWidth + 1 &&
    !e.closest('table, pre, .math, math, .highlight, svg, .visually-hidden'))
    .map(e => e.tagName + ' ' + e.className + ' ' + e.textContent.slice(0, 60))"""


def assert_it_fits(page):
    """Check that nothing is wider than the window, except wide tables, which can scroll."""
    inner, outer = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert inner <= outer, page.evaluate(WIDER)
    for box in page.locator(".bd-article table").all():
        place = box.bounding_box()
        assert place is None or place["x"] + place["width"] <= outer + 1, box.inner_text()[:60]


def is_light(page):
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, background.strip("rgba()").split(",")[:3])) > 3 * 128


def assert_pictures_load(page):
    page.evaluate("document.querySelectorAll('img').forEach(i => { i.loading = 'eager' })")
    page.wait_for_function("[...document.images].every(i => i.complete)")
    broken = "[...document.images].filter(i => !i.naturalWidth).map(i => i.src)"
    assert page.evaluate(broken) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", WALK)
def test_pages(opened, name, size, scheme):
    page = opened(WALK[name], size, scheme)
    assert page.locator("h1").first.is_visible()
    assert_pictures_load(page)
    assert_it_fits(page)
    assert is_light(page) == (scheme == "light")
    if folder := os.environ.get("CYBN_SCREENSHOTS"):
        page.screenshot(path=os.path.join(folder, f"{name}-{size}-{scheme}.png"))


def test_every_page_fits_on_a_phone(opened, pages):
    page = opened("index.html", "phone")
    start = page.url.removesuffix("index.html")
    for path in sorted(pages):
        if path.name not in ("search.html", "genindex.html"):
            page.goto(start + os.fspath(path.relative_to(SITE.resolve())), wait_until="load")
            assert_it_fits(page)


def test_search_finds_the_page_on_lengths(opened):
    page = opened("search.html?q=lengths")
    page.locator("#search-results li a").first.wait_for()
    found = " ".join(page.locator("#search-results li a").all_inner_texts())
    assert "Padded sequences" in found


def test_the_header_has_the_version_and_the_switch_of_colours(opened):
    page = opened("index.html")
    header = page.locator("header.bd-header")
    assert cybn.__version__ in header.inner_text()
    for mode, light in (("dark", False), ("light", True)):
        page.locator("button.theme-switch-button:visible").first.click()
        page.locator(f"button.theme-change-button[data-mode={mode}]:visible").first.click()
        assert is_light(page) == light
