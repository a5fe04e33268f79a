"""The values of an evaluation as rows of text, for the report and the model card."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from sisma_jax.evaluation.explanations import Better, Explanation, explain, features_of, network_label
from sisma_jax.evaluation.results import Evaluation, MaskAgreement, Score, SetDistances

LINK = re.compile(r"(https?://[^\s<>|`\"']*[^\s<>|`\"'.,;:)])")
"""An address in the text of a reason, such as where a file is downloaded from."""


@dataclasses.dataclass(frozen=True)
class MetricRow:
    """One metric.

    Attributes:
      name: of the metric in the result file, such as "fd_parser".
      label: name for readers, within its group.
      full_label: name for readers, outside of its group.
      meaning: what the metric means, and the values that it can be compared with.
      better: which values are good; "" if the metric has no good direction.
      number: the value itself.
      value: the value, rounded.
      interval: its interval, rounded alike; "" if there is none.
    """

    name: str
    label: str
    full_label: str
    meaning: str
    better: Better
    number: float
    value: str
    interval: str


@dataclasses.dataclass(frozen=True)
class MetricGroup:
    """Metrics that answer the same question.

    Attributes:
      title: heading of the group.
      rows: its metrics, at least one.
    """

    title: str
    rows: tuple[MetricRow, ...]


def metric_groups(evaluation: Evaluation) -> list[MetricGroup]:
    """Returns all metrics of an evaluation; groups without a metric are left out.

    Args:
      evaluation: the values.
    """
    level = interval_level(evaluation)
    groups = [MetricGroup("Agreement with the masks", tuple(_agreement_rows(evaluation["mask_agreement"], level)))]
    for one in evaluation["distances"]:
        title = f"Distance to real images in {features_of(one['network'])}"
        groups.append(MetricGroup(title, tuple(_distance_rows(one, level))))
    for title, scores in (
        ("Variety of the samples of a mask", evaluation["diversity"]),
        ("Distance to the originals", evaluation["paired"]),
        ("Autoencoder", evaluation["reconstruction"]),
    ):
        groups.append(MetricGroup(title, tuple(_score_row(name, score, level) for name, score in scores.items())))
    groups.append(MetricGroup("Training", tuple(_training_rows(evaluation, level))))
    return [group for group in groups if group.rows]


def interval_level(evaluation: Evaluation) -> float | None:
    """Returns the confidence level of the intervals; None if they differ or there are none.

    Args:
      evaluation: the values.
    """
    levels = {score["level"] for score in _all_scores(evaluation)}
    return levels.pop() if len(levels) == 1 else None


def interval_title(evaluation: Evaluation) -> str:
    """Returns the heading of the column of intervals, such as "95 % interval".

    Args:
      evaluation: the values.
    """
    level = interval_level(evaluation)
    return "Interval" if level is None else f"{level:.0%} interval".replace("%", " %")


def label_of(name: str) -> str:
    """Returns the name of a metric for readers; `name` itself if the metric is unknown.

    Args:
      name: as `explain`.
    """
    explanation = explain(name)
    return name if explanation is None else explanation.full_label


def format_number(value: float, like: float | None = None) -> str:
    """Returns a number with about three significant digits.

    Args:
      value: the number.
      like: number that decides how many decimals are kept; `value` itself if None.
    """
    magnitude = abs(value if like is None else like)
    if not math.isfinite(magnitude) or not math.isfinite(value):
        return str(value)
    if magnitude != 0 and magnitude < 0.0995:
        decimals = min(2 - math.floor(math.log10(magnitude)), 9)
    else:
        decimals = next((d for limit, d in ((10, 3), (100, 2), (1000, 1)) if magnitude < limit), 0)
    return f"{value:,.{decimals}f}"


def protocol_rows(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Returns labels and values of the protocol, which says how the numbers were obtained.

    Args:
      evaluation: the values.
    """
    protocol = evaluation["protocol"]
    size = protocol["image_size"]
    rows = [
        ("Protocol", protocol["name"].upper() if protocol["name"] else "values of the configuration"),
        ("Data", protocol["data"]),
        ("Held-out masks, one sample each", _count(protocol["num_masks"])),
        ("Real images", _count(protocol["num_references"])),
        ("Which real images", protocol["references"]),
        ("Image size", f"{size} × {size} px" if size else ""),
        ("Masks with several samples", _several(protocol["diversity_masks"], protocol["samples_per_mask"])),
        ("Sampling", ", ".join(f"{name} {_plain(value)}" for name, value in protocol["sampling"].items())),
    ]
    rows += [(f"Resizing for {network_label(name)}", how) for name, how in protocol["resize"].items()]
    return [(label, value) for label, value in rows if value]


