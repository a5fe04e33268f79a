"""How the TPU kernels of `pallas_tpu` cut a scan into blocks: grid, block shapes, index maps and memory spaces.

The grid is (examples, blocks of channels, chunks of time steps). The last axis is the innermost and sequential: an
output whose index map ignores the chunk stays in VMEM while the chunks pass, and carries the state or an accumulated
gradient from one to the next. The other two axes are parallel, so a chip with two cores may divide them.

Pallas copies each block from HBM to VMEM before the program that needs it, and overlaps that copy with the program
before (double buffering). TPUs store arrays in tiles, of 8 x 128 entries in float32 and 16 x 128 in bfloat16, and so
the last two axes of a block are multiples of the tile or complete axes of the array.

A register of 8 x 128 entries holds 8 state indices, on its sublanes, of 128 channels, on its lanes. So registers are
full at every width that is a multiple of 128 and every d_state that is a multiple of 8; other sizes are padded. The
arrays of the recurrence have three forms, none of which needs an instruction to become an operand:

    A, h and their gradients   (d_state, channels): a register for each 8 state indices and 128 channels
    Δ, Δ u, dy                 a row of 128 channels for each step: the load broadcasts it to all sublanes
    B, C, dB, dC               a row for each step and state index: B and C with the entry in all lanes, dB and dC with
                               partial sums over channels

The sum over state indices, y_t = Σ_n C_t[n] h_t[n], adds registers to each other and, at the end, their sublanes.

Programs work through their channels in strips of a few tiles of 128, and through the chunk in groups of 16 steps. A, h,
dh and dA of a strip stay in registers while its steps pass, and its tiles share the loads of B and C. The states that
the backward pass recomputes are scratch, which the next strip overwrites.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..typing import Array, Float, Index

# The shape of a vector register, and of a float32 tile in memory.
SUBLANES, LANES = 8, 128
# The steps that are unrolled: the rows of the smallest tile that bfloat16 has.
GROUP = 16
# The numbers with 8 bits of mantissa, as bfloat16 has, whose sum is a float32 number of 24 bits.
PARTS = 3


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """What one program of the grid works on.

    Attributes:
      tiles: the width of a strip, in tiles of 128 channels.
      strips: strips in a block of channels.
      steps: time steps in a chunk.
    """

    tiles: int
    strips: int
    steps: int

    @property
    def channels(self) -> int:
        """The width of a block of channels."""
        return self.strips * self.tiles * LANES


@dataclasses.dataclass(frozen=True)
class Config:
    """The static options of a scan, which its forward and backward pass share; hashable for `nondiff_argnums`."""

    sizes: BlockSizes
    delta_softplus: bool
    reverse: bool
    interpret: bool | pltpu.InterpretParams


@dataclasses.dataclass(frozen=True)
class Operand:
    """The shape of a kernel's operand in HBM, and its block spec."""

    shape: tuple[int, ...]
    spec: pl.BlockSpec


