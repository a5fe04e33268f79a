"""Nearest neighbours among the features of images, exact and in bounded memory.

The device computes bounds of all distances in float32, block by block. They decide nearly every comparison, and the
host decides the others with distances in float64. The result is that of float64, at about the cost of float32.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sisma_jax.errors import InputError
from sisma_jax.evaluation.feature_arrays import checked_pair

# A block of distances, 2048 x 8192, takes 64 MiB in float32, whatever the number of images.
_ROWS_PER_BLOCK, _COLUMNS_PER_BLOCK = 2048, 8192
# Candidates beyond k. More references than these are hardly ever as near as the k-th one up to rounding.
_SPARE_CANDIDATES = 8
# Elements of an array of differences on the host: 64 MiB in float64.
_DIFFERENCES_PER_BLOCK = 1 << 23
# Half the distance from 1 to the next float32, and a bound of what is lost where float32 underflows.
_UNIT, _UNDERFLOW = 2.0**-24, 1e-30


class Neighbours(NamedTuple):
    """The nearest references of each query, in order of their distances.

    Attributes:
      distances: float64 (N, k), Euclidean.
      indices: int64 (N, k), rows of the references. Which one of several at equal distances comes first is not defined.
    """

    distances: np.ndarray
    indices: np.ndarray


def nearest_neighbours(queries: np.ndarray, references: np.ndarray, k: int) -> Neighbours:
    """Returns the k nearest references of each query.

    To look for memorisation, pass the features of samples as queries, and those of the training images as references. A
    query that is one of the references is its own nearest neighbour.

    Args:
      queries: real numbers (N, D).
      references: real numbers (M, D).
      k: number of neighbours, at least 1.

    Raises:
      ValueError: the shapes are wrong, or `k` is less than 1.
      InputError: there are fewer than `k` references, or a value is not finite.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    queries, references = checked_pair(queries, references, ("queries", "references"), least=0)
    if len(references) < k:
        raise InputError(f"references has {len(references)} images; {k} neighbours need at least {k}.")
    squares, indices = nearest_squares(DistanceBlocks(queries, references), k)
    return Neighbours(np.sqrt(squares), indices)


