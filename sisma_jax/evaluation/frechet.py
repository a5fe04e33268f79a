"""The Fréchet distance between the features of two sets of images (FID; Heusel et al., arXiv 1706.08500).

The features of each set are described by a Gaussian. `FeatureStatistics` accumulates its mean and covariance batch by
batch, so that the features of a set never have to be in memory at once.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from sisma_jax.errors import InputError
from sisma_jax.evaluation.feature_arrays import checked


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """Mean and covariance of the features of a set of images.

    Attributes:
      count: number of images.
      mean: float64 (D,); zero for an empty set.
      scatter: float64 (D, D), the sum of (x - mean) (x - mean)^T over the images. It adds up without loss of digits,
        which the sum of x x^T does not if the mean is large.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def empty(cls, dimensions: int) -> "FeatureStatistics":
        """Returns the statistics of no images.

        Args:
          dimensions: of the features, D.
        """
        return cls(0, np.zeros(dimensions), np.zeros((dimensions, dimensions)))

    @classmethod
    def from_batches(cls, batches: Iterable[np.ndarray]) -> "FeatureStatistics":
        """Returns the statistics of all images of some batches.

        Args:
          batches: real numbers (N, D) each, at least one batch; N may vary.

        Raises:
          ValueError, InputError: as `add`.
          InputError: there is no batch.
        """
        statistics: FeatureStatistics | None = None
        for batch in batches:
            statistics = (statistics or cls.empty(np.shape(batch)[-1])).add(batch)
        if statistics is None:
            raise InputError("batches is empty; statistics need at least one batch of features.")
        return statistics

    @property
    def dimensions(self) -> int:
        """The number of dimensions of the features, D."""
        return len(self.mean)

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance, float64 (D, D); an InputError for fewer than 2 images."""
        if self.count < 2:
            raise InputError(f"A covariance needs at least 2 images, got {self.count}; evaluate more images.")
        return self.scatter / (self.count - 1)

    def add(self, features: np.ndarray) -> "FeatureStatistics":
        """Returns the statistics with a batch of images added.

        Args:
          features: real numbers (N, D).

        Raises:
          ValueError: the shape is wrong, or D differs.
          InputError: a value is not finite.
        """
        features = checked(features, "features")
        self._check_dimensions(features.shape[1])
        if not len(features):
            return self
        mean = features.mean(axis=0)
        deviations = features - mean
        return self.merge(FeatureStatistics(len(features), mean, deviations.T @ deviations))

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Returns the statistics of both sets together (Chan et al., 1979).

        Args:
          other: statistics of other images, such as those of another process.

        Raises:
          ValueError: D differs.
        """
        self._check_dimensions(other.dimensions)
        count = self.count + other.count
        if count == 0:
            return self
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        scatter = self.scatter + other.scatter + np.outer(shift, shift * (self.count * other.count / count))
        return FeatureStatistics(count, mean, scatter)

    def _check_dimensions(self, dimensions: int) -> None:
        if dimensions != self.dimensions:
            raise ValueError(f"features have {dimensions} dimensions, the statistics have {self.dimensions}.")


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Returns the squared Fréchet distance between two Gaussians, at least 0.

    |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1^(1/2) S2 S1^(1/2))^(1/2)

    The distance is also exact for covariances without full rank, which fewer images than dimensions have. However,
    fewer images give a larger distance even if both sets have the same distribution. Compare distances only between
    equal numbers of images, and do not compare distances of fewer images than dimensions (2048 for FID) with published
    ones of 50,000 images.

    Args:
      first: statistics of at least 2 images.
      second: statistics of at least 2 images.

    Raises:
      ValueError: the dimensions differ.
      InputError: a set has fewer than 2 images.
    """
    if first.dimensions != second.dimensions:
        raise ValueError(
            f"first has {first.dimensions} dimensions, second has {second.dimensions}; "
            "take both from the same feature network."
        )
    covariances = first.covariance, second.covariance
    factors = [covariance_factor(covariance) for covariance in covariances]
    return distance_of_factors(first.mean - second.mean, *factors)


def covariance_factor(covariance: np.ndarray) -> np.ndarray:
    """Returns a matrix R, float64 (rank, D), with R^T R equal to the covariance.

    Args:
      covariance: float64 (D, D), symmetric and positive semi-definite up to rounding.
    """
    values, vectors = np.linalg.eigh(covariance)
    # Rounding turns a zero eigenvalue into about eps times the largest one, whose square root has half the digits only.
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return np.sqrt(values[kept])[:, np.newaxis] * vectors[:, kept].T


def distance_of_factors(shift: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    """Returns the squared Fréchet distance, at least 0, from factors of the two covariances.

    The singular values of R1 R2^T are the square roots of the eigenvalues of S1^(1/2) S2 S1^(1/2). Computed directly,
    they have all digits; square roots of computed eigenvalues near zero would have half of them.

    Args:
      shift: float64 (D,), the difference of the means.
      first: float64 (r, D), R1 with R1^T R1 = S1, as `covariance_factor` returns it.
      second: float64 (s, D), R2 with R2^T R2 = S2.
    """
    cross = float(np.linalg.svd(first @ second.T, compute_uv=False).sum()) if len(first) and len(second) else 0.0
    return max(0.0, float(shift @ shift + np.vdot(first, first) + np.vdot(second, second) - 2 * cross))
