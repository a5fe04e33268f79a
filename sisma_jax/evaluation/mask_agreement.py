"""Measures how well sampled faces follow their masks, by comparing the mask of a face with its segmentation.

The metrics are those of semantic segmentation, which SPADE (arXiv 1903.07291) and its successors also use. They are
computed from one confusion matrix of all images, and are not means of scores per image.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from sisma_jax.data.classes import ClassSet
from sisma_jax.evaluation import results
from sisma_jax.evaluation.intervals import percentile_interval, resample_weights, sum_interval

_RESAMPLES = 1000


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


def confusion_matrices(predicted: np.ndarray, target: np.ndarray, classes: ClassSet) -> np.ndarray:
    """Returns the confusion matrix of each image, int32 (N, K, K).

    Element [n, i, j] counts the pixels of class i that are predicted as class j. Pixels whose target is the ignored
    label do not count. The scores of several images are those of the sum of their matrices.

    Args:
      predicted: uint8 (N, H, W), class indices.
      target: uint8 (N, H, W), class indices or the ignored label.
      classes: the K classes of both.

    Raises:
      ValueError: the shapes differ or are wrong.
      InputError: a value is not a label of `classes`, or a predicted value is the ignored label.
    """
    if predicted.shape != target.shape or predicted.ndim != 3:
        raise ValueError(
            f"predicted has shape {predicted.shape}, target has {target.shape}; both must be (N, H, W) of equal shape."
        )
    predicted = dataclasses.replace(classes, ignored=None).check(predicted, "predicted")
    target = classes.check(target, "target")
    size, image = len(classes), np.arange(len(target)).repeat(target[0].size if len(target) else 0)
    counted = (target < size).ravel()
    cells = (image * size + target.ravel()) * size + predicted.ravel()
    counts = np.bincount(cells[counted], minlength=len(target) * size**2)
    return counts.reshape(len(target), size, size).astype(np.int32)


def iou(confusion: np.ndarray) -> np.ndarray:
    """Returns the intersection over union of each class, float64 (..., K); NaN for a class that is not in the targets.

    Args:
      confusion: real numbers (..., K, K), numbers of pixels; the rows are the true classes.
    """
    correct = np.diagonal(confusion, axis1=-2, axis2=-1).astype(np.float64)
    true, given = confusion.sum(axis=-1), confusion.sum(axis=-2)
    is_present = true > 0
    return np.divide(correct, true + given - correct, out=np.full(correct.shape, np.nan), where=is_present)


def mean_iou(confusion: np.ndarray) -> np.ndarray:
    """Returns the mean of `iou` over the classes that are in the targets, float64 (...); NaN without pixels.

    Args:
      confusion: as `iou`.
    """
    values = iou(confusion)
    is_present = ~np.isnan(values)
    num_present = is_present.sum(axis=-1)
    total = np.where(is_present, values, 0.0).sum(axis=-1)
    return np.divide(total, num_present, out=np.full(total.shape, np.nan), where=num_present > 0)


def pixel_accuracy(confusion: np.ndarray) -> np.ndarray:
    """Returns the fraction of correct pixels, float64 (...); NaN without pixels.

    Args:
      confusion: as `iou`.
    """
    correct, total = np.trace(confusion, axis1=-2, axis2=-1), confusion.sum(axis=(-2, -1))
    return np.divide(correct, total, out=np.full(np.shape(total), np.nan), where=total > 0)


def agreement_from_confusion(confusion: np.ndarray, classes: ClassSet) -> MaskAgreement:
    """Returns the scores of a confusion matrix.

    Args:
      confusion: real numbers (K, K), the sum of matrices that `confusion_matrices` returns.
      classes: the K classes.
    """
    return MaskAgreement(
        miou=float(mean_iou(confusion)),
        pixel_accuracy=float(pixel_accuracy(confusion)),
        iou_per_class=dict(zip(classes.names, iou(confusion).tolist(), strict=True)),
    )


def measure(predicted: np.ndarray, target: np.ndarray, classes: ClassSet) -> MaskAgreement:
    """Returns the agreement of predicted masks with target masks.

    Args:
      predicted: uint8 (N, H, W), class indices.
      target: uint8 (N, H, W), class indices or the ignored label.
      classes: classes of both.

    Raises:
      ValueError, InputError: as `confusion_matrices`.
    """
    total = confusion_matrices(predicted, target, classes).sum(axis=0, dtype=np.int64)
    return agreement_from_confusion(total, classes)


def scores(confusion: np.ndarray, classes: ClassSet, *, seed: int = 0) -> results.AgreementScores:
    """Returns the scores of images with bootstrap intervals; None where no pixel counts.

    Args:
      confusion: int (N, K, K), as `confusion_matrices` returns it.
      classes: the K classes.
      seed: of the resamples.
    """
    return {
        "miou": _score(confusion, mean_iou, seed),
        "pixel_accuracy": _score(confusion, pixel_accuracy, seed),
        "iou_per_class": _class_scores(confusion, classes, seed),
    }


def _class_scores(confusion: np.ndarray, classes: ClassSet, seed: int) -> dict[str, results.Score | None]:
    """Returns the score of each class. The interval is that of the resamples that contain the class."""
    count, values = len(confusion), iou(confusion.sum(axis=0, dtype=np.int64))
    flat = confusion.reshape(count, -1).astype(np.float64)
    sums = [weights @ flat for weights in resample_weights(count, _RESAMPLES, seed)] if count > 1 else [flat]
    resampled = iou(np.concatenate(sums).reshape(-1, *confusion.shape[1:]))
    scores: dict[str, results.Score | None] = dict.fromkeys(classes.names)
    for index, name in enumerate(classes.names):
        if not math.isnan(values[index]):
            of_class = resampled[:, index]
            interval = percentile_interval(float(values[index]), of_class[~np.isnan(of_class)])
            scores[name] = results.as_score(interval)
    return scores


def _score(confusion: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int) -> results.Score | None:
    has_pixels = confusion.sum(axis=(-2, -1)) > 0
    if not has_pixels.any():
        return None
    if has_pixels.sum() == 1:  # no interval
        value = float(statistic(confusion.sum(axis=0)))
        return {"value": value, "low": value, "high": value, "level": 0.0}
    return results.as_score(sum_interval(confusion[has_pixels], statistic, seed=seed))


def format_report(report: results.MaskAgreement) -> str:
    """Returns the agreement as an aligned text table of ceiling, samples and floor, with a note on its use.

    Args:
      report: the agreement of samples, with an upper and a lower reference value.
    """

    def cell(value: float | None) -> str:
        return f"{'-':>8}" if value is None else f"{value:8.3f}"

    def value(score: results.Score | None) -> float | None:
        return None if score is None else score["value"]

    titled = {
        "ceiling": ("real faces, own masks (ceiling)", report["ceiling"]),
        "samples": ("samples, own masks", report["samples"]),
        "floor": ("samples, others' masks (floor)", report["floor"]),
    }
    rows = {name: (title, one) for name, (title, one) in titled.items() if one is not None}
    names = report["samples"]["iou_per_class"]
    title_width = max(map(len, [*(title for title, _ in titled.values()), *names]))
    lines = [
        f"Mask agreement of {report['num_images']} held-out masks",
        f"{'':{title_width}} {'mIoU':>8} {'accuracy':>8}",
        *(
            f"{title:{title_width}} {cell(value(one['miou']))} {cell(value(one['pixel_accuracy']))}"
            for title, one in rows.values()
        ),
        "",
        f"{'IoU by class':{title_width}} " + " ".join(f"{name:>8}" for name in rows),
        *(
            f"{name:{title_width}} " + " ".join(cell(value(one["iou_per_class"][name])) for _, one in rows.values())
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
