"""The site that `make docs` builds: complete, without other hosts, and readable on a desktop and a phone."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from markdown_it import MarkdownIt

from tests.browser import browser  # noqa: F401
from tests.processes import ROOT

# The document and its page, for those that are not docs/NAME.md.
ELSEWHERE = {
    "README.md": "index.html",
    "kernels/README.md": "kernels.html",
    "CONTRIBUTING.md": "contributing.html",
    "CHANGELOG.md": "changelog.html",
}
PAGES = {f"docs/{path.name}": f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")} | ELSEWHERE
# What a document consists of, by its elements. Headings and paragraphs differ by what the theme adds.
ELEMENTS = ("li", "table", "td", "th", "pre", "em", "strong", "img", "h2", "h3")
# Attributes with addresses that a browser loads by itself.
LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("video", "src"), ("object", "data")}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers.python"):
        pytest.importorskip(package, reason="the documentation needs pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    # No address can be reached through this proxy.
    offline = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "all_proxy")}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | offline | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class _Loaded(HTMLParser):
    """Collects the addresses that a page makes the browser load."""

    def __init__(self):
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        is_link = tag == "link" and values.get("rel") not in ("canonical", "next", "prev")
        self.addresses += [values[name] for name in values if (tag, name) in LOADED or (is_link and name == "href")]
        self.addresses += re.findall(r"url\(['\"]?([^'\")]+)", values.get("style", ""))


def test_pages_and_styles_name_no_other_host(site):
    for page in site.rglob("*.html"):
        loaded = _Loaded()
        loaded.feed(page.read_text())
        for address in loaded.addresses:
            assert not urlsplit(address).netloc, f"{page.name}: {address}"
            path = urlsplit(address).path  # absolute in the page for unknown addresses, 404.html
            file = site / path.removeprefix("/") if path.startswith("/") else page.parent / path
            assert address.startswith("data:") or file.is_file(), f"{page.name}: {address}"
    for style in (*site.rglob("*.css"), *site.rglob("*.svg")):
        for address in re.findall(r"(?:url\(|@import )\s*['\"]?([^'\")]+)", style.read_text()):
            assert not urlsplit(address).netloc, f"{style.name}: {address}"


@pytest.mark.parametrize("document", PAGES)
def test_a_document_is_shown_as_on_github(site, document):
    """Both make the same lists, tables and blocks of it, although they read Markdown in different ways."""
    on_github = MarkdownIt("commonmark").enable("table").render((ROOT / document).read_text())
    page = (site / PAGES[document]).read_text()
    on_site = page[page.index("<article") : page.index("</article>")]
    for element in ELEMENTS:
        numbers = [len(re.findall(rf"<{element}[ >]", text)) for text in (on_github, on_site)]
        assert numbers[0] == numbers[1], element


def test_the_python_api_has_what_programs_need(site):
    pages = "".join(page.read_text() for page in (site / "api").glob("*.html"))
    names = {
        *(
            "load",
            "Pipeline",
            "Pipeline.__call__",
            "Pipeline.edit",
            "Pipeline.stream",
            "Pipeline.segment",
            "InputError",
        ),
        *("sampler.Sampler", "diffusion.sampling.sample", "config.Config", "config.ModelConfig.d_state"),
        *("models.mamba.CrossMamba", "kernels.selective_scan.api.selective_scan", "kernels.ssd.ssd"),
        *("planning.plan.plan", "data.masks.read_mask_file"),
    }
    assert names <= set(re.findall(r'<h\d id="sisma_jax\.([\w.]+)"', pages))


def test_every_image_is_used_and_described(site):
    texts = [page.read_text() for page in site.glob("*.html")]
    for image in (ROOT / "docs/images").iterdir():
        tags = [tag for text in texts for tag in re.findall(r"<img[^>]*>", text) if f"images/{image.name}" in tag]
        assert tags, f"{image.name} is in no document"
        assert all(re.search(r'alt="[^"]{10}', tag) for tag in tags), image.name


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_fit_and_load_nothing_from_other_hosts(site, browser, width, dark):  # noqa: F811
    for page in ("index.html", "first_faces.html", "gallery.html", "architecture.html", "api/pipeline.html"):
        browser.open(site / page, width=width, dark=dark)
        assert browser.evaluate("document.documentElement.scrollWidth") == width, page
        scheme = browser.evaluate("document.body.dataset.mdColorScheme")
        assert scheme == ("slate" if dark else "default")
        assert browser.messages() == []
        assert {urlsplit(url).scheme for url in browser.requests()} <= {"file", "about"}


def test_the_search_works_without_a_server(site, browser):  # noqa: F811
    browser.open(site / "index.html", width=1280)
    browser.evaluate("document.querySelector('label[for=__search]').click()")
    query = "document.querySelector('[data-md-component=search-query]')"
    browser.evaluate(f"({query}.value = 'guidance', {query}.dispatchEvent(new Event('keyup')), {query}.focus())")
    results = "document.querySelectorAll('.md-search-result__link').length"
    browser.driver.set_script_timeout(20)
    found = browser.driver.execute_async_script(
        f"const done = arguments[0];const look = () => {results} ? done({results}) : setTimeout(look, 50); look();"
    )
    assert found > 3
