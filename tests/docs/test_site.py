"""The site of docs/, built and opened page by page in a headless Chromium, light and dark.

    pip install playwright                       # needs no browser of its own
    pytest -n 0 -m slow tests/docs               # builds the site first, which takes minutes

Environment variables:
    FOCALDET_CHROMIUM: The browser, if it is not found as ``chromium`` or ``google-chrome``.
    FOCALDET_SITE: A folder with a site that is already built.
    FOCALDET_SCREENSHOTS: A folder to write a screenshot of each page, width and mode to.
"""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import pytest

from tests.helpers.local_server import LocalServer, QuietHandler, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
ADDRESS = "https://docs.example/en/latest/"
NARROW, WIDE = 375, 1280  # pixels: a phone, and a small laptop
MODES = ("light", "dark")
QUESTIONS = (
    *("video", "webcam", "RTSP", "tracking", "small objects", "tiling", "SAHI", "large images"),
    *("grayscale", "4 channels", "multispectral", "test-time augmentation", "segmentation"),
    *("rotated boxes", "keypoints", "albumentations", "class imbalance", "fine-tuning", "freezing"),
    *("early stopping", "resume", "learning-rate finder", "mixed precision", "AMP", "several GPUs"),
    *("DDP", "TensorBoard", "Weights & Biases", "wandb", "Jupyter", "mAP", "confusion matrix"),
    *("ONNX", "OpenVINO", "quantisation", "quantization", "INT8", "TensorRT", "CoreML", "mobile"),
    *("Docker", "Hugging Face Hub", "Windows", "macOS", "MPS", "licence"),
)

