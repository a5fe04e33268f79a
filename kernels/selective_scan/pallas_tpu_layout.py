"""How the TPU kernels of `pallas_tpu` cut a scan into blocks: grid, block shapes, index maps and memory spaces.

The grid is (examples, blocks of channels, chunks of time steps). The last axis is the innermost and sequential: an
output whose index map ignores the chunk stays in VMEM while the chunks pass, and carries the state or an accumulated
gradient from one to the next. The other two axes are parallel, so a chip with two cores may divide them.

Pallas copies each block from HBM to VMEM, or SMEM, before the program that needs it, and overlaps that copy with the
program before (double buffering). TPUs store arrays in tiles, of 8 x 128 entries in float32 and 16 x 128 in bfloat16,
and so the last two axes of a block in VMEM are multiples of the tile or complete axes of the array.

Vectors of the recurrence hold channels alone: a register of 8 x 128 entries is one state index of 1,024 channels. Then
y_t = Σ_n C_t[n] h_t[n] adds registers, without sums across the entries of one. B_t[n] and C_t[n], which all channels
share, are scalars in SMEM, because scalars are broadcast to a register when it is used.

Sequences arrive as tiles of 8 steps by 128 channels. The kernels copy these tiles to scratch unchanged, and load a
step's channels, which are one row in each of several tiles, with a stride of 8 rows:

    scratch row (group * tiles + tile) * 8 + i  =  step 8 group + i of the chunk, channels 128 tile ... 128 tile + 127
"""

import dataclasses

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..typing import Array, Float, Index

