"""How well sampled faces follow their masks: a segmenter reads each image and its answer is compared with the mask.

Intersection over union as in semantic segmentation (and as SPADE, arXiv 1903.07291, and its successors use it): one
confusion matrix over the whole set, never a mean of per-image scores.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from sisma_jax.data.classes import ClassSet
from sisma_jax.evaluation.segmenter import Segmenter


@dataclasses.dataclass(frozen=True)
class MaskAgreement:
    """Scores of predicted masks against target masks."""

    miou: float
    """Mean of `iou_per_class` over the classes that occur in the targets. NaN if there are no pixels."""
    pixel_accuracy: float
    iou_per_class: dict[str, float]
    """NaN for a class that no target has. Pixels wrongly given such a class still count against their true class."""


def confusion_matrix(predicted: np.ndarray, target: np.ndarray, classes: ClassSet) -> np.ndarray:
    """Returns counts: int64 (K, K), element [i, j] the pixels of true class i that were given class j.

    Matrices of batches may be added. Pixels whose target is the ignored label do not count.

    Args:
      predicted: uint8 (..., H, W), class indices.
      target: uint8 (..., H, W), class indices or the ignored label.
      classes: of both.

    Raises:
      ValueError: the shapes differ.
      InputError: a value is no label, or a predicted one is the ignored label.
    """
    if predicted.shape != target.shape:
        raise ValueError(f"predicted has shape {predicted.shape}, target has {target.shape}; they must be equal.")
    predicted = dataclasses.replace(classes, ignored=None).check(predicted, "predicted")
    target = classes.check(target, "target")
    counted = target < len(classes)
    pairs = target[counted].astype(np.int64) * len(classes) + predicted[counted]
    return np.bincount(pairs, minlength=len(classes) ** 2).reshape(len(classes), len(classes))


def agreement_from_confusion(confusion: np.ndarray, classes: ClassSet) -> MaskAgreement:
    """Returns the scores of a confusion matrix, int64 (K, K), whose rows are the true classes."""
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
    """Returns the agreement of predicted masks, uint8 (N, H, W), with target masks of the same shape."""
    return agreement_from_confusion(confusion_matrix(predicted, target, classes), classes)


def derangement(size: int, seed: int) -> np.ndarray:
    """Returns a permutation of 0..size-1, int64 (size,), in which no element keeps its place.

    A random cycle through all elements: each is followed by its right neighbour in a seeded shuffle.

    Raises:
      ValueError: `size` is below 2, for which there is none.
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
    segmenter: Segmenter,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns the agreement of sampled faces with their masks, and bounds of it from above and below.

    Args:
      samples: uint8 (N, H, W, 3); sample i was generated from mask i.
      originals: the held-out photographs that the masks belong to, uint8 (N, H, W, 3).
      masks: uint8 (N, H, W).
      segmenter: trained on other pairs of the same data set.
      seed: decides which masks are exchanged for `floor`.

    Returns:
      A dict fit for JSON: "num_images", and three rows, each {"miou", "pixel_accuracy", "iou_per_class"}, with None
      for a class that no mask has.
        samples: samples against their own masks.
        ceiling: originals against their masks: as far as the segmenter itself reaches.
        floor: samples against the masks of other people: what any well-placed face scores. None for a single
          image, which has nobody to exchange masks with.
    """
    if not len(samples) == len(originals) == len(masks):
        raise ValueError(
            f"samples, originals and masks must correspond, got {len(samples)}, {len(originals)} and {len(masks)}."
        )
    in_samples, in_originals = segmenter.predict(samples), segmenter.predict(originals)
    others = masks[derangement(len(masks), seed)] if len(masks) > 1 else None
    return {
        "num_images": len(masks),
        "samples": _row(in_samples, masks, segmenter.classes),
        "ceiling": _row(in_originals, masks, segmenter.classes),
        "floor": None if others is None else _row(in_samples, others, segmenter.classes),
    }


def _row(predicted: np.ndarray, target: np.ndarray, classes: ClassSet) -> dict[str, Any]:
    agreement = measure(predicted, target, classes)

    def number(value: float) -> float | None:
        return None if math.isnan(value) else value  # JSON has no NaN.

    return {
        "miou": number(agreement.miou),
        "pixel_accuracy": number(agreement.pixel_accuracy),
        "iou_per_class": {name: number(value) for name, value in agreement.iou_per_class.items()},
    }


_ROWS = {
    "ceiling": "real faces, own masks (ceiling)",
    "samples": "samples, own masks",
    "floor": "samples, others' masks (floor)",
}


def format_report(report: dict[str, Any]) -> str:
    """Returns the report as an aligned table, best bound first, and a note on what its numbers mean."""

    def cell(value: float | None) -> str:
        return f"{'-':>8}" if value is None else f"{value:8.3f}"

    rows = {name: report[name] for name in _ROWS if report[name] is not None}
    names = report["samples"]["iou_per_class"]
    title_width = max(map(len, [*_ROWS.values(), *names]))
    lines = [
        f"Mask agreement of {report['num_images']} held-out masks",
        f"{'':{title_width}} {'mIoU':>8} {'accuracy':>8}",
        *(
            f"{_ROWS[name]:{title_width}} {cell(row['miou'])} {cell(row['pixel_accuracy'])}"
            for name, row in rows.items()
        ),
        "",
        f"{'IoU by class':{title_width}} " + " ".join(f"{name:>8}" for name in rows),
        *(
            f"{name:{title_width}} " + " ".join(cell(row["iou_per_class"][name]) for row in rows.values())
            for name in names
        ),
        "",
        "The masks were read by a small segmenter trained on real pairs of the same data set:",
        "compare these numbers with each other, not with those of another run or a published parser.",
    ]
    return "\n".join(lines) + "\n"
