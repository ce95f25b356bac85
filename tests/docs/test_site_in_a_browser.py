"""Every page of the site in a real browser: it loads nothing from elsewhere and draws all.

Needs Playwright for Python and a Chromium, which is looked for in the path and in the environment
variable CHROMIUM. Pictures of all pages go into the folder that MINIPAGED_SCREENSHOTS names.
"""

import functools
import os
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from minipaged.labs.chapters.reading import chapters_of, folder
from minipaged.labs.chapters.slides import slide_files
from minipaged.utils.files import write_new_files

playwright_api = pytest.importorskip(
    "playwright.sync_api", reason="needs the extra `browser`: pip install -e '.[browser]'"
)

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = [
    pytest.mark.full,
    pytest.mark.xdist_group("site"),
    pytest.mark.skipif(CHROMIUM is None, reason=f"none of {', '.join(NAMES)} is installed"),
    pytest.mark.timeout(1800),  # the first of them builds the site, and may run all chapters
]

SCREENSHOTS = os.environ.get("MINIPAGED_SCREENSHOTS")
SIZES = {"wide": {"width": 1280, "height": 900}, "narrow": {"width": 390, "height": 844}}


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(built_site: Path) -> Iterator[str]:
    """The site, served on this machine."""
    handler = functools.partial(QuietHandler, directory=str(built_site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A page in a tab that notes everything that goes wrong in it."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.address = address
        self.faults: list[str] = []
        self.tab = browser.new_page(**options)
        self.tab.on("console", self._console)
        self.tab.on("pageerror", lambda error: self.faults.append(f"raised {error}"))
        self.tab.on("requestfailed", self._failure)
        self.tab.on("request", self._request)
        self.tab.on("response", self._response)

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(f"{message.type} {message.text}")

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.address, "data:", "blob:", "about:")):
            self.faults.append(f"asked for {request.url}")

    def _failure(self, request: Any) -> None:
        if request.failure != "net::ERR_ABORTED":  # the tab went on before it had loaded
            self.faults.append(f"{request.failure} {request.url}")

    def _response(self, response: Any) -> None:
        if response.status >= 400:
            self.faults.append(f"{response.status} {response.url}")

    def open(self, page: str) -> None:
        """Load a page and wait until its maths and diagrams are drawn."""
        self.tab.goto(self.address + page, wait_until="load")
        self.tab.wait_for_function(
            "() => !document.querySelector('pre.diagram, div.diagram:not(:has(svg)),"
            " .arithmatex:not(:has(.katex))')"
        )


def pages_of(site: Path) -> list[str]:
    """Addresses below the site's own; of the source pages, which are alike, one."""
    pages = sorted(
        path.relative_to(site).as_posix()
        for path in site.rglob("*.html")
        if path.name != "404.html"  # its links are to the root of a server
    )
    sources = [page for page in pages if page.startswith("source/")]
    return [page for page in pages if page not in sources[1:]]


