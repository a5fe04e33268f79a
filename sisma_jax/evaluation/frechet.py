"""The Fréchet distance between the features of two sets of images (FID; Heusel et al., arXiv 1706.08500).

The features of each set are described by a Gaussian. `FeatureStatistics` accumulates its mean and covariance batch by
batch, so that the features of a set never have to be in memory at once.
"""

import dataclasses
import io
import os
import zipfile
import zlib
from collections.abc import Iterable

import numpy as np

from sisma_jax.data.photos import read_bytes
from sisma_jax.errors import InputError
from sisma_jax.evaluation.feature_arrays import checked
from sisma_jax.files import write_atomically


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """Mean and covariance of the features of a set of images.

    Attributes:
      count: number of images.
      mean: float64 (D,); zero for an empty set.
      scatter: float64 (D, D), the sum of (x - mean) (x - mean)^T over the images. It adds up without loss of digits,
        which the sum of x x^T does not if the mean is large.
      fingerprint: names what decides the values: the data, the weights of the feature network, and the resizing.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray
    fingerprint: str = ""

    @classmethod
    def empty(cls, dimensions: int, fingerprint: str = "") -> "FeatureStatistics":
        """Returns the statistics of no images.

        Args:
          dimensions: of the features, D.
          fingerprint: of the set.
        """
        return cls(0, np.zeros(dimensions), np.zeros((dimensions, dimensions)), fingerprint)

    @classmethod
    def from_batches(cls, batches: Iterable[np.ndarray], fingerprint: str = "") -> "FeatureStatistics":
        """Returns the statistics of all images of some batches.

        Args:
          batches: real numbers (N, D) each, at least one batch; N may vary.
          fingerprint: of the set.

        Raises:
          ValueError, InputError: as `add`.
          InputError: there is no batch.
        """
        statistics: FeatureStatistics | None = None
        for batch in batches:
            statistics = (statistics or cls.empty(np.shape(batch)[-1], fingerprint)).add(batch)
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
        return self.merge(FeatureStatistics(len(features), mean, deviations.T @ deviations, self.fingerprint))

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Returns the statistics of both sets together (Chan et al., 1979).

        Args:
          other: statistics of other images with the same fingerprint, such as those of another process.

        Raises:
          ValueError: D or the fingerprint differs.
        """
        self._check_dimensions(other.dimensions)
        if other.fingerprint != self.fingerprint:
            raise ValueError(
                f"fingerprints must be equal to merge, got {self.fingerprint!r} and {other.fingerprint!r}."
            )
        count = self.count + other.count
        if count == 0:
            return self
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        scatter = self.scatter + other.scatter + np.outer(shift, shift * (self.count * other.count / count))
        return FeatureStatistics(count, mean, scatter, self.fingerprint)

    def _check_dimensions(self, dimensions: int) -> None:
        if dimensions != self.dimensions:
            raise ValueError(f"features have {dimensions} dimensions, the statistics have {self.dimensions}.")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the statistics as one npz file, atomically.

        Raises:
          OSError: the file cannot be written.
        """
        buffer = io.BytesIO()
        np.savez(
            buffer,
            count=np.int64(self.count),
            mean=self.mean,
            scatter=self.scatter,
            fingerprint=np.array(self.fingerprint),
        )
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str], fingerprint: str) -> "FeatureStatistics":
        """Returns the statistics that `save` has written.

        Args:
          path: of the file, on the disk or in a bucket.
          fingerprint: that the statistics must have.

        Raises:
          InputError: the file does not exist, is damaged, or has another fingerprint.
        """
        try:
            with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as content:
                statistics = cls(
                    int(content["count"]), content["mean"], content["scatter"], str(content["fingerprint"])
                )
        except InputError:
            raise
        except (ValueError, TypeError, KeyError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(
                f"{path} is damaged or has no statistics ({error}); delete it and compute it again."
            ) from (error)
        dimensions = statistics.mean.shape
        is_sound = (
            statistics.count >= 0
            and len(dimensions) == 1
            and statistics.scatter.shape == dimensions * 2
            and statistics.mean.dtype == statistics.scatter.dtype == np.float64
            and bool(np.isfinite(statistics.mean).all() and np.isfinite(statistics.scatter).all())
        )
        if not is_sound:
            raise InputError(f"{path} is damaged (wrong shapes or values); delete it and compute it again.")
        if statistics.fingerprint != fingerprint:
            raise InputError(
                f"{path} has statistics of {statistics.fingerprint!r}, not of {fingerprint!r}; "
                "delete it and compute it again, or name another file."
            )
        return statistics


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
