"""Loops, reads, writes and sums over blocks and scratch for the bodies of the TPU kernels, `pallas_tpu_kernels`.

`pallas_tpu_layout` describes blocks, strips and groups. "Scratch" here means a float32 buffer in VMEM of shape
(tiles of the block * steps, 128), with a row of 128 channels for each tile and step, unless something else is said.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ..typing import Array, Float, Index, Int, Ref
from .pallas_tpu_layout import GROUP, LANES, PARTS, SUBLANES, Layout

Carry = TypeVar("Carry")
# What `pl.ds` returns: an ordinary slice if its start is a Python number.
Slice = slice | pl.Slice
# One array per register.
Registers = list[Float[Array, "8 128"]]
# How many steps and channels of the array remain from the start of a block, or None where no block is ragged.
Remaining = tuple[Index | None, Index | None]

# In the scratch of `sum_sublanes`, the rows from one sublane to the next, and those of a tile. The stride is odd: with
# one of 16, sublanes would share the banks of VMEM, and a store would take four instructions.
TURNED_STRIDE = GROUP + 1
TURNED_ROWS = SUBLANES * TURNED_STRIDE


class Strip:
    """The channels whose recurrence a kernel computes at a time: a few tiles of 128."""

    def __init__(self, layout: Layout, index: Index) -> None:
        """Selects a strip.

        Args:
          layout: sizes of the pass.
          index: of the strip within the block of channels.
        """
        self._layout = layout
        self._first = index * layout.tiles

    def row(self, scratch: Ref, g: Index, i: int, column: int) -> Float[Array, "1 128"]:
        """Returns step i of group g and a tile's channels; a load that broadcasts this row to all sublanes.

        Args:
          scratch: as `Tile.put` writes it.
          g: index of the group.
          i: step within the group.
          column: index of the tile within the strip.
        """
        return scratch[pl.ds(self._start(g, column) + i, 1)]

    def put(self, scratch: Ref, g: Index, column: int, x: Float[Array, "16 128"]) -> None:
        """Writes the steps of group g and a tile's channels to scratch.

        Args:
          scratch: to write to.
          g: index of the group.
          column: index of the tile within the strip.
          x: one row per step.
        """
        scratch[pl.ds(self._start(g, column), GROUP)] = x

    def load(self, state: Ref, *index: int) -> Registers:
        """Returns this strip's part of a state: a register for each tile and, within it, for each 8 state indices.

        Args:
          state: a block (..., padded_state, channels).
          index: of the block's leading axes.
        """
        return [state[(*index, *self._register(k))] for k in range(self._layout.strip_registers)]

    def store(self, state: Ref, registers: Registers, *index: int) -> None:
        """Writes what `load` returns.

        Args:
          state: a block (..., padded_state, channels).
          registers: in the order of `load`.
          index: of the block's leading axes.
        """
        for k, register in enumerate(registers):
            state[(*index, *self._register(k))] = register

    def _start(self, g: Index, column: int) -> Index:
        return _aligned((self._first + column) * self._layout.steps + g * GROUP, GROUP)

    def _register(self, k: int) -> tuple[Slice, Slice]:
        column, n = divmod(k, self._layout.state_registers)
        return pl.ds(n * SUBLANES, SUBLANES), pl.ds(_aligned((self._first + column) * LANES, LANES), LANES)


class Tile:
    """16 steps by 128 channels of a chunk.

    Its methods load from VMEM to registers, always as float32, and store from registers to VMEM.
    """

    def __init__(self, layout: Layout, remaining: Remaining, g: Int[Array, ""], column: int) -> None:
        """Selects the steps of group g, and channels 128 column ... 128 column + 127.

        Args:
          layout: sizes of the pass.
          remaining: from `remaining_entries`.
          g: index of the group within the chunk.
          column: index of the tile within the block's channels.
        """
        # `column` is a Python number, so lanes are static; `g` is the counter of a loop, so rows are not.
        starts = (g * GROUP, column * LANES)
        self._remaining = [None if n is None else n - start for n, start in zip(remaining, starts, strict=True)]
        self._rows = pl.ds(_aligned(g * GROUP, GROUP), GROUP)
        self._lanes = pl.ds(column * LANES, LANES)
        self._scratch_rows = pl.ds(_aligned(column * layout.steps + g * GROUP, GROUP), GROUP)

    def get(self, block: Ref) -> Float[Array, "16 128"]:
        """Returns the tile of a sequence, with zeros beyond the end of the array, where the block is undefined."""
        return self.valid(block[0, self._rows, self._lanes].astype(jnp.float32))

    def set(self, block: Ref, x: Float[Array, "16 128"]) -> None:
        """Writes x to the tile of a sequence, rounded to its dtype."""
        block[0, self._rows, self._lanes] = x.astype(block.dtype)

    def take(self, scratch: Ref) -> Float[Array, "16 128"]:
        """Returns the tile of a scratch buffer."""
        return scratch[self._scratch_rows]

    def put(self, scratch: Ref, x: Float[Array, "16 128"]) -> None:
        """Writes x to the tile of a scratch buffer."""
        scratch[self._scratch_rows] = x

    def vector(self, block: Ref) -> Float[Array, "1 128"]:
        """Returns this tile's channels of a vector; a load that broadcasts them to all steps."""
        return block[:, self._lanes]

    def add(self, block: Ref, x: Float[Array, "16 128"]) -> None:
        """Adds the sum of x over the valid steps to this tile's channels of a vector sum."""
        # Float32, because it may run over the complete sequence. XLA adds up the eight rows.
        x = self.valid(x)
        block[0, :, self._lanes] += x[:SUBLANES] + x[SUBLANES:]

    def valid(self, x: Float[Array, "16 128"]) -> Float[Array, "16 128"]:
        """Returns x with zeros beyond the end of the array."""
        # A select and not a product, because the undefined contents may be NaN or infinite. At most two masks, one for
        # steps and one for channels.
        for axis, remaining in enumerate(self._remaining):
            if remaining is not None:
                x = jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < remaining, x, 0.0)
        return x


