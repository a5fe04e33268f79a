"""The eight serpentine orders in which a layer reads an image's tokens (ZigMa, arXiv 2403.13802, figure 4).

An order is a continuous path along rows or along columns. Neighbouring lines are read in opposite directions, and the
whole path is read forwards or backwards. Paths are arrays, so that one program runs layers with different orders.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from sisma_jax.kernels.derivatives import linear_call
from sisma_jax.kernels.partition import SEQUENCE_AXIS

Indices = Int[Array | np.ndarray, " L"]


@dataclasses.dataclass(frozen=True)
class ScanOrder:
    """One serpentine path over an H x W grid.

    Attributes:
      lines: the path runs along rows or along columns.
      flip: the lines, odd or even, that are read from their last token to their first.
      reverse: the whole path is read from its end.
    """

    lines: Literal["rows", "columns"]
    flip: Literal["odd", "even"]
    reverse: bool

    def path(self, height: int, width: int) -> "ScanPath":
        """Returns the path over a grid, as NumPy arrays of int32.

        Args:
          height: rows of the token grid.
          width: columns of the token grid.
        """
        grid = np.arange(height * width, dtype=np.int32).reshape(height, width)
        grid = (grid if self.lines == "rows" else grid.T).copy()
        start = 1 if self.flip == "odd" else 0
        grid[start::2] = grid[start::2, ::-1]
        tokens = grid.reshape(-1)
        tokens = tokens[::-1] if self.reverse else tokens
        return ScanPath(tokens, np.argsort(tokens).astype(np.int32))

    def split_path(self, height: int, width: int, parts: int) -> "SplitScanPath":
        """Returns the path over a grid whose rows are sharded over devices, as NumPy arrays.

        Args:
          height: rows of the token grid; a multiple of `parts`.
          width: columns of the token grid; a multiple of `parts` for a path along columns.
          parts: number of devices.
        """
        by_part = self.path(height, width).tokens.reshape(parts, -1)
        by_device = by_part[::-1] if self.reverse else by_part
        rows, columns = np.divmod(by_device, width)
        device = np.arange(parts, dtype=np.int32)[:, None]
        if self.lines == "rows":
            tokens = (rows - device * (height // parts)) * width + columns
        else:
            tokens = rows * (width // parts) + columns - device * (width // parts)
        places = np.argsort(tokens, axis=1).astype(np.int32)
        return SplitScanPath(tokens, places, np.array(self.lines == "columns"), np.array(self.reverse))


class ScanPath(NamedTuple):
    """A path over a grid as a permutation of its tokens. Leading axes stack several paths."""

    tokens: Int[Array | np.ndarray, "*layers L"]
    """Row-major index in the grid of each token of the sequence."""
    places: Int[Array | np.ndarray, "*layers L"]
    """The inverse permutation: the position in the sequence of each token of the grid."""

    def to_sequence(self, x: Float[Array, "B H W D"]) -> Float[Array, "B L D"]:
        """Returns the tokens of the grid in the order of the path."""
        return _permute(x.reshape(x.shape[0], -1, x.shape[3]), self.tokens, self.places)

    def to_grid(self, sequence: Float[Array, "B L D"], height: int, width: int) -> Float[Array, "B H W D"]:
        """Returns the tokens of the sequence in the grid: the inverse of `to_sequence`.

        Args:
          sequence: tokens in the order of the path, L = height * width.
          height: rows of the token grid.
          width: columns of the token grid.
        """
        x = _permute(sequence, self.places, self.tokens)
        return x.reshape(x.shape[0], height, width, x.shape[2])


class SplitScanPath(NamedTuple):
    """A path over a grid whose rows are sharded over devices. Leading axes stack several paths.

    Every device holds one contiguous part of the sequence. A path along rows visits all rows of one device before those
    of the next. For a path along columns, the devices first exchange tokens, so that each device holds all rows of some
    columns. The last device holds the first part of a path that is read from its end.
    """

    tokens: Int[Array | np.ndarray, "*layers parts L"]
    """Row-major index, in the device's rows or columns, of each token of its part."""
    places: Int[Array | np.ndarray, "*layers parts L"]
    """The inverse permutation: the position in the part of each token of the device."""
    along_columns: Bool[Array | np.ndarray, "*layers"]
    """Whether the path runs along columns."""
    parts_reversed: Bool[Array | np.ndarray, "*layers"]
    """Whether the last device holds the first part."""

    def specs(self) -> PyTree[jax.P]:
        """Returns the PartitionSpecs of one layer's path, for `jax.shard_map` over a function of the path."""
        over_devices, on_all = jax.P(SEQUENCE_AXIS), jax.P()
        return jax.tree.unflatten(jax.tree.structure(self), (over_devices, over_devices, on_all, on_all))

    def to_sequence(self, x: Float[Array, "B h W D"]) -> Float[Array, "B L D"]:
        """Returns this device's part of the sequence; for use inside `jax.shard_map` over the axis `seq`.

        Args:
          x: the device's rows of the grid.
        """
        x = jax.lax.cond(self.along_columns, lambda x: _flat(_rows_to_columns(x)), _flat, x)
        return _permute(x, self.tokens[0], self.places[0])

    def to_rows(self, sequence: Float[Array, "B L D"], width: int) -> Float[Array, "B h W D"]:
        """Returns this device's rows of the grid: the inverse of `to_sequence`, also for use inside `jax.shard_map`.

        Args:
          sequence: this device's part of the sequence.
          width: columns of the complete grid.
        """
        x = _permute(sequence, self.places[0], self.tokens[0])
        batch, _, channels = x.shape
        columns = width // jax.lax.axis_size(SEQUENCE_AXIS)
        return jax.lax.cond(
            self.along_columns,
            lambda x: _columns_to_rows(x.reshape(batch, -1, columns, channels)),
            lambda x: x.reshape(batch, -1, width, channels),
            x,
        )


