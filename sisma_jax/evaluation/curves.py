"""The values of a metric over the training steps, from the lines of `metrics.jsonl`."""

from collections.abc import Mapping, Sequence

import numpy as np


def series(metrics: Sequence[Mapping[str, int | float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps and the values of all lines that contain a metric, both float64 (P,).

    Args:
      metrics: lines of `metrics.jsonl`, as `read_metrics` returns them.
      name: of the metric.
    """
    points = np.array([(line["step"], line[name]) for line in metrics if name in line], np.float64).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def smooth(values: np.ndarray, *, reach: int) -> np.ndarray:
    """Returns the mean over each value and its `reach` neighbours on either side, without values that are not finite.

    Args:
      values: float64 (P,).
      reach: less than half the length of the series.
    """
    finite = np.isfinite(values)
    ones = np.ones(2 * reach + 1)
    total = np.convolve(np.where(finite, values, 0.0), ones, mode="same")
    count = np.convolve(finite, ones, mode="same")
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)