def _aligned(start: Index, multiple: int) -> Index:
    """Returns start, and tells the compiler that it is a multiple: of a register's rows or lanes.

    Otherwise, an access to rows that a loop counts would have to handle those that begin inside a register.
    """
    return start if isinstance(start, int) else pl.multiple_of(start, multiple)


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


def for_tiles(layout: Layout, body: Callable[[Int[Array, ""], list[Tile]], None]) -> None:
    """Calls the body for each group of the chunk, with the tiles of all channels of the block.

    Args:
      layout: sizes of the pass.
      body: called as body(g, tiles) for group g; the order does not matter. It unrolls its work on the tiles, which
        gives the compiler independent work to overlap.
    """
    # Outside the loop, because the interpreter knows the position in the grid only there.
    remaining = remaining_entries(layout)
    groups = layout.steps // GROUP
    # Two groups per iteration, so that one's results, which arrive late from the matrix unit and the units that permute
    # lanes, are stored while the other computes.
    unrolled = min(2, groups)

    @pl.loop(0, groups // unrolled)
    def _(k: Int[Array, ""]) -> None:
        for g in (k * unrolled + j for j in range(unrolled)):
            body(g, [Tile(layout, remaining, g, column) for column in range(layout.channels // LANES)])


def for_strips(layout: Layout, body: Callable[[Strip], None]) -> None:
    """Calls the body for each strip of the block of channels; the order does not matter."""
    if layout.sizes.strips == 1:
        body(Strip(layout, 0))
        return

    @pl.loop(0, layout.sizes.strips)
    def _(index: Int[Array, ""]) -> None:
        body(Strip(layout, index))


def for_groups(layout: Layout, body: Callable[[Int[Array, ""], Carry], Carry], carry: Carry, reverse: bool) -> Carry:
    """Returns the carry after `carry = body(g, carry)` for each group g of the chunk.

    Args:
      layout: sizes of the pass.
      body: computes the steps of one group.
      carry: the first carry.
      reverse: go from the last group to the first.
    """
    # The carry, lists of registers, stays in them from group to group.
    groups = layout.steps // GROUP
    return jax.lax.fori_loop(0, groups, lambda k, carry: body(groups - 1 - k if reverse else k, carry), carry)


def in_order(reverse: bool) -> range:
    """Returns the steps of a group, 0 ... 15, or 15 ... 0 if reverse. A range, so that loops over it are unrolled."""
    return range(GROUP)[:: -1 if reverse else 1]


def entry_rows(layout: Layout, g: Index, i: int, n: int) -> Slice:
    """Returns the index of step i of group g and the n-th 8 state indices in rows for each step and state index."""
    return pl.ds(_aligned((g * GROUP + i) * layout.padded_state + n * SUBLANES, SUBLANES), SUBLANES)


def spread(layout: Layout, g: Int[Array, ""], block: Ref, rows: Ref) -> None:
    """Broadcasts the entries of a projection at the steps of a group to all lanes.

    A broadcast along lanes would occupy the units that permute lanes for several cycles per register. The matrix unit,
    which has no other work here, multiplies rows that are zero except for the parts of one entry by ones. The result is
    exact: parts are exact in bfloat16, and their sum is one in float32.

    Args:
      layout: sizes of the pass.
      g: index of the group.
      block: (1, 1, steps, lanes), as described by `Layout.to_projection`.
      rows: scratch, (steps * padded_state, 128), indexed by `entry_rows`.
    """
    # In the row of state index n, the parts of entry n.
    shape = (layout.padded_state, layout.projection_lanes)
    difference = jax.lax.broadcasted_iota(jnp.int32, shape, 1) - jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    is_part = functools.reduce(jnp.logical_or, (difference == k * layout.padded_state for k in range(PARTS)))
    # The load of a step broadcasts its row to all state indices.
    diagonals = jnp.concatenate(
        [jnp.where(is_part, block[0, 0, pl.ds(g * GROUP + i, 1), :], 0.0) for i in range(GROUP)]
    )
    ones = jnp.ones((layout.projection_lanes, LANES), jnp.bfloat16)
    size = GROUP * layout.padded_state
    # The precision is given because a caller's `jax.default_matmul_precision` must not ask for more passes.
    rows[pl.ds(_aligned(g * size, size), size)] = jnp.dot(
        diagonals.astype(jnp.bfloat16),
        ones,
        precision=jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def turned_rows(i: int, column: int) -> Slice:
    """Returns the index at which `sum_sublanes` expects the register of a group's step i and a tile.

    Args:
      i: step within the group.
      column: index of the tile within the strip.
    """
    return pl.ds(column * TURNED_ROWS + i, SUBLANES, stride=TURNED_STRIDE)


def sum_sublanes(turned: Ref, column: int) -> Float[Array, "16 128"]:
    """Returns the sums over sublanes of 16 registers, one per step of a group, with a row per step.

    A sum across the sublanes of one register takes several rotations and additions. Instead, the strided stores of
    the registers have collected equal sublanes in adjacent rows, and the sum adds registers.

    Args:
      turned: scratch, (tiles * TURNED_ROWS, 128), written through `turned_rows`.
      column: index of the tile within the strip.
    """
    starts = (column * TURNED_ROWS + n * TURNED_STRIDE for n in range(SUBLANES))
    return functools.reduce(jnp.add, (turned[pl.ds(start, GROUP)] for start in starts))


def add_lanes(layout: Layout, g: Int[Array, ""], rows: Ref, sums: Ref) -> None:
    """Completes the sums over channels at the steps of a group, and clears their rows for the next chunk.

    It adds up each row of 128 partial sums to one entry, transposing 128 rows at a time. The sum then adds registers,
    and not the lanes of one register, and its results lie along the lanes, as a row of the output.

    Args:
      layout: sizes of the pass.
      g: index of the group.
      rows: scratch, (steps * padded_state, 128), indexed by `entry_rows`.
      sums: output block, (1, 1, 1, steps * padded_state / 128, 128).
    """
    # The 16 steps of a group have 128 rows per 8 state indices.
    for n in range(layout.state_registers):
        k = g * layout.state_registers + n
        block = pl.ds(_aligned(k * LANES, LANES), LANES)
        sums[0, 0, 0, pl.ds(k, 1)] = jnp.sum(jnp.swapaxes(rows[block], 0, 1), axis=0, keepdims=True)
        rows[block] = jnp.zeros((LANES, LANES), jnp.float32)


def clear(layout: Layout, *buffers: Ref) -> None:
    """Writes zeros to scratch buffers, (steps * padded_state, 128)."""

    # A loop, because unrolled stores would be a large part of the kernel's code.
    @pl.loop(0, layout.steps // GROUP)
    def _(g: Int[Array, ""]) -> None:
        size = GROUP * layout.padded_state
        for rows in buffers:
            rows[pl.ds(_aligned(g * size, size), size)] = jnp.zeros((size, LANES), jnp.float32)