Paths = tuple[ScanPath | SplitScanPath, ...]
"""The paths of one mixer."""


def _flat(x: Float[Array, "B H W D"]) -> Float[Array, "B L D"]:
    return x.reshape(x.shape[0], -1, x.shape[3])


def _rows_to_columns(x: Float[Array, "B h W D"]) -> Float[Array, "B H w D"]:
    return jax.lax.all_to_all(x, SEQUENCE_AXIS, split_axis=2, concat_axis=1, tiled=True)


def _columns_to_rows(x: Float[Array, "B H w D"]) -> Float[Array, "B h W D"]:
    return jax.lax.all_to_all(x, SEQUENCE_AXIS, split_axis=1, concat_axis=2, tiled=True)


# Reshapes, flips and transposes would compute the same without indices. According to benchmarks/scan_orders.py, they
# are slower on a CPU. On a TPU, they move twice as many bytes at the batch sizes of training, and fewer bytes only at
# batch size 1.
def _permute(x: Float[Array, "B L D"], source: Indices, inverse: Indices) -> Float[Array, "B L D"]:
    # The transpose is the inverse gather. Without it, JAX uses a scatter-add, which is ten times slower on a CPU.
    return linear_call(
        lambda indices, x: _gather(x, indices[0]), lambda indices, grad: _gather(grad, indices[1]), (source, inverse), x
    )


def _gather(x: Float[Array, "B L D"], source: Indices) -> Float[Array, "B L D"]:
    return x.at[:, source].get(unique_indices=True, mode="promise_in_bounds")


Rotation = Literal["interleaved", "grouped"]
"""How the orders follow each other over the layers.

interleaved: layers alternate between rows and columns, and every two layers the direction changes. Four consecutive
layers read an image along both axes in both directions.
grouped: four layers along rows, then four along columns, as in U-Shape Mamba (arXiv 2504.13499).
"""

ORDERS: dict[Rotation, tuple[ScanOrder, ...]] = {
    "interleaved": tuple(
        ScanOrder(lines, flip, reverse)
        for flip in ("odd", "even")
        for reverse in (False, True)
        for lines in ("rows", "columns")
    ),
    "grouped": tuple(
        ScanOrder(lines, flip, reverse)
        for lines in ("rows", "columns")
        for flip in ("odd", "even")
        for reverse in (False, True)
    ),
}

# Offsets of a layer's orders in `ORDERS` from the layer's number, by the number of orders: one order; one along an axis
# and its reverse; one along each axis and their reverses.
_OFFSETS = {"interleaved": {1: (0,), 2: (0, 2), 4: (0, 1, 2, 3)}, "grouped": {1: (0,), 2: (0, 1), 4: (0, 1, 4, 5)}}


def orders_of_layer(layer: int, count: int, rotation: Rotation = "interleaved") -> tuple[ScanOrder, ...]:
    """Returns the scan orders of the mixers in one layer.

    Two orders are a path along one axis, forwards and backwards. Four orders add the other axis.

    Args:
      layer: number of the layer in the model, from 0.
      count: number of orders: 1, 2 or 4.
      rotation: how the orders follow each other over the layers.
    """
    return tuple(ORDERS[rotation][(layer + offset) % 8] for offset in _OFFSETS[rotation][count])


def paths_of_layers(
    layers: Sequence[int], count: int, height: int, width: int, rotation: Rotation = "interleaved", parts: int = 1
) -> Paths:
    """Returns the paths of several layers: `count` paths, whose arrays have a leading axis of layers.

    Args:
      layers: numbers of the layers in the model, from 0; at least one.
      count: paths per layer: 1, 2 or 4.
      height: rows of the token grid.
      width: columns of the token grid.
      rotation: how the orders follow each other over the layers.
      parts: number of devices over which the rows of the grid are sharded; it divides height and width. The result
        consists of `ScanPath`s if it is 1, and of `SplitScanPath`s otherwise.
    """

    def path(order: ScanOrder) -> ScanPath | SplitScanPath:
        return order.path(height, width) if parts == 1 else order.split_path(height, width, parts)

    by_layer = ([path(order) for order in orders_of_layer(layer, count, rotation)] for layer in layers)
    return tuple(jax.tree.map(lambda *arrays: np.stack(arrays), *paths) for paths in zip(*by_layer, strict=True))
