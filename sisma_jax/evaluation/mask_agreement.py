"""Measures how well sampled faces follow their masks, by comparing the mask of a face with its segmentation.

The metrics are those of semantic segmentation, which SPADE (arXiv 1903.07291) and its successors also use. They are
computed from one confusion matrix of all images, and are not means of scores per image.
"""

import dataclasses
import math
from typing import TypedDict

import numpy as np

from sisma_jax.data.classes import ClassSet
from sisma_jax.models.face_parser import FaceParser


@dataclasses.dataclass(frozen=True)
class MaskAgreement:
    """Scores of predicted masks against target masks."""

    miou: float
    """Mean of `iou_per_class` over the classes that occur in the targets, in [0, 1]; NaN if no pixel counts."""
    pixel_accuracy: float
    """Fraction of the pixels whose class is predicted correctly, in [0, 1]; NaN if no pixel counts."""
    iou_per_class: dict[str, float]
    """Intersection over union by the name of the class, in [0, 1]; NaN for a class that does not occur in the targets.
    A pixel that is wrongly assigned to such a class still lowers the score of its true class."""


class Scores(TypedDict):
    """`MaskAgreement` in a form that JSON can represent: None replaces NaN."""

    miou: float | None
    pixel_accuracy: float | None
    iou_per_class: dict[str, float | None]


class AgreementReport(TypedDict):
    """The result of `agreement_report`, which JSON can represent.

    Attributes:
      num_images: number of masks.
      samples: scores of the samples against their own masks.
      ceiling: scores of the original photographs against their masks, which are limited by the face parser only.
      floor: scores of the samples against the masks of other faces, which any well-aligned face reaches; None for a
        single image.
    """

    num_images: int
    samples: Scores
    ceiling: Scores
    floor: Scores | None


def confusion_matrix(predicted: np.ndarray, target: np.ndarray, classes: ClassSet) -> np.ndarray:
    """Returns the confusion matrix, int64 (K, K).

    Element [i, j] counts the pixels of class i that are predicted as class j. Pixels whose target is the ignored label
    do not count. The matrices of several batches can be added.

    Args:
      predicted: uint8 (..., H, W), class indices.
      target: uint8 (..., H, W), class indices or the ignored label.
      classes: the K classes of both.

    Raises:
      ValueError: the shapes differ.
      InputError: a value is not a label of `classes`, or a predicted value is the ignored label.
    """
    if predicted.shape != target.shape:
        raise ValueError(f"predicted has shape {predicted.shape}, target has {target.shape}; they must be equal.")
    predicted = dataclasses.replace(classes, ignored=None).check(predicted, "predicted")
    target = classes.check(target, "target")
    counted = target < len(classes)
    pairs = target[counted].astype(np.int64) * len(classes) + predicted[counted]
    return np.bincount(pairs, minlength=len(classes) ** 2).reshape(len(classes), len(classes))


def agreement_from_confusion(confusion: np.ndarray, classes: ClassSet) -> MaskAgreement:
    """Returns the scores of a confusion matrix.

    Args:
      confusion: int64 (K, K), as `confusion_matrix` returns it; the rows are the true classes.
      classes: the K classes.
    """
    correct = np.diag(confusion)
    true, given = confusion.sum(axis=1), confusion.sum(axis=0)
    present = true > 0
    iou = np.full(len(correct), np.nan)
    iou[present] = correct[present] / (true + given - correct)[present]
    total = int(confusion.sum())
    return MaskAgreement(
        miou=float(iou[present].mean()) if total else math.nan,
        pixel_accuracy=float(correct.sum() / total) if total else math.nan,
        iou_per_class=dict(zip(classes.names, iou.tolist(), strict=True)),
    )


def measure(predicted: np.ndarray, target: np.ndarray, classes: ClassSet) -> MaskAgreement:
    """Returns the agreement of predicted masks with target masks.

    Args:
      predicted: uint8 (N, H, W), class indices.
      target: uint8 (N, H, W), class indices or the ignored label.
      classes: classes of both.

    Raises:
      ValueError, InputError: as `confusion_matrix`.
    """
    return agreement_from_confusion(confusion_matrix(predicted, target, classes), classes)


