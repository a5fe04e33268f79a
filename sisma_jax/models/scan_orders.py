"""The eight serpentine orders in which a layer reads an image's tokens (ZigMa, arXiv 2403.13802, figure 4).

An order is a continuous path: row by row, or column by column, each line read against the direction of the
one before, the whole path forwards or backwards. Paths are data, so that layers of different orders are one program.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sisma_jax.kernels.partition import SEQUENCE_AXIS

Indices = Int[Array | np.ndarray, " L"]


@dataclasses.dataclass(frozen=True)
class ScanOrder:
    """One serpentine path over an H x W grid.

    Attributes:
      lines: whether the path runs along rows or along columns.
      flip: which lines are read from their far end.
      reverse: the path is read from its end.
    """

    lines: Literal["rows", "columns"]
    flip: Literal["odd", "even"]
    reverse: bool

    def path(self, height: int, width: int) -> "ScanPath":
        """Returns the path over a grid, as NumPy arrays of int32."""
        grid = np.arange(height * width, dtype=np.int32).reshape(height, width)
        grid = (grid if self.lines == "rows" else grid.T).copy()
        start = 1 if self.flip == "odd" else 0
        grid[start::2] = grid[start::2, ::-1]
        tokens = grid.reshape(-1)
        tokens = tokens[::-1] if self.reverse else tokens
        return ScanPath(tokens, np.argsort(tokens).astype(np.int32))

    def split_path(self, height: int, width: int, parts: int) -> "SplitScanPath":
        """Returns the path over a grid whose lines are on so many devices, which has to divide their number."""
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
    """Where the tokens of a sequence come from in a grid, and back; or several, along leading axes."""

    tokens: Int[Array | np.ndarray, "*layers L"]
    """Row-major indices into the grid."""
    places: Int[Array | np.ndarray, "*layers L"]
    """The inverse: each token's place in the sequence."""

    def to_sequence(self, x: Float[Array, "B H W D"]) -> Float[Array, "B L D"]:
        """Returns the tokens along the path, from its start."""
        return _permute(x.reshape(x.shape[0], -1, x.shape[3]), self.tokens, self.places)

    def to_grid(self, sequence: Float[Array, "B L D"], height: int, width: int) -> Float[Array, "B H W D"]:
        """Inverts `to_sequence`."""
        x = _permute(sequence, self.places, self.tokens)
        return x.reshape(x.shape[0], height, width, x.shape[2])


class SplitScanPath(NamedTuple):
    """A path over a grid whose rows are on several devices; or several, along leading axes.

    A path along rows goes through a device's rows before those of the next. For one along columns the devices first
    exchange tokens, until each has some of the columns and all their rows. Either way a device has one part of the
    sequence. It is read along the path; of a path that is read from its end, the last device has the first part.
    """

    tokens: Int[Array | np.ndarray, "*layers parts L"]
    """Row-major indices into each device's rows or columns."""
    places: Int[Array | np.ndarray, "*layers parts L"]
    """The inverse: each token's place in the part."""
    along_columns: Bool[Array | np.ndarray, "*layers"]
    parts_reversed: Bool[Array | np.ndarray, "*layers"]

    def specs(self) -> "SplitScanPath":
        """Returns how `jax.shard_map` is to split the arrays of one layer, for `to_sequence` and `to_rows`."""
        return SplitScanPath(jax.P(SEQUENCE_AXIS), jax.P(SEQUENCE_AXIS), jax.P(), jax.P())

    def to_sequence(self, x: Float[Array, "B h W D"]) -> Float[Array, "B L D"]:
        """Returns this device's part of the sequence. For use inside `jax.shard_map`, as what follows.

        Args:
          x: the device's rows.
        """
        x = jax.lax.cond(self.along_columns, lambda x: _flat(_rows_to_columns(x)), _flat, x)
        return _permute(x, self.tokens[0], self.places[0])

    def to_rows(self, sequence: Float[Array, "B L D"], width: int) -> Float[Array, "B h W D"]:
        """Inverts `to_sequence`.

        Args:
          width: the whole grid's.
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
"""The paths that one mixer scans."""


def _flat(x: Float[Array, "B H W D"]) -> Float[Array, "B L D"]:
    return x.reshape(x.shape[0], -1, x.shape[3])


def _rows_to_columns(x: Float[Array, "B h W D"]) -> Float[Array, "B H w D"]:
    return jax.lax.all_to_all(x, SEQUENCE_AXIS, split_axis=2, concat_axis=1, tiled=True)


def _columns_to_rows(x: Float[Array, "B H w D"]) -> Float[Array, "B h W D"]:
    return jax.lax.all_to_all(x, SEQUENCE_AXIS, split_axis=1, concat_axis=2, tiled=True)


# Reshapes, flips and transposes do the same without indices. By benchmarks/scan_orders.py they take longer on a CPU
# and, on a TPU, move twice the bytes at the batch sizes of training; only at batch 1 there they move fewer.
@jax.custom_vjp
def _permute(x: Float[Array, "B L D"], source: Indices, inverse: Indices) -> Float[Array, "B L D"]:
    return x.at[:, source].get(unique_indices=True, mode="promise_in_bounds")


def _permute_forward(x: Float[Array, "B L D"], source: Indices, inverse: Indices):
    return _permute(x, source, inverse), (source, inverse)


def _permute_backward(residuals: tuple[Indices, Indices], grad: Float[Array, "B L D"]):
    # The inverse gather: without this rule it would be a scatter that adds, ten times as slow on a CPU.
    source, inverse = residuals
    return _permute(grad, inverse, source), None, None


_permute.defvjp(_permute_forward, _permute_backward)


Rotation = Literal["interleaved", "grouped"]
"""interleaved: neighbouring layers differ in their axis and every second pair in direction, so four layers in a row
read an image along both axes from both ends. grouped: the four orders along rows, then the four along columns, as
U-Shape Mamba has them (arXiv 2504.13499)."""

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

# Where a layer's orders stand from its own: one; one along an axis and its reverse; those of both axes.
_OFFSETS = {"interleaved": {1: (0,), 2: (0, 2), 4: (0, 1, 2, 3)}, "grouped": {1: (0,), 2: (0, 1), 4: (0, 1, 4, 5)}}


def orders_of_layer(layer: int, count: int, rotation: Rotation = "interleaved") -> tuple[ScanOrder, ...]:
    """Returns the `count` orders (1, 2 or 4) of the mixers in layer number `layer`.

    Two orders are a path along one axis forwards and one backwards; four add the other axis.
    """
    return tuple(ORDERS[rotation][(layer + offset) % 8] for offset in _OFFSETS[rotation][count])


def paths_of_layers(
    layers: Sequence[int], count: int, height: int, width: int, rotation: Rotation = "interleaved", parts: int = 1
) -> Paths:
    """Returns the `count` paths of each of the layers, stacked over the layers.

    Args:
      parts: on how many devices the grid's rows are; a `SplitScanPath` if it is more than one.
    """

    def path(order: ScanOrder) -> ScanPath | SplitScanPath:
        return order.path(height, width) if parts == 1 else order.split_path(height, width, parts)

    by_layer = ([path(order) for order in orders_of_layer(layer, count, rotation)] for layer in layers)
    return tuple(jax.tree.map(lambda *arrays: np.stack(arrays), *paths) for paths in zip(*by_layer, strict=True))
