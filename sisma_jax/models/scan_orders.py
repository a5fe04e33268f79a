"""The eight serpentine orders in which a layer reads an image's tokens (ZigMa, arXiv 2403.13802, figure 4).

An order is a continuous path: row by row, or column by column, each line read against the direction of the
one before, the whole path forwards or backwards.
"""

import dataclasses
import functools
from typing import Literal

import jax
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
        return _gather(x.reshape(batch, height * width, channels), _Path(self, height, width, inverse=False))

    def to_grid(self, sequence: Float[Array, "B L D"], height: int, width: int) -> Float[Array, "B H W D"]:
        """Inverts `to_sequence`."""
        batch, _, channels = sequence.shape
        x = _gather(sequence, _Path(self, height, width, inverse=True))
        return x.reshape(batch, height, width, channels)

    def indices(self, height: int, width: int) -> np.ndarray:
        """Returns the path as row-major token indices, `reverse` included: int64, (H W,)."""
        grid = np.arange(height * width).reshape(height, width)
        grid = grid if self.lines == "rows" else grid.T
        start = 1 if self.flip == "odd" else 0
        grid = grid.copy()
        grid[start::2] = grid[start::2, ::-1]
        path = grid.reshape(-1)
        return path[::-1] if self.reverse else path


@dataclasses.dataclass(frozen=True)
class _Path:
    """Where the tokens along an order come from or, inverted, where the grid's tokens lie along it."""

    order: ScanOrder
    height: int
    width: int
    inverse: bool

    def indices(self) -> np.ndarray:
        # The scan itself runs backwards.
        path = dataclasses.replace(self.order, reverse=False).indices(self.height, self.width)
        return np.argsort(path) if self.inverse else path


# Reshapes, flips and transposes do the same without indices. By benchmarks/scan_orders.py they take longer on a CPU
# and, on a TPU, move twice the bytes at the batch sizes of training; only at batch 1 there they move fewer.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(x: Float[Array, "B L D"], path: _Path) -> Float[Array, "B L D"]:
    return x.at[:, path.indices()].get(unique_indices=True, mode="promise_in_bounds")


def _gather_forward(x: Float[Array, "B L D"], path: _Path) -> tuple[Float[Array, "B L D"], None]:
    return _gather(x, path), None


def _gather_backward(path: _Path, _: None, grad: Float[Array, "B L D"]) -> tuple[Float[Array, "B L D"]]:
    # The inverse gather: without this rule it would be a scatter that adds, ten times as slow on a CPU.
    return (_gather(grad, dataclasses.replace(path, inverse=not path.inverse)),)


_gather.defvjp(_gather_forward, _gather_backward)

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