def derangement(size: int, seed: int) -> np.ndarray:
    """Returns a random permutation of 0..size-1 without a fixed point, int64 (size,).

    The permutation is a single cycle: it maps each element to its right neighbour in a random order of all elements.

    Args:
      size: number of elements, at least 2.
      seed: seed of the random order.

    Raises:
      ValueError: `size` is less than 2.
    """
    if size < 2:
        raise ValueError(f"size {size} has no permutation without a fixed point; give at least 2.")
    order = np.random.default_rng(seed).permutation(size)
    result = np.empty(size, np.int64)
    result[order] = np.roll(order, -1)
    return result


def agreement_report(
    samples: np.ndarray,
    originals: np.ndarray,
    masks: np.ndarray,
    parser: FaceParser,
    *,
    seed: int = 0,
) -> AgreementReport:
    """Returns the agreement of sampled faces with their masks, with an upper and a lower reference value.

    Args:
      samples: uint8 (N, H, W, 3), RGB; sample i was generated from mask i.
      originals: uint8 (N, H, W, 3), RGB; the held-out photographs of the masks.
      masks: uint8 (N, H, W), class indices or the ignored label.
      parser: predicts the classes of the masks; trained on other pairs.
      seed: seed of the assignment of other masks to the samples, for "floor".

    Raises:
      ValueError: `samples`, `originals` and `masks` have different lengths, a shape is wrong, or images are not uint8.
      InputError: a mask contains a value that is not a label of the parser's classes.
    """
    if not len(samples) == len(originals) == len(masks):
        raise ValueError(
            "samples, originals and masks must have the same length, got "
            f"{len(samples)}, {len(originals)} and {len(masks)}."
        )
    in_samples, in_originals = parser.predict(samples), parser.predict(originals)
    others = masks[derangement(len(masks), seed)] if len(masks) > 1 else None
    return {
        "num_images": len(masks),
        "samples": _row(in_samples, masks, parser.classes),
        "ceiling": _row(in_originals, masks, parser.classes),
        "floor": None if others is None else _row(in_samples, others, parser.classes),
    }


def _row(predicted: np.ndarray, target: np.ndarray, classes: ClassSet) -> Scores:
    agreement = measure(predicted, target, classes)

    def number(value: float) -> float | None:
        return None if math.isnan(value) else value  # JSON has no NaN.

    return {
        "miou": number(agreement.miou),
        "pixel_accuracy": number(agreement.pixel_accuracy),
        "iou_per_class": {name: number(value) for name, value in agreement.iou_per_class.items()},
    }


def format_report(report: AgreementReport) -> str:
    """Returns the report as an aligned text table of ceiling, samples and floor, with a note on its use."""

    def cell(value: float | None) -> str:
        return f"{'-':>8}" if value is None else f"{value:8.3f}"

    titled = {
        "ceiling": ("real faces, own masks (ceiling)", report["ceiling"]),
        "samples": ("samples, own masks", report["samples"]),
        "floor": ("samples, others' masks (floor)", report["floor"]),
    }
    rows = {name: (title, scores) for name, (title, scores) in titled.items() if scores is not None}
    names = report["samples"]["iou_per_class"]
    title_width = max(map(len, [*(title for title, _ in titled.values()), *names]))
    lines = [
        f"Mask agreement of {report['num_images']} held-out masks",
        f"{'':{title_width}} {'mIoU':>8} {'accuracy':>8}",
        *(
            f"{title:{title_width}} {cell(scores['miou'])} {cell(scores['pixel_accuracy'])}"
            for title, scores in rows.values()
        ),
        "",
        f"{'IoU by class':{title_width}} " + " ".join(f"{name:>8}" for name in rows),
        *(
            f"{name:{title_width}} " + " ".join(cell(scores["iou_per_class"][name]) for _, scores in rows.values())
            for name in names
        ),
        "",
        "A face parser has predicted the masks of the faces. Compare these numbers only with those of the same parser.",
    ]
    return "\n".join(lines) + "\n"


def format_agreement(agreement: MaskAgreement, title: str) -> str:
    """Returns the scores as an aligned text table.

    Args:
      agreement: the scores.
      title: of the table.
    """
    width = max(map(len, agreement.iou_per_class))
    values = {"mIoU": agreement.miou, "accuracy": agreement.pixel_accuracy}
    lines = [f"{name:{width}} {value:8.3f}" for name, value in values.items()]
    per_class = [
        f"{name:{width}} {'-' if math.isnan(iou) else format(iou, '.3f'):>8}"
        for name, iou in agreement.iou_per_class.items()
    ]
    return "\n".join([title, *lines, "", "IoU by class", *per_class]) + "\n"
