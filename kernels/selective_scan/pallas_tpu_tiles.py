"""Loops, reads, writes and sums over blocks and scratch for the bodies of the TPU kernels, `pallas_tpu_kernels`.

`pallas_tpu_layout` describes the blocks and how scratch stores a chunk. "Scratch" here means a buffer in VMEM with a
row of 128 channels for each step and tile.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ..typing import Array, Float, Index, Int, Ref
from .pallas_tpu_layout import LANES, ROWS, SUBLANES, Layout

Carry = TypeVar("Carry")
# What `pl.ds` returns: an ordinary slice if its start is a Python number.
Slice = slice | pl.Slice
# How many steps and channels of the array remain from the start of a block, or None where no block is ragged.
Remaining = tuple[Index | None, Index | None]


class Tile:
    """16 steps by 128 channels of a chunk: contiguous in the blocks of sequences, two groups of 8 rows in scratch.

    Its methods load from VMEM to registers, always as float32, and store from registers to VMEM.
    """

    def __init__(self, layout: Layout, remaining: Remaining, pair: Int[Array, ""], column: int) -> None:
        """Selects the steps of groups 2 pair and 2 pair + 1, and channels 128 column ... 128 column + 127.

        Args:
          layout: sizes of the pass.
          remaining: from `remaining_entries`.
          pair: index of the pair of groups within the chunk.
          column: index of the tile within the block's channels.
        """
        # `column` is a Python number, so lanes are static; `pair` is the counter of a loop, so rows are not.
        self._column = column
        starts = (pair * ROWS, column * LANES)
        self._remaining = [None if n is None else n - start for n, start in zip(remaining, starts, strict=True)]
        # multiple_of tells the compiler that rows are aligned with tiles. Without it, each access would have to handle
        # rows that begin inside a tile.
        self._rows = pl.ds(pl.multiple_of(pair * ROWS, ROWS), ROWS)
        self._lanes = pl.ds(column * LANES, LANES)
        # One slice per group: in scratch, a group's 8 steps of 128 channels are 8 adjacent rows.
        self._scratch = [
            pl.ds(pl.multiple_of(((2 * pair + half) * layout.tiles + column) * SUBLANES, SUBLANES), SUBLANES)
            for half in range(2)
        ]

    def get(self, block: Ref) -> Float[Array, "16 128"]:
        """Returns the tile of a sequence, with zeros beyond the end of the array, where the block is undefined."""
        return self.valid(block[0, self._rows, self._lanes].astype(jnp.float32))

    def set(self, block: Ref, x: Float[Array, "16 128"]) -> None:
        """Writes x to the tile of a sequence, rounded to its dtype."""
        block[0, self._rows, self._lanes] = x.astype(block.dtype)

    def take(self, scratch: Ref) -> Float[Array, "16 128"]:
        """Returns the tile of a scratch buffer."""
        return jnp.concatenate([scratch[rows] for rows in self._scratch])

    def put(self, scratch: Ref, x: Float[Array, "16 128"]) -> None:
        """Writes x to the tile of a scratch buffer."""
        for half, rows in enumerate(self._scratch):
            scratch[rows] = x[half * SUBLANES : (half + 1) * SUBLANES]

    def vector(self, block: Ref) -> Float[Array, "1 128"]:
        """Returns this tile's channels of a vector."""
        # A slice of one row, because a vector register has two axes: (1, 128) is broadcast over the steps.
        return block[0, self._column : self._column + 1]

    def add(self, block: Ref, x: Float[Array, "16 128"]) -> None:
        """Adds the sum of x over the valid steps to this tile's channels of a vector sum."""
        # This sum goes across sublanes, but only once per tile. It is float32, because it may run over the complete
        # sequence.
        block[0, 0, self._column : self._column + 1] += jnp.sum(self.valid(x), axis=0, keepdims=True)

    def valid(self, x: Float[Array, "16 128"]) -> Float[Array, "16 128"]:
        """Returns x with zeros beyond the end of the array."""
        # A select and not a product, because the undefined contents may be NaN or infinite. At most two masks, one for
        # steps and one for channels.
        for axis, remaining in enumerate(self._remaining):
            if remaining is not None:
                x = jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < remaining, x, 0.0)
        return x


def remaining_entries(layout: Layout) -> Remaining:
    """Returns the numbers of steps and of channels from the start of this program's block to the end of the array.

    A number is None where the blocks divide the array evenly. This is known at trace time, and the kernel then contains
    no masks.

    Args:
      layout: sizes of the pass.
    """
    # Chunks are counted in the order of the pass; `layout.chunk` gives the position in the sequence.
    steps = layout.length - layout.chunk(pl.program_id(2)) * layout.steps
    channels = layout.d_inner - pl.program_id(1) * layout.channels
    return (
        steps if layout.length % layout.steps else None,
        channels if layout.d_inner % layout.channels else None,
    )