def provenance_rows(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Returns labels and values of all that identifies what was evaluated, and with what.

    Args:
      evaluation: the values.
    """
    subject = evaluation["subject"]
    rows = [
        ("Evaluated", subject["path"]),
        ("Step", f"{subject['step']:,}" if "step" in subject else ""),
        ("Parameters", f"{subject['parameters']:,}" if "parameters" in subject else ""),
        (
            "Checksum of the samples" if subject["kind"] == "folders" else "Checksum of the EMA parameters",
            subject["checksum"],
        ),
        ("Fingerprint of the data", evaluation["protocol"]["data_fingerprint"]),
    ]
    rows += [(f"Checksum, {network_label(name)}", value) for name, value in evaluation["networks"].items()]
    rows += [("Versions", ", ".join(f"{name} {version}" for name, version in evaluation["versions"].items()))]
    rows += [("Format of the result file", str(evaluation["format"]))]
    return [(label, value) for label, value in rows if value]


def _all_scores(evaluation: Evaluation) -> Iterator[Score]:
    agreement, memorization = evaluation["mask_agreement"], evaluation["memorization"]
    if agreement is not None:
        for score in (agreement["samples"]["miou"], agreement["samples"]["pixel_accuracy"]):
            if score is not None:
                yield score
    for one in evaluation["distances"]:
        yield from one["scores"].values()
    for scores in (evaluation["diversity"], evaluation["paired"], evaluation["reconstruction"]):
        yield from scores.values()
    if memorization is not None:
        yield from (memorization["samples"], memorization["held_out"])


def _agreement_rows(agreement: MaskAgreement | None, level: float | None) -> Iterator[MetricRow]:
    if agreement is None:
        return
    for name in ("miou", "pixel_accuracy"):
        score = agreement["samples"][name]
        ceiling = None if agreement["ceiling"] is None else agreement["ceiling"][name]
        if score is None:
            continue
        floor = None if agreement["floor"] is None else agreement["floor"][name]
        known = []
        if ceiling is not None:
            known.append(f"the original photographs reach {format_number(ceiling['value'], score['value'])}")
        if floor is not None:
            known.append(f"samples of other masks {format_number(floor['value'], score['value'])}")
        context = f" For comparison: {', '.join(known)}." if known else ""
        row = _score_row(name, score, level)
        yield dataclasses.replace(row, meaning=row.meaning + context)


def _distance_rows(distances: SetDistances, level: float | None) -> Iterator[MetricRow]:
    network, spread = distances["network"], distances["kernel_spread"]
    for name, score in distances["scores"].items():
        is_frechet = name == "fid" or name.startswith("fd_")
        row = _score_row(name if is_frechet else f"{network}_{name}", score, level)
        if name == "kernel_distance" and spread is not None:
            context = f" Its standard deviation over subsets of images is {format_number(spread, score['value'])}."
            row = dataclasses.replace(row, meaning=row.meaning + context)
        yield row


def _training_rows(evaluation: Evaluation, level: float | None) -> Iterator[MetricRow]:
    memorization, loss = evaluation["memorization"], evaluation["held_out_loss"]
    if memorization is not None and memorization["ratio"] is not None:
        samples, held_out = memorization["samples"]["value"], memorization["held_out"]["value"]
        row = _score_row("memorization_ratio", memorization["ratio"], level)
        context = (
            f" Samples: {format_number(samples)}, held-out originals: {format_number(held_out, samples)}, in the "
            f"features of the face parser, among {memorization['num_training_images']:,} training images."
        )
        yield dataclasses.replace(row, meaning=row.meaning + context)
    if loss is not None:
        yield _score_row("held_out_loss", loss, level)


def _score_row(name: str, score: Score, level: float | None) -> MetricRow:
    low, high = (format_number(score[limit], score["value"]) for limit in ("low", "high"))
    stated = "" if level is not None else f" ({score['level']:.0%})"
    return _row(name, score["value"], f"{low} – {high}{stated}")


def _row(name: str, number: float, interval: str) -> MetricRow:
    explanation = explain(name) or Explanation(name, "", "")
    return MetricRow(
        name=name,
        label=explanation.label,
        full_label=explanation.full_label,
        meaning=explanation.meaning,
        better=explanation.better,
        number=number,
        value=format_number(number),
        interval=interval,
    )


def _count(number: int) -> str:
    return f"{number:,}" if number else ""


def _several(masks: int, samples: int) -> str:
    return f"{masks:,}, {samples:,} samples each" if masks else ""


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
