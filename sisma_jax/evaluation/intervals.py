"""Bootstrap intervals: how much a metric would vary with other test images (Efron and Tibshirani, 1993, chapter 13).

A resample draws as many images as there are, with replacement. The limits of an interval are percentiles of the metric
over many resamples. All functions with the same seed and number of images draw the same resamples.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from sisma_jax.errors import InputError

# Resamples whose weights are multiplied in one matrix product, limited to 64 MiB of weights.
_WEIGHTS_PER_BLOCK = 1 << 23


class Interval(NamedTuple):
    """A value and its confidence interval.

    Attributes:
      value: the metric of the images themselves.
      low: lower limit.
      high: upper limit.
      level: confidence level, such as 0.95.
    """

    value: float
    low: float
    high: float
    level: float


def resamples(count: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yields the images of each resample, int64 (count,).

    Args:
      count: number of images, at least 2.
      num_resamples: number of resamples, at least 1.
      seed: seed of the resamples.

    Raises:
      ValueError: `num_resamples` is less than 1.
      InputError: there are fewer than 2 images.
    """
    if count < 2:
        raise InputError(f"A bootstrap interval needs at least 2 images, got {count}; evaluate more images.")
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, got {num_resamples}.")
    generator = np.random.default_rng(seed)
    return (generator.integers(count, size=count) for _ in range(num_resamples))


def resample_weights(count: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yields how often each image is in each resample, float64 (R, count), in blocks of R resamples.

    Args:
      count: as `resamples`.
      num_resamples: as `resamples`.
      seed: as `resamples`.
    """
    drawn = resamples(count, num_resamples, seed)
    block_size = max(1, min(num_resamples, _WEIGHTS_PER_BLOCK // count))
    for start in range(0, num_resamples, block_size):
        size = min(block_size, num_resamples - start)
        yield np.stack([np.bincount(next(drawn), minlength=count) for _ in range(size)]).astype(np.float64)


def percentile_interval(value: float, resampled: np.ndarray, level: float = 0.95) -> Interval:
    """Returns the interval between the percentiles of a metric over resamples.

    Args:
      value: the metric of the images themselves.
      resampled: float64 (R,), the metric of each resample.
      level: confidence level, between 0 and 1.

    Raises:
      ValueError: the level is not between 0 and 1.
      InputError: a value is not finite.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}.")
    if not (np.isfinite(value) and np.isfinite(resampled).all()):
        raise InputError("The metric is not finite for all images or for a resample; omit the images without a value.")
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high), level)


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float],
    count: int,
    *,
    seed: int = 0,
    num_resamples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """Returns the interval of any metric, which is computed once per resample.

    Args:
      statistic: (indices of images, int64 (count,), with repetitions) -> metric.
      count: number of images, at least 2.
      seed: seed of the resamples.
      num_resamples: number of resamples.
      level: confidence level, between 0 and 1.

    Raises:
      ValueError, InputError: as `resamples` and `percentile_interval`.
    """
    resampled = np.array([statistic(indices) for indices in resamples(count, num_resamples, seed)], np.float64)
    return percentile_interval(statistic(np.arange(count)), resampled, level)


def mean_interval(values: np.ndarray, *, seed: int = 0, num_resamples: int = 1000, level: float = 0.95) -> Interval:
    """Returns the interval of the mean over images.

    Args:
      values: real numbers (N,), one per image.
      seed: seed of the resamples.
      num_resamples: number of resamples.
      level: confidence level, between 0 and 1.

    Raises:
      ValueError: `values` has another shape; or as `bootstrap_interval`.
      InputError: as `bootstrap_interval`.
    """
    if np.ndim(values) != 1:
        raise ValueError(f"values must be (N,), one per image, got shape {np.shape(values)}.")
    count = len(values)
    return sum_interval(values, lambda sums: sums / count, seed=seed, num_resamples=num_resamples, level=level)


def sum_interval(
    terms: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    seed: int = 0,
    num_resamples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """Returns the interval of a metric that is a function of a sum over images, such as the mIoU.

    The sums of all resamples are one matrix product, so the time hardly depends on the metric.

    Args:
      terms: real numbers (N, ...), one term per image, such as confusion matrices (N, K, K).
      statistic: (sums, float64 (R, ...)) -> metric of each sum, (R,), such as `mask_agreement.mean_iou`.
      seed: seed of the resamples.
      num_resamples: number of resamples.
      level: confidence level, between 0 and 1.

    Raises:
      ValueError, InputError: as `bootstrap_interval`.
    """
    value, resampled = resampled_sums(terms, statistic, seed=seed, num_resamples=num_resamples)
    return percentile_interval(value, resampled, level)


def resampled_sums(
    terms: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], *, seed: int, num_resamples: int
) -> tuple[float, np.ndarray]:
    """Returns a metric of the sum over all images, and of the sum over each resample, float64 (R,).

    Args:
      terms: as `sum_interval`.
      statistic: as `sum_interval`.
      seed: as `sum_interval`.
      num_resamples: as `sum_interval`.
    """
    terms = np.asarray(terms, np.float64)
    flat = terms.reshape(len(terms), -1)
    weights = resample_weights(len(terms), num_resamples, seed)
    resampled = [statistic((block @ flat).reshape(-1, *terms.shape[1:])) for block in weights]
    return float(statistic(terms.sum(axis=0, keepdims=True))[0]), np.concatenate(resampled)
