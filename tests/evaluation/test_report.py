import base64
import dataclasses
import html.parser
import io
import itertools
import re

import numpy as np
import pytest
from PIL import Image

from sisma_jax.data.classes import CELEBAMASK_HQ, ClassSet
from sisma_jax.evaluation.embedded_images import image_uri, mask_uri
from sisma_jax.evaluation.report import MOST_ROWS, Pictures, write_report
from tests.browser import browser  # noqa: F401  a fixture
from tests.evaluation.example_evaluation import (
    example_evaluation,
    example_metrics,
    example_pictures,
    folders_evaluation,
    score,
)

SECTIONS = [
    "Numbers",
    "Samples",
    "Agreement by class",
    "Training",
    "Nearest training images",
    "Worst agreement",
    "Protocol and provenance",
]
HOSTILE = "<script>alert('1')</script>\"&'é名"


class Page(html.parser.HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, source: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.headings: list[tuple[str, str]] = []
        self.text = ""
        self._heading = ""
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, {name: value or "" for name, value in attributes}))
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings.append((tag, ""))
            self._heading = tag

    def handle_endtag(self, tag):
        if tag == self._heading:
            self._heading = ""

    def handle_data(self, data):
        self.text += data
        if self._heading:
            level, before = self.headings[-1]
            self.headings[-1] = (level, before + data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def sections(self):
        return [text for level, text in self.headings if level == "h2"]


def report(tmp_path, evaluation=None, pictures=None, metrics=(), classes=CELEBAMASK_HQ) -> Page:
    path = tmp_path / "report.html"
    write_report(path, example_evaluation() if evaluation is None else evaluation, pictures, list(metrics), classes)
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def small():
    return example_pictures(32)


def test_a_complete_report_has_all_sections(tmp_path, small):
    page = report(tmp_path, pictures=small, metrics=example_metrics())
    assert page.sections() == SECTIONS
    anchors = {attributes["id"] for attributes in page.all("section")}
    assert {link["href"].removeprefix("#") for link in page.all("a")[: len(SECTIONS)]} == anchors
    for text in (
        "0.523",
        "0.511 – 0.535",
        "33,412,611",
        "crc32:9f1c2a77",
        "solver euler",
        "sample: 0",
        "Sample, 61.0 % correct",
        "At distance 9.000",
    ):
        assert text in page.text or text == "sample: 0"
    assert "pt_inception-2015-12-05-6726825d.pth" in page.text
    assert len(page.all("circle")) == 3 * 10  # held-out loss, fd_parser and miou


def test_a_page_is_accessible(tmp_path, small):
    page = report(tmp_path, pictures=small, metrics=example_metrics())
    levels = [int(level[1]) for level, _ in page.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(header.get("scope") in ("col", "row", "rowgroup") for header in page.all("th"))
    images = page.all("img")
    assert len(images) == 8 * 6 + 6 * 4 + 6 * 4
    assert all(image["alt"] for image in images)
    charts = [svg for svg in page.all("svg") if "class" in svg]  # the others are parts of them
    assert all("aria-label" in svg or "aria-hidden" in svg for svg in charts)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)


def test_the_page_needs_nothing_but_itself(tmp_path, small):
    page = report(tmp_path, pictures=small, metrics=example_metrics())
    assert not {"script", "iframe", "object", "embed", "form"} & {tag for tag, _ in page.elements}
    sources = [
        value
        for tag, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "srcset", "poster", "data") or (name == "href" and tag != "a")
    ]
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert "url(" not in (tmp_path / "report.html").read_text()
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_every_text_is_escaped(tmp_path, small):
    names = (HOSTILE, *CELEBAMASK_HQ.names[1:])
    classes = dataclasses.replace(CELEBAMASK_HQ, title=HOSTILE, names=names)
    plain = example_evaluation()
    agreement = plain["mask_agreement"]
    for scores in (agreement["samples"], agreement["ceiling"], agreement["floor"]):
        scores["iou_per_class"] = {HOSTILE: score(0.5, 0.1)}
    evaluation = plain | {
        "subject": plain["subject"] | {"path": HOSTILE, "checksum": HOSTILE},
        "protocol": plain["protocol"]
        | {"name": HOSTILE, "data": HOSTILE, "data_fingerprint": HOSTILE, "references": HOSTILE}
        | {"sampling": {HOSTILE: HOSTILE}, "resize": {HOSTILE: HOSTILE}},
        "networks": {HOSTILE: HOSTILE},
        "versions": {HOSTILE: HOSTILE},
        "distances": [
            one | {"network": HOSTILE, "scores": {f"fd_{HOSTILE}": score(0.5, 0.1)}} for one in plain["distances"]
        ],
        "diversity": {HOSTILE: score(0.5, 0.1)},
        "not_computed": {HOSTILE: f"see https://example.org/{HOSTILE}"},
    }
    metrics = [{"step": 1, f"fd_{HOSTILE}": 1.0}, {"step": 2, f"fd_{HOSTILE}": 2.0}]
    page = report(tmp_path, evaluation, small, metrics, classes)
    expected = report(tmp_path, plain, small, [{"step": 1, "fd_a": 1.0}, {"step": 2, "fd_a": 2.0}])
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in expected.elements}
    attributes = {name for _, found in page.elements for name in found}
    assert attributes == {name for _, found in expected.elements for name in found}
    assert page.text.count(HOSTILE) >= 20
    assert page.headings[0] == ("h1", HOSTILE)
    assert all(link["href"].startswith(("#", "https://example.org/")) for link in page.all("a"))
    assert "<script" not in (tmp_path / "report.html").read_text()


