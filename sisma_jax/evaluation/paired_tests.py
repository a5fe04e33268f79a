"""Paired tests: whether one run is better than another on the same masks.

Both runs are evaluated on the same masks, so a resample draws masks, and with each mask the images of both runs. What
makes a mask difficult for both cancels, and the interval of the difference is narrower than the two intervals suggest.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sisma_jax.errors import InputError
from sisma_jax.evaluation import intervals
from sisma_jax.evaluation.intervals import Interval

# Sign patterns per block: 64 MiB in float64.
_SIGNS_PER_BLOCK = 1 << 23


class PairedTest(NamedTuple):
    """The difference between two runs.

    Attributes:
      difference: metric of the first run minus that of the second, with its bootstrap interval.
      p_value: two-sided, in (0, 1]: how often chance alone gives such a difference if the runs are equally good.
    """

    difference: Interval
    p_value: float


def paired_bootstrap(
    first: Callable[[np.ndarray], float],
    second: Callable[[np.ndarray], float],
    count: int,
    *,
    seed: int = 0,
    num_resamples: int = 1000,
    level: float = 0.95,
) -> PairedTest:
    """Returns the test of the difference of any metric, which is computed twice per resample.

    The p-value is twice the fraction of the resamples in which the difference is 0 or has the other sign. Its least
    value is 2 / (num_resamples + 1).

    Args:
      first: (indices of masks, int64 (count,), with repetitions) -> metric of the first run.
      second: the same for the second run.
      count: number of masks, at least 2.
      seed: seed of the resamples.
      num_resamples: number of resamples.
      level: confidence level, between 0 and 1.

    Raises:
      ValueError, InputError: as `intervals.bootstrap_interval`.
    """

    def difference(indices: np.ndarray) -> float:
        return first(indices) - second(indices)

    resampled = [difference(indices) for indices in intervals.resamples(count, num_resamples, seed)]
    return _bootstrap_test(difference(np.arange(count)), np.array(resampled, np.float64), level)


def paired_sums(
    first: np.ndarray,
    second: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    seed: int = 0,
    num_resamples: int = 1000,
    level: float = 0.95,
) -> PairedTest:
    """Returns the test of the difference of a metric that is a function of a sum over images, such as the mIoU.

    The p-value is that of `paired_bootstrap`.

    Args:
      first: real numbers (N, ...), one term per mask, such as the confusion matrices (N, K, K) of the first run.
      second: the same for the second run.
      statistic: as `intervals.sum_interval`, such as `mask_agreement.mean_iou`.
      seed: seed of the resamples.
      num_resamples: number of resamples.
      level: confidence level, between 0 and 1.

    Raises:
      ValueError: the shapes differ; or as `intervals.sum_interval`.
      InputError: as `intervals.sum_interval`.
    """
    _check_pair(first, second)
    (value, resampled), (second_value, second_resampled) = (
        intervals.resampled_sums(terms, statistic, seed=seed, num_resamples=num_resamples) for terms in (first, second)
    )
    return _bootstrap_test(value - second_value, resampled - second_resampled, level)


def paired_means(
    first: np.ndarray,
    second: np.ndarray,
    *,
    seed: int = 0,
    num_resamples: int = 1000,
    num_permutations: int = 10_000,
    level: float = 0.95,
) -> PairedTest:
    """Returns the test of the difference of a mean over images.

    The p-value is that of `sign_flip_p_value`, which, unlike that of the bootstrap, is also right for few images.

    Args:
      first: real numbers (N,), one per mask, of the first run.
      second: real numbers (N,), of the second run.
      seed: seed of the resamples and of the permutations.
      num_resamples: number of resamples.
      num_permutations: number of permutations.
      level: confidence level, between 0 and 1.

    Raises:
      ValueError: the shapes differ; or as `intervals.mean_interval`.
      InputError: as `intervals.mean_interval`.
    """
    _check_pair(first, second)
    differences = np.subtract(first, second, dtype=np.float64)
    interval = intervals.mean_interval(differences, seed=seed, num_resamples=num_resamples, level=level)
    return PairedTest(interval, sign_flip_p_value(differences, seed=seed, num_permutations=num_permutations))


def sign_flip_p_value(differences: np.ndarray, *, seed: int = 0, num_permutations: int = 10_000) -> float:
    """Returns the two-sided p-value of the mean of differences, by a permutation test, in (0, 1].

    If the runs are equally good, it is a matter of chance which of a pair belongs to which run, that is, which sign the
    difference has. The p-value is the fraction of the choices of signs whose mean is at least as far from 0. All 2^N
    choices are compared if they are not more than `num_permutations`. Otherwise it is as many random ones, and the
    actual signs, so that the p-value is never 0.

    Args:
      differences: real numbers (N,), one per mask.
      seed: seed of the random signs.
      num_permutations: number of random choices of signs, at least 1.

    Raises:
      ValueError: `differences` has another shape, or `num_permutations` is less than 1.
      InputError: there is no difference, or one is not finite.
    """
    differences = np.asarray(differences, np.float64)
    if differences.ndim != 1:
        raise ValueError(f"differences must be (N,), one per mask, got shape {differences.shape}.")
    if num_permutations < 1:
        raise ValueError(f"num_permutations must be at least 1, got {num_permutations}.")
    if not len(differences) or not np.isfinite(differences).all():
        raise InputError("differences must have at least one value, and all finite; omit the masks without a value.")
    count = len(differences)
    # Sums that are equal except for rounding count as equal.
    least = abs(differences.sum()) - 1e-12 * np.abs(differences).sum()
    if 2.0**count <= num_permutations:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=count)))
        return float(np.mean(np.abs(signs @ differences) >= least))
    generator = np.random.default_rng(seed)
    block_size = max(1, _SIGNS_PER_BLOCK // count)
    num_extreme = 1
    for start in range(0, num_permutations, block_size):
        size = min(block_size, num_permutations - start)
        signs = 1.0 - 2.0 * generator.integers(2, size=(size, count), dtype=np.int8)
        num_extreme += int(np.sum(np.abs(signs @ differences) >= least))
    return num_extreme / (num_permutations + 1)


def _bootstrap_test(difference: float, resampled: np.ndarray, level: float) -> PairedTest:
    interval = intervals.percentile_interval(difference, resampled, level)
    num_opposite = min(int(np.sum(resampled <= 0)), int(np.sum(resampled >= 0)))
    return PairedTest(interval, min(1.0, 2 * (1 + num_opposite) / (1 + len(resampled))))


def _check_pair(first: np.ndarray, second: np.ndarray) -> None:
    if np.shape(first) != np.shape(second):
        raise ValueError(
            f"first has shape {np.shape(first)}, second has {np.shape(second)}; evaluate both runs on the same masks."
        )
