"""How far samples look like photographs and cover their variety, by balls around the features of images.

Precision and recall are those of Kynkäänniemi et al. (arXiv 1904.06991), density and coverage those of Naeem et al.
(arXiv 2002.09797). Each set is described by balls around its images, whose radius is the distance to the k-th nearest
other image of the set. All balls are closed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sisma_jax.evaluation.feature_arrays import checked_pair
from sisma_jax.evaluation.neighbours import DistanceBlocks, nearest_squares, square_bounds


class PrecisionRecall(NamedTuple):
    """The result of `precision_recall`.

    Attributes:
      precision: fraction of the generated images that lie in a ball around a real image.
      recall: fraction of the real images that lie in a ball around a generated image.
    """

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """The result of `density_coverage`.

    Attributes:
      density: mean over the generated images of the number of balls around real images that contain it, divided by k.
        About 1 for equal distributions, and not limited to 1. Unlike the precision, an outlier with a large ball hardly
        raises it.
      coverage: fraction of the balls around real images that contain a generated image. Unlike the recall, it does not
        depend on balls around generated images.
    """

    density: float
    coverage: float


def precision_recall(real: np.ndarray, generated: np.ndarray, k: int = 3) -> PrecisionRecall:
    """Returns how many generated images look real, and how many real images can be generated.

    Memory is bounded: no matrix of all distances is computed. Both values depend on the numbers of images; compare them
    only between equal numbers.

    Args:
      real: real numbers (N, D), features of real images.
      generated: real numbers (M, D), features of generated images.
      k: which nearest neighbour gives the radius, at least 1; the paper's is 3.

    Raises:
      ValueError: the shapes are wrong, or `k` is less than 1.
      InputError: a set has at most `k` images, or a value is not finite.
    """
    precision, recall = precision_recall_per_image(real, generated, k)
    return PrecisionRecall(float(precision.mean()), float(recall.mean()))


def precision_recall_per_image(real: np.ndarray, generated: np.ndarray, k: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Returns the terms whose means are precision and recall: float64 (M,) per generated, and (N,) per real image.

    Args:
      real: as `precision_recall`.
      generated: as `precision_recall`.
      k: as `precision_recall`.

    Raises:
      ValueError, InputError: as `precision_recall`.
    """
    real, generated = _checked(real, generated, k)
    around_real, _ = _memberships(real, _squared_radii(real, k), generated)
    around_generated, _ = _memberships(generated, _squared_radii(generated, k), real)
    return (around_real > 0).astype(np.float64), (around_generated > 0).astype(np.float64)


def density_coverage(real: np.ndarray, generated: np.ndarray, k: int = 5) -> DensityCoverage:
    """Returns how densely generated images lie among real ones, and how many real images have one nearby.

    For sets of equal distribution and size, the expectation of the coverage is about 1 - 2^-k.

    Args:
      real: real numbers (N, D), features of real images.
      generated: real numbers (M, D), features of generated images.
      k: which nearest neighbour gives the radius, at least 1; the paper's is 5.

    Raises:
      ValueError: the shapes are wrong, or `k` is less than 1.
      InputError: a set has at most `k` images, or a value is not finite.
    """
    density, coverage = density_coverage_per_image(real, generated, k)
    return DensityCoverage(float(density.mean()), float(coverage.mean()))


def density_coverage_per_image(real: np.ndarray, generated: np.ndarray, k: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Returns the terms whose means are density and coverage: float64 (M,) per generated, and (N,) per real image.

    Args:
      real: as `density_coverage`.
      generated: as `density_coverage`.
      k: as `density_coverage`.

    Raises:
      ValueError, InputError: as `density_coverage`.
    """
    real, generated = _checked(real, generated, k)
    counts, is_covered = _memberships(real, _squared_radii(real, k), generated)
    return counts / k, is_covered.astype(np.float64)


def _checked(real: np.ndarray, generated: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    return checked_pair(real, generated, ("real", "generated"), least=k + 1)


def _squared_radii(features: np.ndarray, k: int) -> np.ndarray:
    """Squared distance to the k-th nearest other image, float64 (N,)."""
    # An image is at distance 0 from itself, so the k-th nearest other image is the one after the k nearest images.
    return nearest_squares(DistanceBlocks(features, features), k + 1)[0][:, k]


def _memberships(centres: np.ndarray, squared_radii: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns how many balls contain each point, int64 (M,), and whether each ball contains a point, bool (N,)."""
    blocks = DistanceBlocks(centres, points)
    counts, has_point = np.zeros(len(points), np.int64), np.zeros(len(centres), bool)
    scaled_radii = blocks.scaled(squared_radii)
    # Rounded towards infinity and zero, so that a comparison in float32 is certain.
    at_most, at_least = (np.nextafter(scaled_radii.astype(np.float32), np.float32(end)) for end in (0, np.inf))
    for rows in blocks.row_blocks():
        for columns in blocks.column_blocks():
            operands = blocks.operands(rows, columns)
            of_points, of_centres, is_open, is_any_open = _count(at_most[rows], at_least[rows], *operands)
            counts[columns] += np.asarray(of_points)
            has_point[rows] |= np.asarray(of_centres)
            if not is_any_open:
                continue
            i, j = np.nonzero(np.asarray(is_open))
            i, j = i + rows.start, j + columns.start
            is_inside = blocks.squares(i, j) <= squared_radii[i]
            counts += np.bincount(j[is_inside], minlength=len(points))
            has_point[i[is_inside]] = True
    return counts, has_point


@jax.jit
def _count(
    at_most: Float[Array, " N"],
    at_least: Float[Array, " N"],
    x: Float[Array, "N D"],
    y: Float[Array, "M D"],
    norms_x: Float[Array, " N"],
    norms_y: Float[Array, " M"],
) -> tuple[Int[Array, " M"], Bool[Array, " N"], Bool[Array, "N M"], Bool[Array, ""]]:
    """Counts the points that certainly lie in balls, and marks the pairs that float32 does not decide.

    Args:
      at_most: squared radii, rounded down.
      at_least: squared radii, rounded up.
      x: features of the centres.
      y: features of the points.
      norms_x: squared norms of the centres.
      norms_y: squared norms of the points.
    """
    lower, upper = square_bounds(x, y, norms_x, norms_y)
    is_inside = upper <= at_most[:, jnp.newaxis]
    is_open = (lower <= at_least[:, jnp.newaxis]) & ~is_inside
    return jnp.sum(is_inside, axis=0, dtype=jnp.int32), jnp.any(is_inside, axis=1), is_open, jnp.any(is_open)