def test_a_path_that_is_no_text_is_written(tmp_path):
    evaluation = example_evaluation()
    evaluation["subject"]["path"] = b"runs/\xff".decode(errors="surrogateescape")
    assert "runs/?" in report(tmp_path, evaluation).text


def test_what_is_missing_is_left_out(tmp_path, small):
    nothing = {"mask_agreement": None, "memorization": None, "distances": [], "diversity": {}, "paired": {}}
    evaluation = example_evaluation(**nothing, reconstruction={}, held_out_loss=None, not_computed={})
    assert report(tmp_path, evaluation, Pictures()).sections() == ["Protocol and provenance"]
    assert report(tmp_path, folders_evaluation(), None, classes=None).sections() == [
        "Numbers",
        "Protocol and provenance",
    ]
    # Without classes there is nothing to colour masks with.
    assert "Samples" not in report(tmp_path, pictures=small, classes=None).sections()
    parts = dataclasses.replace(
        small, originals=None, worst_predicted=None, worst_originals=None, worst_accuracies=None
    )
    assert len(report(tmp_path, evaluation, parts).all("img")) == 8 * 5 + 6 * 4 + 6 * 2


def test_agreement_of_a_single_image_has_no_floor_and_absent_scores_have_dashes(tmp_path):
    evaluation = example_evaluation()
    evaluation["mask_agreement"]["floor"] = None
    evaluation["mask_agreement"]["samples"] |= {"miou": None}
    page = report(tmp_path, evaluation)
    assert "Agreement by class" in page.sections()
    assert "mIoU–0.61–" in page.text


def test_the_values_of_the_bars_are_beside_them(tmp_path):
    evaluation = example_evaluation()
    page = report(tmp_path, evaluation)
    bars = [float(rect["width"]) for rect in page.all("rect") if rect["class"] == "value"]
    of_classes = evaluation["mask_agreement"]["samples"]["iou_per_class"].values()
    ious = [one["value"] for one in of_classes if one is not None]
    np.testing.assert_allclose(bars[2:], np.array(ious) * 100, atol=0.005)
    for iou in ious:
        assert f"{iou:.2f}" in page.text


def test_training_curves_are_those_of_the_metrics(tmp_path):
    lines = [{"step": 10, "loss": 1.0}, {"step": 20, "loss": float("nan"), "miou": 0.25, "learning_rate": 1e-3}]
    page = report(tmp_path, metrics=lines)
    titles = [text for level, text in page.headings if level == "h3"]
    assert titles[1:3] == ["Loss", "mIoU"]
    assert "mIoU, step 20: 0.25" in page.text
    assert "learning_rate" not in page.text


def test_rows_of_different_numbers_are_refused(small):
    with pytest.raises(ValueError, match="masks, samples, originals must have equal numbers of rows"):
        dataclasses.replace(small, masks=small.masks[:3])


