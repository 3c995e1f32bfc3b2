"""The built pages in a browser: headless Chromium that can reach this machine only.

Every page is opened over http and from the file system. Needs a build in ``_build/html`` (`make
book`, `make test` and `make check` make one first) or makes its own. Without a browser these tests
are skipped, and say so; ``COMPANION_REQUIRE_BROWSER=1`` makes that a failure.
"""

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 2_000_000  # bytes of a page's own HTML and pictures

# axe's findings that come from upstream: (rule, part of the element's HTML) -> cause.
ALLOWED = {
    ("aria-required-children", 'role="list"'): "sphinxcontrib-bibtex marks its list by a role",
    ("aria-deprecated-role", 'role="doc-biblioentry"'): "Sphinx: ARIA retired this role later on",
}


def toc() -> list[str]:
    """The pages in the table of contents, without their ending."""
    book = yaml.safe_load((ROOT / "_toc.yml").read_text("utf8"))
    chapters = [chapter["file"] for part in book["parts"] for chapter in part["chapters"]]
    return [re.sub(r"\.(md|ipynb)$", "", file) for file in (book["root"], *chapters)]


PAGES = toc()
NOTEBOOKS = [page for page in PAGES if (ROOT / f"{page}.ipynb").is_file()]
OTHERS = ["genindex", "search", "index"]


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The folder of the built pages: `make`'s, or one built here."""
    built = ROOT / "_build" / "html"
    if (ROOT / "_build" / "inputs").is_file() and _newer(built):
        return built
    folder = tmp_path_factory.mktemp("pages")
    done = subprocess.run(
        [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", ".",
         "-W", "-n", "--keep-going", "--path-output", folder],
        cwd=ROOT, env={"PYTHONPATH": str(ROOT)} | os.environ | {"PYTHONUTF8": "1"},
        capture_output=True, text=True, encoding="utf8",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "_build" / "html"


def _newer(built: Path) -> bool:
    """Whether every page is newer than its source and than what shapes all pages."""
    shared = [ROOT / "_config.yml", ROOT / "_toc.yml", ROOT / "book" / "references.bib"]
    for folder in ("_ext", "book/_assets", "book/figures"):
        shared += [path for path in (ROOT / folder).rglob("*") if path.suffix != ".pyc"]
    newest = max(path.stat().st_mtime for path in shared if path.is_file())
    for page in PAGES:
        html, sources = (
            built / f"{page}.html",
            [*ROOT.glob(f"{page}.ipynb"), *ROOT.glob(f"{page}.md")],
        )
        if not html.is_file() or html.stat().st_mtime < max(
            newest, *(source.stat().st_mtime for source in sources)
        ):
            return False
    return True


@pytest.fixture(scope="session")
def chromium():
    """A browser, or a skip that says what is missing."""
    from playwright.sync_api import Error, sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge", "microsoft-edge")
    found = os.environ.get("COMPANION_BROWSER") or next(
        filter(None, map(shutil.which, names)), None
    )
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except Error as error:
            message = (
                "No browser: looked for Chromium, Chrome and Edge on the PATH and for playwright's "
                f"own. Install one, or set COMPANION_BROWSER. ({str(error).splitlines()[0]})"
            )
            if os.environ.get("COMPANION_REQUIRE_BROWSER") == "1":
                pytest.fail(message)
            pytest.skip(message)
        yield browser
        browser.close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="session")
def served(site) -> Iterator[str]:
    """The pages over http."""
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class Visit:
    """One page in a tab of its own; everything that it asks of other places is refused and kept."""

    def __init__(self, chromium, base: str, **options: object) -> None:
        self.outside: list[str] = []
        self.errors: list[str] = []
        self.base = base
        self.context = chromium.new_context(**options)
        self.context.route("**/*", self._route)
        self.tab = self.context.new_page()
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.on("console", self._console)

    def _route(self, route) -> None:
        address = route.request.url
        if address.startswith((self.base + "/", "data:", "blob:")):
            route.continue_()
        else:
            self.outside.append(address)
            route.abort()

    def _console(self, message) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def open(self, page: str) -> "Visit":
        self.tab.goto(f"{self.base}/{page}.html", wait_until="load")
        self.tab.wait_for_function(
            "!window.MathJax || (window.MathJax.startup && window.MathJax.startup.promise"
            " && window.MathJax.startup.promise.then(() => true))"
        )
        self.tab.evaluate("document.fonts.ready.then(() => true)")
        return self

    def __enter__(self) -> "Visit":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.fixture(params=["http", "file"])
def base(request, site, served) -> str:
    return served if request.param == "http" else site.as_uri()


@pytest.mark.parametrize("page", PAGES + OTHERS)
def test_a_page_needs_nothing_from_elsewhere_and_has_no_errors(chromium, base, page):
    with Visit(chromium, base) as visit:
        visit.open(page)
        visit.tab.mouse.wheel(0, 5000)
        visit.tab.wait_for_timeout(200)
        assert visit.outside == []
        assert visit.errors == []


