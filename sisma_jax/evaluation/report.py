"""The report of an evaluation: one HTML page that needs no other file and no network.

`report.html` is the frame of the page and `report.css` its style. Every text that is inserted is escaped, because names
of classes, files and data sets are the user's.
"""

import dataclasses
import html
import math
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from sisma_jax.data.classes import ClassSet
from sisma_jax.evaluation import charts, image_strips
from sisma_jax.evaluation.curves import series, smooth
from sisma_jax.evaluation.explanations import explain
from sisma_jax.evaluation.results import AgreementScores, Evaluation, Score
from sisma_jax.evaluation.tables import (
    LINK,
    MetricRow,
    format_number,
    interval_title,
    label_of,
    metric_groups,
    protocol_rows,
    provenance_rows,
)
from sisma_jax.files import AnyPath, write_atomically

MOST_ROWS = 8
"""Rows of images that a section shows at most."""
MOST_SAMPLES = 4
"""Samples of a mask, or neighbours of a sample, that a row shows at most."""

_FOLDER = Path(__file__).parent
# The metrics at the top of the page: of each line, the first one that was computed.
_HEADLINE = (
    ("miou",),
    ("fid", "fd_vgg16", "fd_parser"),
    ("lpips_diversity", "inception_recall", "vgg16_recall", "parser_recall"),
    ("memorization_ratio", "inception_precision", "vgg16_precision", "parser_precision"),
)
_ARROWS = {"higher": "↑ higher is better", "lower": "↓ lower is better", "near 1": "→ near 1 is best", "": ""}
# The first losses, up to this fraction of the steps, do not extend the axis of the chart.
_START = 0.05


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The images of a report. None, or no rows, leaves out a section or a column; the first rows of each are shown.

    Attributes:
      masks: uint8 (n, H, W), class indices or the ignored label; the rows of the grid.
      samples: uint8 (n, k, H, W, 3), RGB, k samples of each mask.
      originals: uint8 (n, H, W, 3), RGB, the held-out photographs of the masks.
      neighbour_samples: uint8 (m, H, W, 3), RGB, samples whose nearest training images are shown.
      neighbours: uint8 (m, j, H, W, 3), RGB, training images, nearest first.
      neighbour_distances: float (m, j), their distances.
      worst_masks: uint8 (w, H, W), masks that their samples follow worst.
      worst_samples: uint8 (w, H, W, 3), RGB, these samples.
      worst_predicted: uint8 (w, H, W), masks that the face parser predicts from these samples.
      worst_originals: uint8 (w, H, W, 3), RGB, the photographs of these masks.
      worst_accuracies: float (w,), pixel accuracy of each of these samples, in [0, 1].

    Raises:
      ValueError: arrays of one section have different numbers of rows.
    """

    masks: np.ndarray | None = None
    samples: np.ndarray | None = None
    originals: np.ndarray | None = None
    neighbour_samples: np.ndarray | None = None
    neighbours: np.ndarray | None = None
    neighbour_distances: np.ndarray | None = None
    worst_masks: np.ndarray | None = None
    worst_samples: np.ndarray | None = None
    worst_predicted: np.ndarray | None = None
    worst_originals: np.ndarray | None = None
    worst_accuracies: np.ndarray | None = None

    def __post_init__(self) -> None:
        for section in (
            ("masks", "samples", "originals"),
            ("neighbour_samples", "neighbours", "neighbour_distances"),
            ("worst_masks", "worst_samples", "worst_predicted", "worst_originals", "worst_accuracies"),
        ):
            arrays = {name: getattr(self, name) for name in section}
            rows = {name: len(array) for name, array in arrays.items() if array is not None}
            if len(set(rows.values())) > 1:
                raise ValueError(f"{', '.join(rows)} must have equal numbers of rows, got {list(rows.values())}.")


def write_report(
    path: AnyPath,
    evaluation: Evaluation,
    pictures: Pictures | None,
    metrics: Sequence[Mapping[str, int | float]],
    classes: ClassSet | None,
) -> None:
    """Writes the report of an evaluation as an HTML file, atomically.

    Args:
      path: of the file, on the disk or in a bucket.
      evaluation: the values.
      pictures: images to show; None leaves out their sections.
      metrics: lines of `metrics.jsonl` for the training curves; none leave out the section.
      classes: of the masks; None leaves out the sections that show masks.

    Raises:
      OSError: the file cannot be written.
    """
    sections = [("Numbers", _numbers(evaluation))]
    if pictures is not None and classes is not None:
        sections.append(("Samples", _samples(pictures, classes)))
    sections.append(("Agreement by class", _agreement(evaluation, classes)))
    sections.append(("Training", _training(metrics)))
    if pictures is not None:
        sections.append(("Nearest training images", _neighbours(pictures, evaluation)))
    if pictures is not None and classes is not None:
        sections.append(("Worst agreement", _worst(pictures, classes)))
    sections.append(("Protocol and provenance", _provenance(evaluation)))
    sections = [(title, content) for title, content in sections if content]
    page = string.Template((_FOLDER / "report.html").read_text(encoding="utf-8")).substitute(
        title=_text(f"Evaluation of {evaluation['subject']['path']}"),
        style=(_FOLDER / "report.css").read_text(encoding="utf-8"),
        header=_header(evaluation, [title for title, _ in sections]),
        sections="\n".join(
            f'<section id="{_anchor(title)}">\n<h2>{_text(title)}</h2>\n{content}\n</section>'
            for title, content in sections
        ),
    )
    # A path may hold bytes that are no text, which Python represents by surrogates.
    write_atomically(path, page.encode("utf-8", "replace"))


def _text(value: object) -> str:
    return html.escape(str(value))


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _breakable(path: str) -> str:
    """Returns an escaped path that may be broken into lines where a reader expects it."""
    return re.sub(r"([/_])", r"\1<wbr>", _text(path))


def _linked(text: str) -> str:
    """Returns escaped text in which addresses are links."""
    parts = LINK.split(text)
    return "".join(
        f'<a href="{_text(part)}" rel="noreferrer">{_text(part)}</a>' if i % 2 else _text(part)
        for i, part in enumerate(parts)
    )


def _table(kind: str, head: str, body: Iterable[str]) -> str:
    return "\n".join([f'<table class="{kind}">', head, *body, "</table>"])


def _header(evaluation: Evaluation, titles: Sequence[str]) -> str:
    subject, protocol = evaluation["subject"], evaluation["protocol"]
    kind = {"run": "a training run", "exported": "an exported model", "folders": "a folder of images"}
    facts = [
        ("Step", f"{subject['step']:,}" if "step" in subject else ""),
        ("Parameters", f"{subject['parameters']:,}" if "parameters" in subject else ""),
        ("References" if subject["kind"] == "folders" else "Data", protocol["data"]),
        ("Protocol", protocol["name"].upper()),
        ("Resolution", f"{protocol['image_size']} px" if protocol["image_size"] else ""),
        ("Held-out masks", f"{protocol['num_masks']:,}" if protocol["num_masks"] else ""),
        ("Real images", f"{protocol['num_references']:,}"),
    ]
    items = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in facts if value)
    rows = {row.name: row for group in metric_groups(evaluation) for row in group.rows}
    computed = [[rows[name] for name in names if name in rows] for names in _HEADLINE]
    tiles = "".join(_tile(found[0]) for found in computed if found)
    links = "".join(f'<li><a href="#{_anchor(title)}">{_text(title)}</a></li>' for title in titles)
    return "\n".join(
        [
            "<header>",
            f'<p class="over">sisma_jax · evaluation of {kind.get(subject["kind"], "images")}</p>',
            f"<h1>{_breakable(subject['path'])}</h1>",
            f'<dl class="facts">{items}</dl>',
            f'<ul class="tiles">{tiles}</ul>' if tiles else "",
            f'<nav aria-label="Sections"><ul>{links}</ul></nav>',
            "</header>",
        ]
    )


def _tile(row: MetricRow) -> str:
    details = "".join(f"<span>{_text(text)}</span>" for text in (row.interval, _ARROWS[row.better]) if text)
    return f"<li>{_text(row.full_label)}<strong>{_text(row.value)}</strong>{details}</li>"


def _numbers(evaluation: Evaluation) -> str:
    groups = metric_groups(evaluation)
    content = []
    if groups:
        head = (
            '<thead><tr><th scope="col">Metric</th><th scope="col">Meaning</th><th scope="col">Direction</th>'
            '<th scope="col" class="number">Value</th>'
            f'<th scope="col" class="number">{_text(interval_title(evaluation))}</th></tr></thead>'
        )
        bodies = []
        for group in groups:
            heading = (
                f'<tr class="heading"><th scope="rowgroup" colspan="5" class="group">{_text(group.title)}</th></tr>'
            )
            bodies.append("\n".join(["<tbody>", heading, *map(_metric, group.rows), "</tbody>"]))
        content.append(_table("metrics", head, bodies))
    if evaluation["not_computed"]:
        missing = [
            f'<tr><th scope="row">{_text(label_of(name))}</th><td>{_linked(reason)}</td></tr>'
            for name, reason in evaluation["not_computed"].items()
        ]
        content += ["<h3>Not computed</h3>", _table("record", "", ["<tbody>", *missing, "</tbody>"])]
    return "\n".join(content)


def _metric(row: MetricRow) -> str:
    return (
        f'<tr><th scope="row" class="label">{_text(row.label)}</th><td class="meaning">{_text(row.meaning)}</td>'
        f'<td class="better">{_text(_ARROWS[row.better])}</td><td class="value number">{_text(row.value)}</td>'
        f'<td class="interval number">{_text(row.interval)}</td></tr>'
    )


def _samples(pictures: Pictures, classes: ClassSet) -> str:
    masks, samples, originals = pictures.masks, pictures.samples, pictures.originals
    if masks is None or samples is None or len(masks) == 0:
        return ""
    masks, samples = masks[:MOST_ROWS], samples[:MOST_ROWS, :MOST_SAMPLES]
    rows = []
    for i, (mask, of_mask) in enumerate(zip(masks, samples, strict=True)):
        figures = [image_strips.colored_mask(mask, classes, f"Mask {i + 1}", "Mask")]
        figures += [
            image_strips.photo(sample, f"Sample {j + 1} of mask {i + 1}", f"Sample {j + 1}")
            for j, sample in enumerate(of_mask)
        ]
        if originals is not None:
            figures.append(image_strips.photo(originals[i], f"Original photograph of mask {i + 1}", "Original"))
        rows.append(figures)
    note = (
        "<p>Held-out masks, samples that differ in their noise only, and the photographs to which the masks belong.</p>"
    )
    return "\n".join(
        [note, image_strips.strips(rows, masks.shape[2], is_aligned=True), image_strips.legend(list(masks), classes)]
    )


def _agreement(evaluation: Evaluation, classes: ClassSet | None) -> str:
    agreement = evaluation["mask_agreement"]
    if agreement is None:
        return ""
    samples, ceiling, floor = agreement["samples"], agreement["ceiling"], agreement["floor"]
    rows = [
        _class_row(label, "", *(_value(scores, name) for scores in (samples, ceiling, floor)), kind="total")
        for name, label in (("miou", "mIoU"), ("pixel_accuracy", "Pixel accuracy"))
    ]
    for name in samples["iou_per_class"]:
        swatch = image_strips.swatch(classes, name)
        values = [_class_value(scores, name) for scores in (samples, ceiling, floor)]
        rows.append(_class_row(name, swatch, values[0], values[1], values[2]))
    head = (
        '<thead><tr><th scope="col">Class</th><th scope="col" class="bar"><span>0</span><span>1</span></th>'
        + "".join(
            f'<th scope="col" class="number"><span class="key {kind}"></span>{title}</th>'
            for kind, title in (("value", "Samples"), ("ceiling", "Ceiling"), ("floor", "Floor"))
        )
        + "</tr></thead>"
    )
    note = (
        f"<p>A face parser predicts the masks of {agreement['num_images']:,} samples. A class has the intersection "
        "over union of its predicted and its true pixels. Ceiling: the original photographs. "
        "Floor: samples with the masks of other faces. A dash: the class does not occur.</p>"
    )
    return "\n".join([note, _table("classes", head, ["<tbody>", *rows, "</tbody>"])])


def _value(scores: AgreementScores | None, name: str) -> float | None:
    if scores is None:
        return None
    score: Score | None = scores["miou"] if name == "miou" else scores["pixel_accuracy"]
    return None if score is None else score["value"]


def _class_value(scores: AgreementScores | None, name: str) -> float | None:
    score = None if scores is None else scores["iou_per_class"].get(name)
    return None if score is None else score["value"]


def _class_row(
    label: str, swatch: str, value: float | None, ceiling: float | None, floor: float | None, kind: str = ""
) -> str:
    cells = "".join(
        f'<td class="number">{"–" if number is None else f"{number:.2f}"}</td>' for number in (value, ceiling, floor)
    )
    return (
        f'<tr class="{kind}"><th scope="row">{swatch}{_text(label)}</th>'
        f'<td class="bar">{charts.bullet(value, ceiling, floor)}</td>{cells}</tr>'
    )


def _training(metrics: Sequence[Mapping[str, int | float]]) -> str:
    losses = _loss_curves(metrics)
    figures = [_chart_figure("Loss", losses, "flow-matching loss", y_limit=_loss_limit(losses))]
    names = dict.fromkeys(name for line in metrics for name in line)  # in order of their first line
    for name in names:
        explanation = explain(name)
        if explanation is None or name == "held_out_loss":
            continue
        curve = charts.Curve(explanation.full_label, *series(metrics, name), has_points=True)
        better = f"{explanation.better} is better" if explanation.better in ("higher", "lower") else ""
        figures.append(_chart_figure(explanation.full_label, [curve], ", ".join(filter(None, (name, better)))))
    figures = [figure for figure in figures if figure]
    return f'<div class="charts">\n{"".join(figures)}\n</div>' if figures else ""


def _loss_curves(metrics: Sequence[Mapping[str, int | float]]) -> list[charts.Curve]:
    curves = []
    steps, losses = series(metrics, "loss")
    if len(steps):
        x, y, low, high = charts.binned(steps, smooth(losses, reach=len(losses) // 40), losses)
        curves.append(charts.Curve("training, smoothed; pale: as logged", x, y, band=(low, high)))
    steps, losses = series(metrics, "held_out_loss")
    if len(steps):
        curves.append(charts.Curve("held-out", steps, losses, style="second", has_points=True))
    return curves


def _loss_limit(curves: Sequence[charts.Curve]) -> float:
    """Returns the largest loss after the start of the training, which would fill the chart otherwise."""
    ends = [curve.x[-1] for curve in curves]
    later = [curve.y[(curve.x >= _START * max(ends)) & np.isfinite(curve.y)] for curve in curves]
    values = np.concatenate([np.empty(0), *later])
    return float(values.max()) if values.size else math.inf


def _chart_figure(title: str, curves: Sequence[charts.Curve], y_label: str, y_limit: float = math.inf) -> str:
    chart = charts.line_chart(curves, x_label="training step", y_label=y_label, y_limit=y_limit)
    if not chart:
        return ""
    keys = "".join(f'<li><span class="key {curve.style}"></span>{_text(curve.label)}</li>' for curve in curves)
    legend = f'<figcaption><ul class="legend">{keys}</ul></figcaption>' if len(curves) > 1 else ""
    return f"<figure><h3>{_text(title)}</h3>\n{chart}\n{legend}</figure>\n"


def _neighbours(pictures: Pictures, evaluation: Evaluation) -> str:
    samples, neighbours, distances = pictures.neighbour_samples, pictures.neighbours, pictures.neighbour_distances
    if samples is None or neighbours is None or distances is None or len(samples) == 0:
        return ""
    samples, neighbours = samples[:MOST_ROWS], neighbours[:MOST_ROWS, : MOST_SAMPLES - 1]
    rows = []
    for i, (sample, of_sample) in enumerate(zip(samples, neighbours, strict=True)):
        figures = [image_strips.photo(sample, f"Sample {i + 1}", "Sample")]
        for j, neighbour in enumerate(of_sample):
            distance = format_number(float(distances[i, j]))
            alt = f"Training image {j + 1} near sample {i + 1}, at distance {distance}"
            figures.append(image_strips.photo(neighbour, alt, f"At distance {distance}"))
        rows.append(figures)
    note = "Does the model copy? Each row shows a sample and the training images that are nearest to it."
    memorization = evaluation["memorization"]
    if memorization is not None:
        of_samples, held_out = memorization["samples"]["value"], memorization["held_out"]["value"]
        note += (
            f" The mean distance to the nearest training image is {format_number(of_samples)} for samples and "
            f"{format_number(held_out, of_samples)} for held-out originals, which cannot be copies. A sample that is "
            "much nearer than that, and looks the same, is a copy."
        )
    return "\n".join([f"<p>{_text(note)}</p>", image_strips.strips(rows, samples.shape[2], is_aligned=False)])


def _worst(pictures: Pictures, classes: ClassSet) -> str:
    masks, samples = pictures.worst_masks, pictures.worst_samples
    if masks is None or samples is None or len(masks) == 0:
        return ""
    masks, samples = masks[:MOST_ROWS], samples[:MOST_ROWS]
    predicted, originals, accuracies = pictures.worst_predicted, pictures.worst_originals, pictures.worst_accuracies
    rows = []
    for i, (mask, sample) in enumerate(zip(masks, samples, strict=True)):
        accuracy = "" if accuracies is None else f", {100 * accuracies[i]:.1f} % correct"
        figures = [
            image_strips.colored_mask(mask, classes, f"Mask of case {i + 1}", "Mask"),
            image_strips.photo(sample, f"Sample of case {i + 1}{accuracy}", f"Sample{accuracy}"),
        ]
        if predicted is not None:
            alt = f"Mask predicted from the sample of case {i + 1}"
            figures.append(image_strips.colored_mask(predicted[i], classes, alt, "Predicted"))
        if originals is not None:
            alt = f"Original photograph of case {i + 1}"
            figures.append(image_strips.photo(originals[i], alt, "Original"))
        rows.append(figures)
    note = (
        "<p>Samples that follow their masks worst, with the fraction of pixels whose class is predicted correctly.</p>"
    )
    shown = [*masks, *([] if predicted is None else predicted[:MOST_ROWS])]
    return "\n".join(
        [note, image_strips.strips(rows, masks.shape[2], is_aligned=False), image_strips.legend(shown, classes)]
    )


def _provenance(evaluation: Evaluation) -> str:
    def record(rows: Sequence[tuple[str, str]]) -> str:
        cells = [f'<tr><th scope="row">{_text(label)}</th><td>{_text(value)}</td></tr>' for label, value in rows]
        return _table("record", "", ["<tbody>", *cells, "</tbody>"])

    return "\n".join(
        [
            "<p>Evaluations with different protocols are not comparable.</p>",
            "<h3>Protocol</h3>",
            record(protocol_rows(evaluation)),
            "<h3>Provenance</h3>",
            record(provenance_rows(evaluation)),
        ]
    )
