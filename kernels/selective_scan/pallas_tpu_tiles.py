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

from ..typing import Array, Float, Index, Ref
from .pallas_tpu_layout import LANES, ROWS, SUBLANES, Layout

Carry = TypeVar("Carry")
# How many steps and channels of the array remain from the start of a block, or None where no block is ragged.
Remaining = tuple[Index | None, Index | None]


class Tile:
    """16 steps by 128 channels of a chunk: contiguous in the blocks of sequences, two groups of 8 rows in scratch.

    It loads from VMEM to registers, always to float32, and stores from registers to VMEM.
    """

    def __init__(self, layout: Layout, remaining: Remaining, pair: Index, column: int) -> None:
        """The tile of groups 2 pair and 2 pair + 1, and of channels 128 column ... 128 column + 127."""
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
        """The tile of a sequence, with zeros beyond the end of the array, where the block's contents are undefined."""
        return self.valid(block[0, self._rows, self._lanes].astype(jnp.float32))

    def set(self, block: Ref, x: Float[Array, "16 128"]) -> None:
        """Writes the tile of a sequence, rounded to its dtype."""
        block[0, self._rows, self._lanes] = x.astype(block.dtype)

    def take(self, scratch: Ref) -> Float[Array, "16 128"]:
        """The tile of a scratch buffer."""
        return jnp.concatenate([scratch[rows] for rows in self._scratch])

    def put(self, scratch: Ref, x: Float[Array, "16 128"]) -> None:
        """Writes the tile of a scratch buffer."""
        for half, rows in enumerate(self._scratch):
            scratch[rows] = x[half * SUBLANES : (half + 1) * SUBLANES]

    def vector(self, block: Ref) -> Float[Array, "1 128"]:
        """This tile's channels of a vector."""
        # A slice of one row, because a vector register has two axes: (1, 128) is broadcast over the steps.
        return block[0, self._column : self._column + 1]

    def add(self, block: Ref, x: Float[Array, "16 128"]) -> None:
        """Adds the sum of x over the valid steps to this tile's channels of a vector sum."""
        # This sum goes across sublanes, but only once per tile. It is float32, over up to the complete sequence.
        block[0, 0, self._column : self._column + 1] += jnp.sum(self.valid(x), axis=0, keepdims=True)

    def valid(self, x: Float[Array, "16 128"]) -> Float[Array, "16 128"]:
        """x with zeros beyond the end of the array. A select, because the undefined contents may be NaN or infinite."""
        # At most two masks: one for steps and one for channels.
        for axis, remaining in enumerate(self._remaining):
            if remaining is not None:
                x = jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < remaining, x, 0.0)
        return x


def remaining_entries(layout: Layout) -> Remaining:
    """The steps and channels from the start of this program's block to the end of the array.

    None where the blocks divide the array evenly: this is known at trace time, and the kernel then contains no masks.
    """
    # Chunks are counted in the order of the pass; `layout.chunk` gives the position in the sequence.
    steps = layout.length - layout.chunk(pl.program_id(2)) * layout.steps
    channels = layout.d_inner - pl.program_id(1) * layout.channels
    return (
        steps if layout.length % layout.steps else None,
        channels if layout.d_inner % layout.channels else None,
    )


def for_tiles(layout: Layout, remaining: Remaining, body: Callable[[Tile], None]) -> None:
    """Calls the body for each tile of the chunk, in any order.

    A loop over pairs of groups; the tiles of a pair are unrolled, which gives the compiler independent work to overlap.
    """

    @pl.loop(0, layout.steps // ROWS)
    def _(pair: Index) -> None:
        for column in range(layout.tiles):
            body(Tile(layout, remaining, pair, column))


def for_groups(layout: Layout, body: Callable[[Index, Carry], Carry], carry: Carry, reverse: bool) -> Carry:
    """The carry after `carry = body(g, carry)` for each group of 8 steps, from the first or from the last."""
    # The carry, one array per state index, stays in registers from group to group.
    groups = layout.steps // SUBLANES
    return jax.lax.fori_loop(0, groups, lambda k, carry: body(groups - 1 - k if reverse else k, carry), carry)


def in_order(reverse: bool) -> range:
    """The steps of a group, from the first or from the last. Python numbers, so that loops over them are unrolled."""
    return range(SUBLANES)[:: -1 if reverse else 1]


def step_rows(layout: Layout, g: Index, i: int) -> tuple[pl.Slice, slice]:
    """The index of step i of group g in scratch: all channels of the block, as (tiles, 128)."""
    # Row i of each of the group's tiles, which are 8 rows apart. The strided load assembles one register.
    return pl.ds(g * SUBLANES * layout.tiles + i, layout.tiles, stride=SUBLANES), slice(None)


def entry(layout: Layout, block: Ref, t: Index, n: int) -> Float[Array, ""]:
    """The scalar B_t[n] or C_t[n], from SMEM."""
    return block[0, 0, 0, t * layout.d_state + n]


def product_rows(layout: Layout, i: int, n: int) -> pl.Slice:
    """The index of the product for step i of a group and state index n: `tiles` rows of the 8 that are reserved."""
    return pl.ds((i * layout.d_state + n) * SUBLANES, layout.tiles)


def sum_channels(layout: Layout, products: Ref, sums: Ref, g: Index, i: int) -> None:
    """Sums each product of step i in group g over its tiles: to a row of 128 partial sums for each state index.

    A product, (tiles, 128), would have to be summed across sublanes, which takes several shifts for each register.
    Instead, eight products are read back from scratch transposed: a load with a stride of 8 rows gives the same tile of
    eight state indices as one register, and the sum over tiles adds entire registers.
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
    """Completes the sums over channels: each row of 128 partial sums becomes one entry of `sums`.

    128 rows at a time are transposed, so that the sum again adds registers instead of the lanes of one, and its results
    lie along the lanes, as a row of the output.
    """
    for k in range(rows.shape[0] // LANES):
        block = rows[k * LANES : (k + 1) * LANES]
        sums[0, 0, 0, k : k + 1] = jnp.sum(jnp.swapaxes(block, 0, 1), axis=0, keepdims=True)
