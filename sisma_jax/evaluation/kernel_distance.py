"""The kernel distance between the features of two sets of images (KID; Bińkowski et al., arXiv 1801.01401).

Unlike the Fréchet distance, its estimate has no bias, so that it can be used with few images.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sisma_jax.errors import InputError
from sisma_jax.evaluation.feature_arrays import checked_pair
from sisma_jax.evaluation.intervals import Interval, percentile_interval, resample_weights

_DEGREE = 3
# Rows per block: 64 MiB per block of the kernel's matrix.
_BLOCK_SIZE = 2896
# Images of each set in a resample: three matrices of 32 MiB.
_MOST_RESAMPLED = 2000


class KernelDistance(NamedTuple):
    """The result of `kernel_distance`.

    Attributes:
      mean: mean over the subsets of the unbiased squared maximum mean discrepancy; slightly negative values are normal
        for equal distributions.
      std: standard deviation over the subsets, 0 for a single one. It is the spread of the estimate from
        `subset_size` images, not the error of the mean.
    """

    mean: float
    std: float


def polynomial_mmd(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the unbiased estimate of the squared maximum mean discrepancy between two sets of images.

    The kernel is k(x, y) = (x·y / D + 1)^3. The mean over the pairs of one set omits the pairs of an image with itself.
    Memory is bounded: the matrix of the kernel is summed in blocks.

    Args:
      first: real numbers (N, D), N at least 2.
      second: real numbers (M, D), M at least 2.

    Raises:
      ValueError: the shapes are wrong.
      InputError: a set has fewer than 2 images, or a value is not finite.
    """
    first, second = checked_pair(first, second, ("first", "second"), least=2)
    return _mmd(first, second)


def _mmd(first: np.ndarray, second: np.ndarray) -> float:
    cross = _kernel_sum(first, second) / (len(first) * len(second))
    return _mean_within(first) + _mean_within(second) - 2 * cross


def _mean_within(features: np.ndarray) -> float:
    """Mean of the kernel over the pairs of different images."""
    own = float(_kernel(np.einsum("nd,nd->n", features, features), features.shape[1]).sum())
    return (_kernel_sum(features, features) - own) / (len(features) * (len(features) - 1))


def _kernel_sum(first: np.ndarray, second: np.ndarray) -> float:
    """Sum of the kernel over all pairs."""
    total = 0.0
    for i in range(0, len(first), _BLOCK_SIZE):
        for j in range(0, len(second), _BLOCK_SIZE):
            products = first[i : i + _BLOCK_SIZE] @ second[j : j + _BLOCK_SIZE].T
            total += float(_kernel(products, first.shape[1]).sum())
    return total


def _kernel(products: np.ndarray, dimensions: int) -> np.ndarray:
    return (products / dimensions + 1.0) ** _DEGREE


def kernel_distance(
    first: np.ndarray, second: np.ndarray, *, num_subsets: int = 100, subset_size: int | None = 1000, seed: int = 0
) -> KernelDistance:
    """Returns the kernel distance (KID) between two sets of images.

    As torch-fidelity does by default, the distance is the mean over 100 random subsets of 1000 images of each set. All
    images at once (`subset_size=None`) give an estimate with less variance in a time of O(N M D).

    Args:
      first: real numbers (N, D).
      second: real numbers (M, D).
      num_subsets: number of subsets, at least 1; without effect if `subset_size` is None.
      subset_size: images of each set per subset, drawn without replacement, at least 2; None for all images at once.
      seed: seed of the subsets.

    Raises:
      ValueError: the shapes are wrong, or `num_subsets` is less than 1.
      InputError: a set has fewer images than a subset, or fewer than 2, or a value is not finite.
    """
    first, second = checked_pair(first, second, ("first", "second"), least=2)
    if subset_size is None:
        return KernelDistance(_mmd(first, second), 0.0)
    if num_subsets < 1:
        raise ValueError(f"num_subsets must be at least 1, got {num_subsets}.")
    if not 2 <= subset_size <= min(len(first), len(second)):
        raise InputError(
            f"subset_size must be between 2 and the number of images, {min(len(first), len(second))}, "
            f"got {subset_size}; choose fewer, or evaluate more images."
        )
    generator = np.random.default_rng(seed)
    values = [
        _mmd(*(features[generator.choice(len(features), subset_size, replace=False)] for features in (first, second)))
        for _ in range(num_subsets)
    ]
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def kernel_interval(
    first: np.ndarray,
    second: np.ndarray,
    value: float,
    *,
    seed: int = 0,
    num_resamples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """Returns the interval of the kernel distance around its value.

    A resample draws images of both sets with replacement, and omits the pairs of an image with itself. At most
    2000 images of each set are resampled; the deviations from their own distance are then multiplied by the square root
    of 2000 / N, since the standard error falls with the square root of the number of images.

    Args:
      first: real numbers (N, D).
      second: real numbers (M, D).
      value: the distance, around which the interval lies.
      seed: seed of the resamples.
      num_resamples: number of resamples, at least 1.
      level: confidence level, between 0 and 1.

    Raises:
      ValueError, InputError: as `polynomial_mmd`.
    """
    first, second = checked_pair(first, second, ("first", "second"), least=2)
    generator = np.random.default_rng(seed)
    least = min(len(first), len(second))
    drawn = [
        features[generator.choice(len(features), min(len(features), _MOST_RESAMPLED), replace=False)]
        for features in (first, second)
    ]
    scale = np.sqrt(min(1.0, _MOST_RESAMPLED / least))
    x, y = drawn
    dimensions = x.shape[1]
    cross = _kernel(x @ y.T, dimensions)
    within = [_kernel(features @ features.T, dimensions) for features in drawn]
    for matrix in within:
        np.fill_diagonal(matrix, 0.0)
    weights = (resample_weights(len(z), num_resamples, seed + i) for i, z in enumerate(drawn))
    resampled = [_weighted_mmd(v, w, within, cross) for v, w in zip(*weights, strict=True)]
    own = _weighted_mmd(np.ones((1, len(x))), np.ones((1, len(y))), within, cross)[0]
    deviations = np.concatenate(resampled) - own
    # A resample of a few images may have a single one, many times, and then no pair.
    return percentile_interval(value, value + scale * deviations[~np.isnan(deviations)], level)


def _weighted_mmd(v: np.ndarray, w: np.ndarray, within: Sequence[np.ndarray], cross: np.ndarray) -> np.ndarray:
    """Returns the distance of each resample, float64 (R,), by the weights (R, N) and (R, M); NaN without a pair."""
    means = []
    for weights, matrix in zip((v, w), within, strict=True):
        total = weights.sum(axis=1)
        pairs = total**2 - (weights**2).sum(axis=1)
        sums = ((weights @ matrix) * weights).sum(axis=1)
        means.append(np.divide(sums, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0))
    between = ((v @ cross) * w).sum(axis=1) / (v.sum(axis=1) * w.sum(axis=1))
    return means[0] + means[1] - 2 * between