# The shape of a vector register, and of a float32 tile in memory.
SUBLANES, LANES = 8, 128
# Kernels read and write sequences in tiles of 16 rows: the smallest tile that bfloat16 has.
ROWS = 16


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """The channels, in tiles of 128, and the time steps that one program of the grid works on."""

    tiles: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Config:
    """The static choices of a scan that its forward and backward pass share."""

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
    """The sizes and options of one pass, and what follows from them."""

    batch: int
    length: int
    d_inner: int
    d_state: int
    tiles: int
    steps: int
    delta_softplus: bool
    reverse: bool
    backward: bool
    interpret: bool | pltpu.InterpretParams

    @classmethod
    def of(cls, config: Config, u: Float[Array, "B L D"], A: Float[Array, "D N"], backward: bool) -> "Layout":
        """The layout of the forward or backward pass over u."""
        options = (config.delta_softplus, config.reverse, backward, config.interpret)
        return cls(*u.shape, A.shape[1], config.sizes.tiles, config.sizes.steps, *options)

    @property
    def channels(self) -> int:
        """The width of a block of channels."""
        return self.tiles * LANES

    @property
    def padded_state(self) -> int:
        """The rows that the entries of a state take where they are on sublanes."""
        return padded_state(self.d_state)

    @property
    def grid(self) -> tuple[int, int, int]:
        """(examples, blocks of channels, chunks). The last block and the last chunk may be ragged."""
        return self.batch, pl.cdiv(self.d_inner, self.channels), pl.cdiv(self.length, self.steps)

    def chunk(self, c: Index) -> Index:
        """The position in the sequence of the c-th chunk that the pass visits.

        The forward pass of a reversed scan and the backward pass of the other go from the last chunk to the first.
        """
        return self.grid[2] - 1 - c if self.reverse != self.backward else c

    def operands(self) -> dict[str, Operand]:
        """Shape and block spec of each kind of operand. All are in VMEM, except `projection`, which is in SMEM.

        Index maps take the grid's indices: b example, d block of channels, c chunk in the order of the pass.
        """
        batch, blocks, chunks = self.grid
        vector = (self.tiles, LANES)
        matrix = (self.d_state, *vector)
        projection = (1, self.steps * self.d_state)
        sums = (self.steps * self.padded_state // LANES, LANES)
        chunk = self.chunk
        return {
            # u, delta, z, y and their gradients, in the caller's shape and dtype. A block is a multiple of the bfloat16
            # tile. What a ragged block has beyond the array is undefined: kernels mask it when they read, and Pallas
            # drops it when they write.
            "sequence": Operand(
                (batch, self.length, self.d_inner),
                pl.BlockSpec((1, self.steps, self.channels), lambda b, d, c: (b, chunk(c), d)),
            ),
            # B and C, float32: a row per chunk, step first and then state index, in SMEM. A chunk of 128 steps and 16
            # states is 8 KiB. The axis of size 1 makes the block's last two axes complete axes of the array.
            "projection": Operand(
                (batch, chunks, *projection),
                pl.BlockSpec((1, 1, *projection), lambda b, d, c: (b, chunk(c), 0, 0), memory_space=pltpu.SMEM),
            ),
            # dB and dC, float32: sums over the channels of one block. Blocks of channels may run on different cores, so
            # each has its own sums, which XLA adds after the kernel. Entry t * padded_state + n, in rows of 128.
            "projection_sums": Operand(
                (batch, blocks, chunks, *sums),
                pl.BlockSpec((1, 1, 1, *sums), lambda b, d, c: (b, d, chunk(c), 0, 0)),
            ),
            # D and delta_bias, float32: one entry per channel, as (tiles, 128), which is one register.
            "vector": Operand((blocks, *vector), pl.BlockSpec((1, *vector), lambda b, d, c: (d, 0, 0))),
            # dD and d_delta_bias, float32: accumulated over the chunks in VMEM, one per example and block.
            "vector_sums": Operand(
                (batch, blocks, *vector), pl.BlockSpec((1, 1, *vector), lambda b, d, c: (b, d, 0, 0))
            ),
            # A, float32: a register per state index. The same block for all chunks, so it is copied once per block.
            "matrix": Operand((blocks, *matrix), pl.BlockSpec((1, *matrix), lambda b, d, c: (d, 0, 0, 0))),
            # States, their gradients and dA, float32: as outputs they stay in VMEM while the chunks pass.
            "state": Operand((batch, blocks, *matrix), pl.BlockSpec((1, 1, *matrix), lambda b, d, c: (b, d, 0, 0, 0))),
            # The state at the start of each chunk, float32: written by the forward pass, read by the backward pass.
            "chunk_states": Operand(
                (batch, chunks, blocks, *matrix),
                pl.BlockSpec((1, 1, 1, *matrix), lambda b, d, c: (b, chunk(c), d, 0, 0, 0)),
            ),
        }

    def to_blocks(self, x: Float[Array, "*axes D"] | None) -> Float[Array, "*blocked tiles 128"] | None:
        """(..., N, D) as (..., blocks, N, tiles, 128), or (D,) as (blocks, tiles, 128), in float32, padded with zeros.

        Channels of zeros keep a state of zero, and so need no mask.
        """
        if x is None:
            return None
        blocks = self.grid[1]
        x = jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 1) + [(0, blocks * self.channels - self.d_inner)])
        x = x.reshape(*x.shape[:-1], blocks, self.tiles, LANES)
        return x if x.ndim == 3 else jnp.moveaxis(x, -4, -3)

    def from_blocks(self, x: Float[Array, "*axes blocks N tiles 128"]) -> Float[Array, "*axes N D"]:
        """The inverse of `to_blocks` for states."""
        x = jnp.moveaxis(x, -3, -4)
        return x.reshape(*x.shape[:-3], -1)[..., : self.d_inner]

    def from_vector_sums(self, x: Float[Array, "B blocks tiles 128"] | None) -> Float[Array, " D"] | None:
        """The sum over the batch of vectors in blocks."""
        return None if x is None else x.sum(axis=0).reshape(-1)[: self.d_inner]

    def to_projection(self, x: Float[Array, "B L N"]) -> Float[Array, "B chunks 1 entries"]:
        """In float32, padded with zeros to complete chunks, each a row with step first and then state index."""
        x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, self.grid[2] * self.steps - self.length), (0, 0)))
        return x.reshape(self.operands()["projection"].shape)

    def from_projection_sums(self, x: Float[Array, "B blocks chunks rows 128"]) -> Float[Array, "B L N"]:
        """The total over blocks of channels, without padding."""
        x = x.sum(axis=1).reshape(self.batch, -1, self.padded_state)
        return x[:, : self.length, : self.d_state]


def padded_state(d_state: int) -> int:
    """d_state rounded up to a multiple of the sublanes."""
    return pl.cdiv(d_state, SUBLANES) * SUBLANES