@pytest.mark.parametrize("page", PAGES)
def test_equations_are_typeset(chromium, base, page):
    with Visit(chromium, base) as visit:
        visit.open(page)
        written = visit.tab.locator("article .math").count()
        if not written:
            pytest.skip("no equations on this page")
        assert visit.tab.locator("article .math mjx-container").count() >= written
        assert visit.tab.locator("mjx-merror").count() == 0
        # drawn with MathJax's own type, not only marked up
        assert visit.tab.evaluate("document.fonts.check('16px MJXTEX-I')")
        article = visit.tab.locator("article").inner_text()
        assert "\\(" not in article and "\\[" not in article


@pytest.mark.parametrize("page", NOTEBOOKS)
def test_every_control_moves_by_keyboard(chromium, base, page):
    with Visit(chromium, base) as visit:
        visit.open(page)
        for control in visit.tab.locator(".scrub").all():
            control.scroll_into_view_if_needed()
            slider, view = (
                control.locator("input[type=range]"),
                control.locator(".scrub-view").first,
            )
            slider.focus()
            visit.tab.keyboard.press("Home")  # wherever it starts, the last frame too
            before = view.screenshot(), control.locator(".scrub-says").inner_text()
            spoken, alt = (
                slider.get_attribute("aria-valuetext"),
                view.locator("img").get_attribute("alt"),
            )
            visit.tab.keyboard.press("End")
            assert view.screenshot() != before[0]
            assert control.locator(".scrub-says").inner_text() != before[1]
            assert (
                slider.get_attribute("aria-valuetext")
                == control.locator(".scrub-says").inner_text()
            )
            assert slider.get_attribute("aria-valuetext") != spoken
            assert view.locator("img").get_attribute("alt") != alt
            visit.tab.keyboard.press("ArrowLeft")
            assert slider.input_value() == str(int(slider.get_attribute("max")) - 1)
            visit.tab.keyboard.press("Home")
            assert slider.input_value() == "0"
        assert visit.errors == []


@pytest.mark.parametrize("sight", ["light", "dark"])
@pytest.mark.parametrize("page", [*PAGES, "search"])
def test_axe_finds_nothing_that_is_not_listed(chromium, served, page, sight):
    from axe_playwright_python.sync_playwright import Axe

    options = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}
    with Visit(chromium, served, color_scheme=sight) as visit:
        visit.open(page)
        assert visit.tab.locator("html").get_attribute("data-theme") == sight
        found = Axe().run(visit.tab, options=options).response
    assert len(found["passes"]) > 10  # axe did look
    wrong = [
        (violation["id"], node["html"][:160], node["failureSummary"][:300])
        for violation in found["violations"]
        for node in violation["nodes"]
        if not any(rule == violation["id"] and part in node["html"] for rule, part in ALLOWED)
    ]
    assert wrong == []


@pytest.mark.parametrize("page", PAGES)
def test_a_phone_does_not_scroll_sideways(chromium, served, page):
    with Visit(chromium, served, viewport={"width": 390, "height": 800}) as visit:
        visit.open(page)
        for _ in range(3):
            visit.tab.mouse.wheel(0, 4000)
        visit.tab.evaluate("window.scrollTo(500, 0)")
        assert visit.tab.evaluate("window.scrollX") == 0
        wide = visit.tab.evaluate(
            """() => [...document.querySelectorAll("article *")].filter(e => {
                const box = e.getBoundingClientRect();
                if (box.right <= innerWidth + 1 || box.width === 0) return false;
                for (let up = e.parentElement; up; up = up.parentElement)
                    if (getComputedStyle(up).overflowX !== "visible") return false;
                return true; }).map(e => e.outerHTML.slice(0, 120))"""
        )
        assert wide == []


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_not_heavy(site, page):
    from bs4 import BeautifulSoup

    file = site / f"{page}.html"
    soup = BeautifulSoup(file.read_text("utf8"), "html.parser")
    images = {i["src"] for i in soup.select("img[src]") if not i["src"].startswith("data:")}
    size = file.stat().st_size + sum((file.parent / i).stat().st_size for i in images)
    assert size < LIMIT, f"{size:,} bytes, of which {file.stat().st_size:,} HTML"


@pytest.mark.parametrize("page", NOTEBOOKS)
def test_a_notebook_s_page_offers_colab_binder_and_a_download(site, page):
    from bs4 import BeautifulSoup

    file = site / f"{page}.html"
    soup = BeautifulSoup(file.read_text("utf8"), "html.parser")
    links = [a["href"] for a in soup.select(".article-header-buttons a[href]")]
    path = f"{page}.ipynb"
    assert any("colab.research.google.com" in a and a.endswith(path) for a in links)
    assert any("mybinder.org" in a and path in a for a in links)
    (download,) = [a for a in links if "_sources" in a]
    assert (file.parent / download).read_bytes() == (ROOT / path).read_bytes()


def test_solutions_are_open_on_paper_and_folded_again(chromium, served):
    with Visit(chromium, served) as visit:
        visit.open(PAGES[0])
        visit.tab.evaluate(
            "document.querySelector('article').insertAdjacentHTML('beforeend',"
            "'<details id=fold><summary>Solution</summary>x</details>')"
        )
        folded = "document.getElementById('fold').open"
        visit.tab.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert visit.tab.evaluate(folded) is True
        visit.tab.evaluate("dispatchEvent(new Event('afterprint'))")
        assert visit.tab.evaluate(folded) is False