def pages_with(site: Path, *parts: str) -> list[str]:
    """Those with one of the parts in their HTML."""
    texts = {page: (site / page).read_text("utf-8") for page in pages_of(site)}
    return [page for page, text in texts.items() if any(part in text for part in parts)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_renders_completely_without_other_hosts(scheme, browser, address, built_site):
    visit = Visit(browser, address, color_scheme=scheme)
    for page in pages_of(built_site):
        visit.tab.set_viewport_size(SIZES["wide"])
        visit.open(page)
        assert visit.tab.locator(".katex-error").count() == 0, f"{page}: a formula is wrong"
        for frame in visit.tab.locator("iframe.replay").all():
            frame.scroll_into_view_if_needed()  # it may load only then
            frame.content_frame.locator("#forward").wait_for()
            shows = frame.evaluate("frame => frame.contentDocument.documentElement.dataset.scheme")
            assert shows == scheme, f"{page}: the visualiser is {shows}"
        visit.tab.evaluate("scrollTo(0, 0)")
        for size in SIZES:
            visit.tab.set_viewport_size(SIZES[size])
            overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert visit.tab.evaluate(overflow) <= 0, f"{page} is wider than a {size} window"
            if SCREENSHOTS is not None:
                name = f"{page.removesuffix('.html').replace('/', '-')}-{scheme}-{size}.png"
                visit.tab.screenshot(path=Path(SCREENSHOTS) / name, full_page=True)
        assert not visit.faults, f"{page}: {visit.faults}"
    visit.tab.close()


def test_a_change_of_the_palette_reaches_diagrams_and_the_visualiser(browser, address, built_site):
    visit = Visit(browser, address, color_scheme="light")
    for page in pages_with(built_site, 'class="diagram"', 'class="replay"'):
        visit.open(page)
        drawn = "[...document.querySelectorAll('div.diagram')].map(box => box.innerHTML)"
        light = visit.tab.evaluate(drawn)
        visit.tab.emulate_media(color_scheme="dark")
        visit.tab.wait_for_function(
            "() => document.body.dataset.mdColorScheme === 'slate' &&"
            " [...document.querySelectorAll('iframe.replay')].every("
            "    frame => frame.contentDocument.documentElement.dataset.scheme === 'dark')"
        )
        visit.tab.wait_for_function(
            f"light => {drawn}.every((dark, i) => dark !== light[i])", arg=light
        )
        visit.tab.emulate_media(color_scheme="light")
    assert not visit.faults
    visit.tab.close()


def test_the_visualiser_steps_by_keys_and_buttons(browser, address, built_site):
    visit = Visit(browser, address)
    for page in pages_with(built_site, 'class="replay"'):
        visit.open(page)
        for frame in visit.tab.locator("iframe.replay").all():
            frame.scroll_into_view_if_needed()  # it may load only then
            inside = frame.content_frame
            inside.locator("#forward").wait_for()
            first = shown(frame)
            inside.locator("#forward").click()
            second = shown(frame)
            assert second != first, f"{page}: a button makes no step"
            inside.locator("#where").click()  # the keys then go to the page, and to no button
            visit.tab.keyboard.press("ArrowLeft")
            assert shown(frame) == first, f"{page}: the left arrow does not step back"
            visit.tab.keyboard.press("ArrowRight")
            assert shown(frame) == second, f"{page}: the right arrow does not step forward"
            visit.tab.keyboard.press("End")
            assert shown(frame) not in (first, second), f"{page}: End does not lead to the end"
        assert not visit.faults, f"{page}: {visit.faults}"
    visit.tab.close()


def shown(frame: Any) -> Any:
    """The state of the memory that a visualiser shows, and the words above it."""
    state = frame.evaluate("frame => frame.contentWindow.replay.state()")
    return state, frame.content_frame.locator("#where").inner_text()


def test_slides_follow_the_keys_fit_the_screen_and_print_one_to_a_page(browser, tmp_path):
    chapters = chapters_of(folder())
    write_new_files(slide_files(chapters, tmp_path), force=False)
    for scheme in ("light", "dark"):
        visit = Visit(browser, f"{tmp_path.as_uri()}/", color_scheme=scheme)
        visit.tab.goto(visit.address + "slides.html")
        for size in SIZES.values():
            visit.tab.set_viewport_size(size)
            too_large = """[...document.querySelectorAll('.slide')].filter(slide =>
                slide.scrollHeight > slide.clientHeight || slide.scrollWidth > slide.clientWidth
            ).map(slide => slide.innerText)"""
            assert visit.tab.evaluate(too_large) == []
        place = "Math.round(scrollY / innerHeight)"
        for key, slide in (("End", 14), ("ArrowLeft", 13), ("Home", 0), ("PageDown", 1), (" ", 2)):
            visit.tab.keyboard.press(key)
            assert visit.tab.evaluate(place) == slide, f"{key!r} does not lead to slide {slide}"
        assert not visit.faults
        pdf = visit.tab.pdf(prefer_css_page_size=True)
        assert len(re.findall(rb"/Type\s*/Page\b", pdf)) == len(chapters)
        visit.tab.close()


def test_the_site_and_its_search_work_without_a_server(browser, built_site):
    visit = Visit(browser, f"{built_site.as_uri()}/")
    visit.open("index.html")
    visit.tab.locator(".md-search__input").fill("watermark")
    results = visit.tab.locator(".md-search-result__item")
    results.first.wait_for()
    addresses = [each.get_attribute("href") for each in results.locator("a").all()]
    assert any("tutorials/" in address for address in addresses)
    assert not any("source/" in address for address in addresses)
    results.locator("a").first.click()
    visit.tab.locator("h1").first.wait_for()
    assert not visit.faults
    visit.tab.close()