class DistanceBlocks:
    """The distances between all rows and all columns, each of which is the features of an image.

    Args:
      rows: float64 (N, D), finite.
      columns: float64 (M, D), finite, M at least 1.
    """

    def __init__(self, rows: np.ndarray, columns: np.ndarray):
        self._rows, self._columns = rows, columns
        # Distances do not change, and float32 resolves them best, if the features are near the origin.
        centre = columns.mean(axis=0)
        reaches = (np.maximum(x.max(axis=0) - centre, centre - x.min(axis=0)).max() for x in (rows, columns) if len(x))
        self._scale = float(max(reaches)) or 1.0
        self._scaled = tuple(_scaled(x, centre, self._scale) for x in (rows, columns))
        self._norms = tuple(np.einsum("nd,nd->n", x, x, dtype=np.float64).astype(np.float32) for x in self._scaled)

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and columns, (N, M)."""
        return len(self._rows), len(self._columns)

    def scaled(self, squares: np.ndarray) -> np.ndarray:
        """Returns squared distances in the unit of the device's blocks, float64.

        Args:
          squares: float64, squared distances in the unit of the features.
        """
        return squares / self._scale**2

    def row_blocks(self) -> Iterator[slice]:
        """Yields consecutive ranges of all rows."""
        return _ranges(len(self._rows), _ROWS_PER_BLOCK)

    def column_blocks(self) -> Iterator[slice]:
        """Yields consecutive ranges of all columns."""
        return _ranges(len(self._columns), _COLUMNS_PER_BLOCK)

    def operands(self, rows: slice, columns: slice) -> tuple[np.ndarray, ...]:
        """Returns the arguments of `square_bounds` for a block: float32 features and their squared norms."""
        (x, y), (norms_x, norms_y) = self._scaled, self._norms
        return x[rows], y[columns], norms_x[rows], norms_y[columns]

    def squares(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Returns squared distances of pairs in the unit of the features, float64 (P,).

        Equal pairs give equal bits, in whichever set each of the two images is.

        Args:
          rows: int (P,), the row of each pair.
          columns: int (P,), the column of each pair.
        """
        squares = np.empty(len(rows))
        for part in _ranges(len(rows), max(1, _DIFFERENCES_PER_BLOCK // self._rows.shape[1])):
            differences = self._rows[rows[part]] - self._columns[columns[part]]
            squares[part] = (differences * differences).sum(axis=1)
        return squares


def _scaled(features: np.ndarray, centre: np.ndarray, scale: float) -> np.ndarray:
    """Returns (features - centre) / scale in float32. No second array of all images is in float64."""
    scaled = np.empty(features.shape, np.float32)
    for rows in _ranges(len(features), _ROWS_PER_BLOCK):
        scaled[rows] = (features[rows] - centre) / scale
    return scaled


def square_bounds(
    x: Float[Array, "N D"], y: Float[Array, "M D"], norms_x: Float[Array, " N"], norms_y: Float[Array, " M"]
) -> tuple[Float[Array, "N M"], Float[Array, "N M"]]:
    """Returns a lower and an upper bound of the squared distances of a block, for use under `jax.jit`.

    A product of D terms in float32 has a relative error of at most D / 2^24 of |x| |y|, in any order of the sum. The
    conversion of the features, the norms and the last additions have a few units more.

    Args:
      x: features of the rows, with values in [-1, 1].
      y: features of the columns, with values in [-1, 1].
      norms_x: their squared norms.
      norms_y: their squared norms.
    """
    norms = norms_x[:, jnp.newaxis] + norms_y[jnp.newaxis]
    # Without the highest precision, accelerators round the factors to bfloat16 or TF32.
    squares = norms - 2.0 * jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    tolerance = norms * ((x.shape[1] + 16) * _UNIT) + _UNDERFLOW
    return squares - tolerance, squares + tolerance


def nearest_squares(blocks: DistanceBlocks, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k smallest squared distances of each row, float64 (N, k), and their columns, int64 (N, k).

    Args:
      blocks: the distances.
      k: at least 1, at most the number of columns.
    """
    num_rows, num_columns = blocks.shape
    num_candidates = min(k + _SPARE_CANDIDATES, num_columns)
    squares, indices = np.empty((num_rows, k)), np.empty((num_rows, k), np.int64)
    for rows in blocks.row_blocks():
        size = rows.stop - rows.start
        lower = np.full((size, num_candidates), np.inf, np.float32)
        candidates = np.zeros((size, num_candidates), np.int32)
        for columns in blocks.column_blocks():
            operands = blocks.operands(rows, columns)
            lower, candidates = _closest(lower, candidates, *operands, np.int32(columns.start))
        lower, candidates = np.asarray(lower), np.asarray(candidates, np.int64)
        of_candidates = blocks.squares(np.arange(rows.start, rows.stop).repeat(num_candidates), candidates.ravel())
        of_candidates = of_candidates.reshape(candidates.shape)
        order = np.argsort(of_candidates, axis=1, kind="stable")[:, :k]
        squares[rows] = np.take_along_axis(of_candidates, order, axis=1)
        indices[rows] = np.take_along_axis(candidates, order, axis=1)
        if num_candidates == num_columns:
            continue
        # A column that is no candidate is not nearer than the last lower bound, so it cannot replace a nearer one.
        farthest = squares[rows, -1]
        is_open = (blocks.scaled(farthest) > lower[:, -1]) & (farthest > 0)
        for row in rows.start + np.flatnonzero(is_open):
            of_row = blocks.squares(np.full(num_columns, row), np.arange(num_columns))
            indices[row] = np.argsort(of_row, kind="stable")[:k]
            squares[row] = of_row[indices[row]]
    return squares, indices


@jax.jit
def _closest(
    lower: Float[Array, "N C"],
    candidates: Int[Array, "N C"],
    x: Float[Array, "N D"],
    y: Float[Array, "M D"],
    norms_x: Float[Array, " N"],
    norms_y: Float[Array, " M"],
    offset: Int[Array, ""],
) -> tuple[Float[Array, "N C"], Int[Array, "N C"]]:
    """Returns the C smallest lower bounds, in order, and their columns, of those before and those of a block."""
    of_block, _ = square_bounds(x, y, norms_x, norms_y)
    num_candidates = lower.shape[1]
    least, positions = jax.lax.top_k(-of_block, min(num_candidates, of_block.shape[1]))
    lower = jnp.concatenate([lower, -least], axis=1)
    candidates = jnp.concatenate([candidates, positions.astype(jnp.int32) + offset], axis=1)
    least, positions = jax.lax.top_k(-lower, num_candidates)
    return -least, jnp.take_along_axis(candidates, positions, axis=1)


def _ranges(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