pytestmark = [
    pytest.mark.slow,
    # Playwright leaves its event loop to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

_MEASURE = """() => {
    const wide = (element) => element.scrollWidth > element.clientWidth + 1;
    const whiteShare = (picture) => {
        const canvas = new OffscreenCanvas(64, 64).getContext("2d");
        canvas.fillRect(0, 0, 64, 64);  // a transparent picture has the dark of the page
        canvas.drawImage(picture, 0, 0, 64, 64);
        const bytes = canvas.getImageData(0, 0, 64, 64).data;
        let white = 0;
        for (let i = 0; i < bytes.length; i += 4)
            white += Math.min(bytes[i], bytes[i + 1], bytes[i + 2]) >= 250;
        return white / 4096;
    };
    const pictures = [...document.querySelectorAll("img")];
    return {
        scroll: document.scrollingElement.scrollWidth,
        blocks: [...document.querySelectorAll("article pre")].filter(wide).map(
            (block) => block.innerText.split("\\n").reduce((a, b) => a.length > b.length ? a : b)
        ),
        unnamed: pictures.filter((one) => !one.alt.trim()).map((one) => one.src),
        broken: pictures.filter((one) => one.complete && !one.naturalWidth).map((one) => one.src),
        slabs: pictures.filter(
            (one) => one.naturalWidth && !getComputedStyle(one).filter.includes("invert") && whiteShare(one) > 0.5
        ).map((one) => one.src),
    };
}"""


@dataclass
class Visits:
    """What went wrong on which page, by kind."""

    pages: int = 0
    console: list[str] = field(default_factory=list)
    requests: set[str] = field(default_factory=set)
    scrolling_pages: list[str] = field(default_factory=list)
    scrolling_blocks: list[str] = field(default_factory=list)
    unnamed_pictures: list[str] = field(default_factory=list)
    broken_pictures: list[str] = field(default_factory=list)
    white_slabs: list[str] = field(default_factory=list)


class SiteHandler(QuietHandler, http.server.SimpleHTTPRequestHandler):
    """Serves the files of a folder."""

    def answer(self) -> None:
        http.server.SimpleHTTPRequestHandler.do_GET(self)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site as Read the Docs does, without warnings."""
    built = os.environ.get("FOCALDET_SITE")
    if built:
        return Path(built)
    for package in ("furo", "latex2mathml", "myst_parser", "sphinx_sitemap", "sphinxext.opengraph"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(
        [
            *(sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n"),
            ROOT / "docs",
            folder,
        ],
        env={**os.environ, "READTHEDOCS_CANONICAL_URL": ADDRESS},
        check=True,
    )
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start the Chromium of this machine."""
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = os.environ.get("FOCALDET_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("Chromium is not installed, and FOCALDET_CHROMIUM does not name one")
    with playwright.sync_playwright() as engine:
        running = engine.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def root(site: Path) -> Iterator[str]:
    """Serve the site on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        handler = functools.partial(SiteHandler, directory=site)
        with serving(LocalServer(handler), patch) as server:  # type: ignore[arg-type]
            yield server.root


@pytest.fixture(scope="module")
def visits(site: Path, browser: Any, root: str) -> Visits:
    """Open every page in both modes and both widths."""
    found = Visits()
    names = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    names = [name for name in names if not name.startswith("_static/")]
    for mode in MODES:
        context = browser.new_context(color_scheme=mode)
        page = context.new_page()
        page.on("request", lambda request: found.requests.add(request.url))
        for name in names:
            _visit(page, f"{root}/{name}", name, mode, found)
        context.close()
    found.pages = len(names)
    return found


def _visit(page: Any, url: str, name: str, mode: str, found: Visits) -> None:
    def note(problem: Any) -> None:
        if getattr(problem, "type", "error") in {"error", "warning"}:
            found.console.append(f"{name}: {getattr(problem, 'text', problem)}")

    page.on("console", note)
    page.on("pageerror", note)
    page.set_viewport_size({"width": WIDE, "height": 800})
    page.goto(url, wait_until="load")
    _load_pictures(page)
    wide = page.evaluate(_MEASURE)
    _take_screenshot(page, f"{name}-{WIDE}-{mode}")
    page.set_viewport_size({"width": NARROW, "height": 800})
    narrow = page.evaluate(_MEASURE)
    _take_screenshot(page, f"{name}-{NARROW}-{mode}")
    page.remove_listener("console", note)
    page.remove_listener("pageerror", note)
    if narrow["scroll"] > NARROW:
        found.scrolling_pages.append(f"{name}: {narrow['scroll']} px")
    found.scrolling_blocks += [f"{name}: {line}" for line in wide["blocks"]]
    found.unnamed_pictures += [f"{name}: {source}" for source in wide["unnamed"]]
    found.broken_pictures += [f"{name}: {source}" for source in wide["broken"]]
    if mode == "dark":
        found.white_slabs += [f"{name}: {source}" for source in wide["slabs"]]


def _load_pictures(page: Any) -> None:
    """Load also the pictures that browsers leave until they are scrolled to."""
    page.evaluate(
        """() => Promise.all([...document.images].map((one) => {
            one.loading = "eager";
            return one.decode().catch(() => null);
        }))"""
    )


def _take_screenshot(page: Any, name: str) -> None:
    folder = os.environ.get("FOCALDET_SCREENSHOTS")
    if folder:
        path = Path(folder) / f"{name.replace('/', '.')}.png"
        page.screenshot(path=path, full_page=True)


def test_every_page_is_opened(visits: Visits) -> None:
    assert visits.pages > len(list((ROOT / "docs").rglob("*.md")))  # and the index and the search


def test_no_page_reports_an_error_in_the_console(visits: Visits) -> None:
    assert visits.console == []


def test_no_request_leaves_the_machine(visits: Visits, root: str) -> None:
    assert [url for url in sorted(visits.requests) if not url.startswith((root, "data:"))] == []


def test_no_page_scrolls_sideways_on_a_phone(visits: Visits) -> None:
    assert visits.scrolling_pages == []


def test_code_fits_on_a_small_laptop(visits: Visits) -> None:
    assert sorted(set(visits.scrolling_blocks)) == []


def test_every_picture_is_shown_and_has_an_alternative_text(visits: Visits) -> None:
    assert visits.broken_pictures == []
    assert visits.unnamed_pictures == []


def test_figures_are_adapted_to_dark_pages(visits: Visits) -> None:
    assert visits.white_slabs == []


def test_a_reader_who_chooses_the_light_mode_on_a_dark_system_sees_the_figures_as_drawn(
    browser: Any, root: str
) -> None:
    page = browser.new_page(color_scheme="dark")
    page.goto(f"{root}/focal_loss.html")
    filters = []
    for mode in ("auto", "light", "dark"):
        page.evaluate("(mode) => { document.body.dataset.theme = mode; }", mode)
        filters.append(
            page.evaluate("() => getComputedStyle(document.querySelector('img[src$=svg]')).filter")
        )
    page.close()
    assert filters[0] == filters[2]
    assert "invert" in filters[0]
    assert filters[1] == "none"


def test_formulas_are_drawn_without_scripts(browser: Any, root: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{root}/focal_loss.html")
    sizes = [one.bounding_box() for one in page.locator("math").all()]
    context.close()
    assert len(sizes) > 30
    assert all(size["width"] > 4 and size["height"] > 4 for size in sizes)


@pytest.fixture(scope="module")
def mathml() -> Any:
    """Return the function of docs/conf.py that converts formulas."""
    pytest.importorskip("latex2mathml")
    specification = importlib.util.spec_from_file_location("conf", ROOT / "docs" / "conf.py")
    assert specification is not None
    assert specification.loader is not None
    conf = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(conf)
    return conf._mathml


def test_functions_in_formulas_stand_apart_and_names_are_one_identifier(mathml: Any) -> None:
    gap = '<mspace width="0.167em" />'
    assert f"<mi>a</mi>{gap}<mi>log</mi>{gap}<mi>p</mi>" in mathml(r"a \log p", "inline")
    assert f"{gap}<mi>log</mi><mo" in mathml(r"a \log(p)", "inline")
    assert "<mi>FL</mi>" in mathml(r"\mathrm{FL}", "inline")


@pytest.mark.parametrize(
    ("formula", "named"),
    [(r"\foo x", r"\\foo"), (r"\begin{aligned}a&=b\end{aligned}", "&")],
    ids=["command", "environment"],
)
def test_a_formula_that_cannot_be_converted_stops_the_build(
    mathml: Any, formula: str, named: str
) -> None:
    with pytest.raises(Exception, match=f"latex2mathml cannot convert {named} in the formula"):
        mathml(formula, "block")


@pytest.mark.parametrize("word", QUESTIONS)
def test_the_search_finds_the_answers_by_the_words_of_the_question(word: str, site: Path) -> None:
    search = pytest.importorskip("sphinx.search.en").SearchEnglish({})
    text = (site / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))
    page = index["docnames"].index("can_it")
    for part in search.split(word):
        if part.isdecimal():
            continue  # the search leaves numbers out
        stem = search.stem(part.lower())
        entries = [index[kind].get(stem, []) for kind in ("terms", "titleterms")]
        pages = {
            page for entry in entries for page in (entry if isinstance(entry, list) else [entry])
        }
        assert page in pages, f"{part!r} is not on the page"


def test_the_search_page_lists_an_answer(browser: Any, root: str) -> None:
    page = browser.new_page()
    page.goto(f"{root}/search.html?q=tensorrt")
    page.wait_for_selector("#search-results li a")
    links = [one.get_attribute("href") for one in page.locator("#search-results li a").all()]
    page.close()
    assert any(link.startswith("can_it.html") for link in links)


def test_a_link_to_a_page_is_shown_with_a_picture_and_a_description(site: Path) -> None:
    if os.environ.get("FOCALDET_SITE"):
        pytest.skip("the address of a site that is already built is not known")
    head = (site / "focal_loss.html").read_text(encoding="utf-8").split("</head>")[0]
    tags = dict(re.findall(r'<meta (?:property|name)="([^"]*)" content="([^"]*)"', head))
    picture = tags["og:image"]
    assert picture == f"{ADDRESS}_static/social_card.png"
    assert (site / picture.removeprefix(ADDRESS)).is_file()
    assert tags["og:title"]
    assert len(tags["og:description"]) > 50
    assert tags["description"] == tags["og:description"]
    assert f'<link rel="canonical" href="{ADDRESS}focal_loss.html"' in head


def test_the_sitemap_lists_every_page_of_the_docs(site: Path) -> None:
    if os.environ.get("FOCALDET_SITE"):
        pytest.skip("the address of a site that is already built is not known")
    tree = ET.parse(site / "sitemap.xml")  # noqa: S314 (written by the fixture)
    found = {str(place.text) for place in tree.iter() if place.tag.endswith("loc")}
    pages = (ROOT / "docs").rglob("*.md")
    assert found == {
        f"{ADDRESS}{page.relative_to(ROOT / 'docs').with_suffix('').as_posix()}.html"
        for page in pages
    }


def test_no_repository_name_is_a_mail_address(site: Path) -> None:
    mailing = [path.name for path in site.rglob("*.html") if "mailto:" in path.read_text("utf-8")]
    assert mailing == []