@dataclasses.dataclass(frozen=True)
class Layout:
    """The sizes and options of the forward or backward pass, and the grid, block specs and layouts that follow."""

    batch: int
    length: int
    d_inner: int
    d_state: int
    sizes: BlockSizes
    delta_softplus: bool
    reverse: bool
    backward: bool
    interpret: bool | pltpu.InterpretParams

    @classmethod
    def of(cls, config: Config, u: Float[Array, "B L D"], A: Float[Array, "D N"], backward: bool) -> "Layout":
        """Returns the layout of the forward or backward pass over u.

        Args:
          config: options of the scan.
          u: gives batch, length and d_inner.
          A: gives d_state.
          backward: of the backward pass.
        """
        batch, length, d_inner = u.shape
        return cls(
            batch=batch,
            length=length,
            d_inner=d_inner,
            d_state=A.shape[1],
            sizes=config.sizes,
            delta_softplus=config.delta_softplus,
            reverse=config.reverse,
            backward=backward,
            interpret=config.interpret,
        )

    @property
    def steps(self) -> int:
        """Time steps in a chunk."""
        return self.sizes.steps

    @property
    def tiles(self) -> int:
        """The width of a strip, in tiles of 128 channels."""
        return self.sizes.tiles

    @property
    def padded_state(self) -> int:
        """The number of rows that a state takes: its entries are on sublanes."""
        return padded_state(self.d_state)

    @property
    def channels(self) -> int:
        """The width of a block of channels."""
        return self.sizes.channels

    @property
    def state_registers(self) -> int:
        """The number of registers that a state of 128 channels takes."""
        return self.padded_state // SUBLANES

    @property
    def strip_registers(self) -> int:
        """The number of registers that a strip's state takes."""
        return self.tiles * self.state_registers

    @property
    def projection_lanes(self) -> int:
        """The lanes that the parts of a projection's entries take at one step."""
        return pl.cdiv(PARTS * self.padded_state, LANES) * LANES

    @property
    def grid(self) -> tuple[int, int, int]:
        """(examples, blocks of channels, chunks). The last block and the last chunk may be ragged."""
        return self.batch, pl.cdiv(self.d_inner, self.channels), pl.cdiv(self.length, self.steps)

    def chunk(self, c: Index) -> Index:
        """Returns the position in the sequence of the c-th chunk that the pass visits.

        The forward pass of a reversed scan, and the backward pass of a scan that is not reversed, go from the last
        chunk to the first.
        """
        return self.grid[2] - 1 - c if self.reverse != self.backward else c

    def operands(self) -> dict[str, Operand]:
        """Returns the shape and block spec of each kind of operand, all of which are in VMEM.

        Index maps take the grid's indices: b example, d block of channels, c chunk in the order of the pass.
        """
        batch, blocks, chunks = self.grid
        width = self.channels
        # In HBM, these arrays have complete blocks of channels; sequences are not padded.
        padded = blocks * width
        projection = (self.steps, self.projection_lanes)
        sums = (self.steps * self.padded_state // LANES, LANES)
        chunk = self.chunk
        return {
            # u, delta, z, y and their gradients, in the caller's shape and dtype. A block is a multiple of the bfloat16
            # tile. What a ragged block has beyond the array is undefined: kernels mask it when they read, and Pallas
            # drops it when they write.
            "sequence": Operand(
                (batch, self.length, self.d_inner),
                pl.BlockSpec((1, self.steps, width), lambda b, d, c: (b, chunk(c), d)),
            ),
            # B and C, float32: a row per step, with the parts of its entries. The kernels broadcast each entry to all
            # lanes, in scratch: in HBM, that form would be larger than the sequences.
            "projection": Operand(
                (batch, chunks, *projection),
                pl.BlockSpec((1, 1, *projection), lambda b, d, c: (b, chunk(c), 0, 0)),
            ),
            # dB and dC, float32: sums over the channels of one block. Blocks of channels may run on different cores, so
            # each has its own sums, which XLA adds after the kernel. Entry t * padded_state + n, in rows of 128.
            "projection_sums": Operand(
                (batch, blocks, chunks, *sums),
                pl.BlockSpec((1, 1, 1, *sums), lambda b, d, c: (b, d, chunk(c), 0, 0)),
            ),
            # D and delta_bias, float32.
            "vector": Operand((1, padded), pl.BlockSpec((1, width), lambda b, d, c: (0, d))),
            # dD and d_delta_bias, float32: accumulated over the chunks in VMEM, one per example. Each row has the sums
            # over every eighth step: the sum across sublanes is left to XLA.
            "vector_sums": Operand(
                (batch, SUBLANES, padded), pl.BlockSpec((1, SUBLANES, width), lambda b, d, c: (b, 0, d))
            ),
            # A, float32. The same block for all chunks, so it is copied once per block.
            "matrix": Operand(
                (self.padded_state, padded), pl.BlockSpec((self.padded_state, width), lambda b, d, c: (0, d))
            ),
            # States, their gradients and dA, float32: as outputs they stay in VMEM while the chunks pass.
            "state": Operand(
                (batch, self.padded_state, padded),
                pl.BlockSpec((1, self.padded_state, width), lambda b, d, c: (b, 0, d)),
            ),
            # The state at the start of each chunk, float32: written by the forward pass, read by the backward pass.
            "chunk_states": Operand(
                (batch, chunks, self.padded_state, padded),
                pl.BlockSpec((1, 1, self.padded_state, width), lambda b, d, c: (b, chunk(c), 0, d)),
            ),
        }

    def pad_state(self, x: Float[Array, "*axes N D"]) -> Float[Array, "*axes rows channels"]:
        """Returns x in float32, padded with zeros to complete registers of state indices and blocks of channels.

        The state of the padding stays zero, so it needs no mask.
        """
        x = self._pad_channels(x)
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, self.padded_state - self.d_state), (0, 0)])

    def pad_vector(self, x: Float[Array, " D"]) -> Float[Array, "1 channels"]:
        """Returns x in float32 as a row, padded with zeros to complete blocks of channels."""
        return self._pad_channels(x[None])

    def _pad_channels(self, x: Float[Array, "*axes D"]) -> Float[Array, "*axes channels"]:
        padding = self.grid[1] * self.channels - self.d_inner
        return jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 1) + [(0, padding)])

    def from_state(self, x: Float[Array, "*axes rows channels"]) -> Float[Array, "*axes D N"]:
        """Returns the inverse of `pad_state`, with the axes of the caller's states."""
        return jnp.swapaxes(x[..., : self.d_state, : self.d_inner], -1, -2)

    def from_vector_sums(self, x: Float[Array, "B 8 channels"]) -> Float[Array, " D"]:
        """Returns the sum over the batch and rows, without padding."""
        return x.sum(axis=(0, 1))[: self.d_inner]

    def to_projection(self, x: Float[Array, "B L N"]) -> Float[Array, "B chunks steps lanes"]:
        """Returns the entries of x cut into three parts, whose sum they are, and cut into chunks padded with zeros.

        Each part is exact in bfloat16. A row has the first parts of its padded_state entries, then the second, the
        third, and padding.
        """
        batch, _, chunks = self.grid
        padding = ((0, 0), (0, chunks * self.steps - self.length), (0, self.padded_state - self.d_state))
        rest = jnp.pad(x.astype(jnp.float32), padding)
        parts: list[Array] = []
        for _ in range(PARTS):
            # Not a cast to bfloat16 and back, because XLA may remove one.
            parts.append(jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7))
            rest = rest - parts[-1]
        row = jnp.concatenate(parts, axis=-1)
        row = jnp.pad(row, ((0, 0), (0, 0), (0, self.projection_lanes - row.shape[-1])))
        return row.reshape(batch, chunks, self.steps, self.projection_lanes)

    def from_projection_sums(self, x: Float[Array, "B blocks chunks rows 128"]) -> Float[Array, "B L N"]:
        """Returns the sum over blocks of channels, without padding."""
        x = x.sum(axis=1).reshape(self.batch, -1, self.padded_state)
        return x[:, : self.length, : self.d_state]


def padded_state(d_state: int) -> int:
    """Returns d_state rounded up to a multiple of 8, the number of sublanes."""
    return pl.cdiv(d_state, SUBLANES) * SUBLANES
