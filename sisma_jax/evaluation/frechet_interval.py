"""A bootstrap interval of the Fréchet distance."""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from scipy.linalg import get_lapack_funcs

from sisma_jax.evaluation.feature_arrays import checked, checked_pair
from sisma_jax.evaluation.frechet import (
    FeatureStatistics,
    covariance_factor,
    distance_of_factors,
    frechet_distance,
)
from sisma_jax.evaluation.intervals import Interval, percentile_interval

# Images whose deviations from the mean are in memory at once: 64 MiB with 2048 dimensions.
_ROWS_PER_BLOCK = 4096


def num_frechet_resamples(dimensions: int) -> int:
    """Returns the number of resamples for an interval of the Fréchet distance within minutes on a CPU.

    A resample takes milliseconds with 512 dimensions, and seconds with 2048.

    Args:
      dimensions: of the features.
    """
    return 200 if dimensions < 1024 else 50


def frechet_interval(
    first: np.ndarray,
    second: np.ndarray | FeatureStatistics,
    *,
    seed: int = 0,
    num_resamples: int = 200,
    level: float = 0.95,
) -> Interval:
    """Returns the Fréchet distance of two sets of images and the interval of its value at these numbers of images.

    A resample draws the images of each set with replacement. It has fewer different images than the set, which raises
    the distance, as fewer images always do. The interval is therefore shifted by the mean of that increase. It shows
    how the distance would vary with other images, as many as these; it does not contain the distance of infinitely many
    images.

    A resample takes the covariance of the drawn features of each set, O(N D^2), its Cholesky decomposition, and the
    singular values of a matrix of at most D x D. A set with fewer images than dimensions needs no covariance. With 2048
    dimensions, expect a second per resample of 2,000 images on a CPU, and a few seconds of 50,000.

    Args:
      first: real numbers (N, D), features of at least 2 images.
      second: the same for the other set, (M, D); or its statistics, which are then kept as they are.
      seed: seed of the resamples.
      num_resamples: number of resamples, at least 1.
      level: confidence level, between 0 and 1.

    Raises:
      ValueError: the shapes are wrong, or `num_resamples` or `level` is out of range.
      InputError: a set has fewer than 2 images, or a value is not finite.
    """
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, got {num_resamples}.")
    generator = np.random.default_rng(seed)
    if isinstance(second, FeatureStatistics):
        first = checked(first, "first", least=2)
        second_statistics = second
        seconds = itertools.repeat(_Gaussian(second.mean, covariance_factor(second.covariance)))
    else:
        first, second = checked_pair(first, second, ("first", "second"), least=2)
        second_statistics = FeatureStatistics.from_batches([second])
        seconds = _resamples(second, generator)
    value = frechet_distance(FeatureStatistics.from_batches([first]), second_statistics)
    resampled = np.empty(num_resamples)
    for index, drawn, other in zip(range(num_resamples), _resamples(first, generator), seconds, strict=False):
        resampled[index] = distance_of_factors(drawn.mean - other.mean, drawn.factor, other.factor)
    interval = percentile_interval(value, resampled, level)
    increase = float(resampled.mean()) - value
    return interval._replace(low=max(0.0, interval.low - increase), high=max(0.0, interval.high - increase))


class _Gaussian(NamedTuple):
    """A mean, (D,), and a factor R of a covariance R^T R, with at most D rows."""

    mean: np.ndarray
    factor: np.ndarray


def _resamples(features: np.ndarray, generator: np.random.Generator) -> Iterator[_Gaussian]:
    """Yields the Gaussians of resamples without end."""
    count = len(features)
    while True:
        yield _gaussian(features, generator.integers(count, size=count))


def _gaussian(features: np.ndarray, indices: np.ndarray) -> _Gaussian:
    """Returns the Gaussian of images that are drawn with repetitions."""
    count = len(indices)
    weights = np.bincount(indices, minlength=len(features))
    # More than a third of the images are not drawn. The others contribute once, with their weights.
    drawn = np.flatnonzero(weights)
    mean = weights @ features / count
    scales = np.sqrt(weights[drawn] / (count - 1))[:, np.newaxis]
    dimensions = features.shape[1]
    if len(drawn) <= dimensions:
        return _Gaussian(mean, scales * (features[drawn] - mean))
    # A quarter of the time of a QR decomposition of all rows, and of its memory only a part.
    covariance = np.zeros((dimensions, dimensions))
    for start in range(0, len(drawn), _ROWS_PER_BLOCK):
        block = slice(start, start + _ROWS_PER_BLOCK)
        rows = scales[block] * (features[drawn[block]] - mean)
        covariance += rows.T @ rows
    return _Gaussian(mean, _cholesky_factor(covariance))


def _cholesky_factor(covariance: np.ndarray) -> np.ndarray:
    """Returns a matrix R, float64 (rank, D), with R^T R equal to the covariance, as `covariance_factor`.

    The Cholesky decomposition with pivoting takes a fifth of the time of the eigenvectors, and leaves out directions
    without variance. Without pivoting, it would fail for them.

    Args:
      covariance: as of `covariance_factor`.
    """
    (decompose,) = get_lapack_funcs(("pstrf",), (covariance,))
    upper, pivots, rank, _ = decompose(covariance)
    factor = np.empty((rank, len(covariance)))
    factor[:, pivots - 1] = np.triu(upper[:rank])
    return factor


def distance_of_resample(features: np.ndarray, reference: FeatureStatistics) -> Callable[[np.ndarray], float]:
    """Returns the function from the images of a resample to their Fréchet distance from a fixed set.

    Args:
      features: real numbers (N, D), of the images that are drawn.
      reference: of the fixed set.

    Raises:
      ValueError, InputError: as `frechet_interval`.
    """
    features = checked(features, "features", least=2)
    mean, factor = reference.mean, covariance_factor(reference.covariance)

    def distance(indices: np.ndarray) -> float:
        drawn = _gaussian(features, indices)
        return distance_of_factors(drawn.mean - mean, drawn.factor, factor)

    return distance