def decoded(uri: str) -> tuple[str, np.ndarray]:
    kind, data = re.fullmatch(r"data:image/(\w+);base64,(.*)", uri).groups()
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    return kind, np.asarray(image.convert("RGB"))


def test_small_images_and_masks_are_embedded_without_loss(small):
    kind, pixels = decoded(image_uri(small.originals[0]))
    assert kind == "png"
    np.testing.assert_array_equal(pixels, small.originals[0])
    mask = small.masks[0].copy()
    mask[0] = 255
    classes = ClassSet(CELEBAMASK_HQ.title, CELEBAMASK_HQ.names, CELEBAMASK_HQ.colors, ignored=255)
    np.testing.assert_array_equal(decoded(mask_uri(mask, classes))[1], classes.colorize(mask))


def test_large_images_are_compressed_and_bounded():
    smooth = np.broadcast_to(np.linspace(0, 255, 1024).astype(np.uint8)[:, np.newaxis, np.newaxis], (1024, 1024, 3))
    kind, pixels = decoded(image_uri(np.ascontiguousarray(smooth)))
    assert kind == "jpeg"
    assert pixels.shape == (512, 512, 3)
    assert np.abs(pixels[:, 0, 0].astype(int) - smooth[::2, 0, 0]).max() <= 4
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3)).astype(np.uint8)
    assert len(image_uri(noise)) < 110_000
    assert decoded(mask_uri(np.zeros((1024, 1024), np.uint8), CELEBAMASK_HQ))[1].shape == (512, 512, 3)


def test_a_report_at_512_px_is_below_10_mb(tmp_path):
    pictures = example_pictures(512)
    report(tmp_path, pictures=pictures, metrics=example_metrics())
    assert (tmp_path / "report.html").stat().st_size < 10_000_000


def test_a_report_shows_a_bounded_number_of_images(tmp_path):
    many = Pictures(masks=np.zeros((50, 8, 8), np.uint8), samples=np.zeros((50, 9, 8, 8, 3), np.uint8))
    assert len(report(tmp_path, pictures=many).all("img")) == MOST_ROWS * 5


# The contrast of each text with what is behind it, by the formula of WCAG 2.
LOW_CONTRAST = """(() => {
  const rgb = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => rgb(color).slice(0, 3).map((x) => x / 255)
    .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if (rgb(color)[3] !== 0) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const low = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || element.localName === "title") continue;
    const style = getComputedStyle(element);
    const [a, b] = [light(element.ownerSVGElement ? style.fill : style.color), light(behind(element))];
    if ((Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 4.5) low.push(walker.currentNode.data.trim());
  }
  return low;
})()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_a_browser_shows_the_page(browser, tmp_path, small, width, dark):  # noqa: F811
    long = "_".join(["left_eyebrow"] * 6)
    classes = dataclasses.replace(CELEBAMASK_HQ, names=(long, *CELEBAMASK_HQ.names[1:]))
    evaluation = example_evaluation()
    evaluation["mask_agreement"]["samples"]["iou_per_class"][long] = score(0.5, 0.1)
    evaluation["subject"]["path"] = "runs/" + "a" * 90
    evaluation["subject"]["checksum"] = "sha256:" + "0" * 64
    report(tmp_path, evaluation, small, example_metrics(), classes)
    browser.open(tmp_path / "report.html", width=width, dark=dark)
    assert browser.requests() == [(tmp_path / "report.html").as_uri()]
    assert browser.messages() == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width == browser.evaluate("innerWidth")
    assert browser.evaluate("document.images.length") == 8 * 6 + 6 * 4 + 6 * 4
    assert (
        browser.evaluate("[...document.images].filter((image) => !image.complete || !image.naturalWidth).length") == 0
    )
    assert browser.evaluate("[...document.images].every((image) => image.getBoundingClientRect().width >= 64)")
    assert browser.evaluate(LOW_CONTRAST) == []
    browser.screenshot(tmp_path / f"report_{width}.png")
    with Image.open(tmp_path / f"report_{width}.png") as image:
        assert image.width == width
        assert (np.asarray(image.convert("L"))[0, 0] < 64) == dark