def for_tiles(layout: Layout, remaining: Remaining, body: Callable[[Tile], None]) -> None:
    """Calls the body for each tile of the chunk; the order does not matter.

    This is a loop over pairs of groups. The tiles of a pair are unrolled, which gives the compiler independent work to
    overlap.

    Args:
      layout: sizes of the pass.
      remaining: from `remaining_entries`.
      body: reads and writes one tile.
    """

    @pl.loop(0, layout.steps // ROWS)
    def _(pair: Int[Array, ""]) -> None:
        for column in range(layout.tiles):
            body(Tile(layout, remaining, pair, column))


def for_groups(layout: Layout, body: Callable[[Int[Array, ""], Carry], Carry], carry: Carry, reverse: bool) -> Carry:
    """Returns the carry after `carry = body(g, carry)` for each group g of 8 steps of the chunk.

    Args:
      layout: sizes of the pass.
      body: computes the steps of one group.
      carry: the first carry.
      reverse: go from the last group to the first.
    """
    # The carry, one array per state index, stays in registers from group to group.
    groups = layout.steps // SUBLANES
    return jax.lax.fori_loop(0, groups, lambda k, carry: body(groups - 1 - k if reverse else k, carry), carry)


def in_order(reverse: bool) -> range:
    """Returns the steps of a group, 0 ... 7, or 7 ... 0 if reverse. A range, so that loops over it are unrolled."""
    return range(SUBLANES)[:: -1 if reverse else 1]


def step_rows(layout: Layout, g: Index, i: int) -> tuple[Slice, slice]:
    """Returns the index of step i of group g in scratch: all channels of the block, as (tiles, 128)."""
    # Row i of each of the group's tiles, which are 8 rows apart. The strided load assembles one register.
    return pl.ds(g * SUBLANES * layout.tiles + i, layout.tiles, stride=SUBLANES), slice(None)


def entry(layout: Layout, block: Ref, t: Index, n: int) -> Float[Array, ""]:
    """Returns B_t[n] or C_t[n], a scalar from SMEM."""
    return block[0, 0, 0, t * layout.d_state + n]


def product_rows(layout: Layout, i: int, n: int) -> Slice:
    """Returns the index in `products` of step i of a group and state index n: `tiles` of the 8 reserved rows."""
    return pl.ds((i * layout.d_state + n) * SUBLANES, layout.tiles)


def sum_channels(layout: Layout, products: Ref, sums: Ref, g: Int[Array, ""], i: int) -> None:
    """Sums each product of step i in group g over its tiles, to a row of 128 partial sums per state index.

    Adding up the rows of one product, (tiles, 128), would be a sum across sublanes, which takes several shifts per
    register. Instead, the products of eight state indices are read back transposed: a load with a stride of 8 rows
    returns one tile of all eight as a register, and the sum over tiles adds registers.

    Args:
      layout: sizes of the pass.
      products: scratch, (8 * d_state * 8, 128), indexed by `product_rows`.
      sums: scratch, (steps * padded_state, 128); receives the row of each step and state index.
      g: index of the group within the chunk.
      i: step within the group, 0 to 7.
    """
    # Eight state indices at a time; the last time there may be fewer.
    for n in range(0, layout.d_state, SUBLANES):
        count = min(SUBLANES, layout.d_state - n)
        first = (i * layout.d_state + n) * SUBLANES
        transposed = (products[pl.ds(first + tile, count, stride=SUBLANES)] for tile in range(layout.tiles))
        # Rows start at multiples of 8, because each step has padded_state rows; those of the padding are never used.
        row = pl.multiple_of((g * SUBLANES + i) * layout.padded_state + n, SUBLANES)
        sums[pl.ds(row, count)] = functools.reduce(jnp.add, transposed)


def add_lanes(rows: Ref, sums: Ref) -> None:
    """Completes the sums over channels: adds up each row of 128 partial sums to one entry of `sums`.

    It transposes 128 rows at a time. The sum then adds registers, and not the lanes of one register, and its results
    lie along the lanes, as a row of the output.

    Args:
      rows: scratch, (steps * padded_state, 128), written by `sum_channels`.
      sums: output block, (1, 1, 1, steps * padded_state / 128, 128).
    """
    for k in range(rows.shape[0] // LANES):
        block = rows[k * LANES : (k + 1) * LANES]
        sums[0, 0, 0, k : k + 1] = jnp.sum(jnp.swapaxes(block, 0, 1), axis=0, keepdims=True)
