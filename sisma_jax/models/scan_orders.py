"""The eight serpentine orders in which a layer reads an image's tokens (ZigMa, arXiv 2403.13802, figure 4).

An order is a continuous path: row by row, or column by column, each line read against the direction of the
one before, the whole path forwards or backwards. Paths are reshapes, flips and transposes; no index gather.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class ScanOrder:
    """One serpentine path over an H x W grid.

    Attributes:
      lines: whether the path runs along rows or along columns.
      flip: which lines are read from their far end.
      reverse: the path is read from its end. `to_sequence` does not apply this: the scan itself runs backwards,
        which costs no copy.
    """

    lines: Literal["rows", "columns"]
    flip: Literal["odd", "even"]
    reverse: bool

    def to_sequence(self, x: Float[Array, "B H W D"]) -> Float[Array, "B L D"]:
        """Returns the tokens along the path, from the path's start."""
        batch, height, width, channels = x.shape
        if self.lines == "columns":
            x = x.swapaxes(1, 2)
        return self._serpentine(x).reshape(batch, height * width, channels)

    def to_grid(self, sequence: Float[Array, "B L D"], height: int, width: int) -> Float[Array, "B H W D"]:
        """Inverts `to_sequence`."""
        batch, _, channels = sequence.shape
        lines, line_length = (height, width) if self.lines == "rows" else (width, height)
        x = self._serpentine(sequence.reshape(batch, lines, line_length, channels))
        return x if self.lines == "rows" else x.swapaxes(1, 2)

    def _serpentine(self, x: Array) -> Array:
        is_odd = np.arange(x.shape[1]) % 2 == 1
        flipped = is_odd if self.flip == "odd" else ~is_odd
        return jnp.where(flipped[None, :, None, None], x[:, :, ::-1], x)

    def indices(self, height: int, width: int) -> np.ndarray:
        """Returns the path as row-major token indices, `reverse` included: int64, (H W,)."""
        grid = np.arange(height * width).reshape(height, width)
        grid = grid if self.lines == "rows" else grid.T
        start = 1 if self.flip == "odd" else 0
        grid = grid.copy()
        grid[start::2] = grid[start::2, ::-1]
        path = grid.reshape(-1)
        return path[::-1] if self.reverse else path


# Neighbours in this list differ in their axis and every second pair in direction, so four layers in a row, or
# four orders in one layer, read an image along both axes from both ends.
ORDERS = tuple(
    ScanOrder(lines, flip, reverse)
    for flip in ("odd", "even")
    for reverse in (False, True)
    for lines in ("rows", "columns")
)


def orders_of_layer(layer: int, count: int) -> tuple[ScanOrder, ...]:
    """Returns the `count` orders (1, 2 or 4) of the mixers in layer number `layer`.

    Two orders are a path along one axis forwards and one backwards; four add the other axis.
    """
    stride = 2 if count == 2 else 1
    return tuple(ORDERS[(layer + stride * i) % len(ORDERS)] for i in range(count))
