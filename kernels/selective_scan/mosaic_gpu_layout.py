"""How the Mosaic GPU kernels of `mosaic_gpu` cut a scan into tiles: sizes, windows and layouts of registers.

A program is one warpgroup, which is four warps. It takes a block of channels through the sequence, tile by tile. Each
warp has a quarter of the tile's time steps, so arrays of sequences have the axes (quarters, steps, d_inner), where a
quarter of a tile is `steps` long and quarters are numbered through the sequence. Tiles are copied between global memory
and shared memory by the tensor memory accelerator (TMA), which reads zeros outside an array and writes nothing there.
"""

import dataclasses
from typing import Any

from jax.experimental import pallas as pl

from ..typing import Index

# A warpgroup has four warps.
WARPS = 4
# The TMA copies rows of a multiple of 16 bytes, which are 8 entries of bfloat16.
ALIGNMENT = 8
# One wave on an H100: two programs on each of its 132 multiprocessors, which have registers for two.
PROGRAMS = 264


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """What one program works on at a time. d_inner and d_state are powers of two, and at least 8 on a GPU."""

    d_inner: int  # channels
    d_state: int  # state entries per channel, with padding
    steps: int  # time steps of each warp

    @property
    def tile(self) -> int:
        """Time steps of a tile."""
        return WARPS * self.steps


def block_sizes(d_state: int) -> BlockSizes:
    """Returns blocks of 256 state entries, 8 per lane, and 8 steps per warp; with 64 states, 512 entries and 4 steps.

    The backward pass keeps the decays and the states of all steps of its warp in registers: 16 registers per step and 8
    entries. The remaining ones of the 255 registers hold the parameters, carries and sums.

    Args:
      d_state: states per channel, at most 64.
    """
    d_state = max(ALIGNMENT, pl.next_power_of_2(d_state))
    return BlockSizes(max(8, 256 // d_state), d_state, steps=8 if d_state <= 32 else 4)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The sizes and options for which the kernels are compiled."""

    batch: int
    length: int
    d_inner: int
    d_state: int
    sizes: BlockSizes
    delta_softplus: bool
    reverse: bool
    interpret: Any  # True, parameters of the interpreter of Mosaic GPU kernels, or False to compile

    @property
    def rounds(self) -> int:
        """The number of blocks of channels that a program of the backward pass goes through, one after the other."""
        return pl.cdiv(pl.cdiv(self.d_inner, self.sizes.d_inner), max(1, PROGRAMS // self.batch))

    @property
    def groups(self) -> int:
        """The number of programs of the backward pass per example, each of which sums dB and dC over its channels."""
        return pl.cdiv(pl.cdiv(self.d_inner, self.sizes.d_inner), self.rounds)

    @property
    def blocks(self) -> int:
        """The number of blocks of channels; the last ones may be ragged or outside the arrays."""
        return self.groups * self.rounds

    @property
    def tiles(self) -> int:
        """The number of tiles; the last one may be ragged."""
        return pl.cdiv(self.length, self.sizes.tile)

    @property
    def padded_width(self) -> int:
        """d_inner, padded to complete blocks: of parameters and states."""
        return self.blocks * self.sizes.d_inner

    @property
    def sequence_shape(self) -> tuple[int, int]:
        """(length, d_inner) of the sequences in memory: padded as little as possible, because padding copies them."""
        # The interpreters do not emulate what the TMA does outside an array.
        if self.interpret:
            return self.tiles * self.sizes.tile, self.padded_width
        steps = self.sizes.steps
        return pl.cdiv(self.length, steps) * steps, pl.cdiv(self.d_inner, ALIGNMENT) * ALIGNMENT


@dataclasses.dataclass(frozen=True)
class Operand:
    """An array in global memory, of which a window is copied to or from shared memory for each tile."""

    shape: tuple[int, ...]  # of the array
    block: tuple[int, ...]  # of the window
    axes: str  # what selects the window on each axis; see `window`

    def window(self, sizes: BlockSizes, *, tile: Index, block: Index, example: Index, group: Index) -> tuple[Any, ...]:
        """Returns the indices of the window.

        Args:
          sizes: of the blocks.
          tile: number of the tile.
          block: number of the block of channels.
          example: index in the batch.
          group: number of the program among those of the example.
        """
        indices = {
            "b": example,
            "g": group,
            "c": tile,
            "q": pl.ds(tile * WARPS, WARPS),
            "d": pl.ds(block * sizes.d_inner, sizes.d_inner),
            "-": slice(None),
        }
        return tuple(indices[axis] for axis in self.axes)


def operands(problem: Problem) -> dict[str, Operand]:
    """Returns the operands that are copied by tile, by name."""
    sizes, batch, tiles = problem.sizes, problem.batch, problem.tiles
    n, d, steps = sizes.d_state, sizes.d_inner, sizes.steps
    length, width = problem.sequence_shape
    quarters = length // steps
    kinds = [
        # Sequences and projections have the dtype of the caller.
        ("u delta z dy y du ddelta dz", Operand((batch, quarters, steps, width), (WARPS, steps, d), "bq-d")),
        ("B C", Operand((batch, quarters, steps, n), (WARPS, steps, n), "bq--")),
        # The state before each tile in the order of the scan: one 32nd of all states.
        ("starts", Operand((batch, tiles, n, problem.padded_width), (n, d), "bc-d")),
        # The sums over the channels of a program, float32. There are as many as programs of the backward pass, however
        # many channels there are. Complete tiles, because a program reads what it wrote in the round before.
        ("dB dC", Operand((problem.groups, batch, tiles * WARPS, steps, n), (WARPS, steps, n), "gbq--")),
    ]
    return {name: operand for names, operand in kinds for name in names.split()}


def parameter_shapes(problem: Problem) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the float32 arrays that a program reads or writes once, in global memory, by name."""
    n, width, batch = problem.sizes.d_state, problem.padded_width, problem.batch
    kinds = [
        ("A", (n, width)),
        ("D delta_bias", (width,)),
        ("initial_state final_state d_final_state d_initial_state", (batch, n, width)),
        # One part per warp.
        ("dA", (batch, WARPS, n, width)),
        ("dD ddelta_bias", (batch, WARPS, width)),
    ]
    return {name: shape for names, shape in kinds for name in names.split()}
