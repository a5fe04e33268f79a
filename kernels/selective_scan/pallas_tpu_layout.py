"""How the TPU kernels of `pallas_tpu` cut a scan into blocks: grid, block shapes, index maps and memory spaces.

The grid is (examples, blocks of channels, chunks of time steps). The last axis is the innermost and sequential: an
output whose index map ignores the chunk stays in VMEM while the chunks pass, and carries the state or an accumulated
gradient from one to the next. The other two axes are parallel, so a chip with two cores may divide them.

Pallas copies each block from HBM to VMEM, or SMEM, before the program that needs it, and overlaps that copy with the
program before (double buffering). TPUs store arrays in tiles, of 8 x 128 entries in float32 and 16 x 128 in bfloat16,
and so the last two axes of a block in VMEM are multiples of the tile or complete axes of the array.

In the recurrence, a register of 8 x 128 entries holds one state index of 1,024 channels. The sum
y_t = Σ_n C_t[n] h_t[n] then adds registers to each other, and never the entries of one register. B_t[n] and C_t[n] are
shared by all channels, so they are scalars in SMEM: the instruction that uses a scalar broadcasts it to a register.

Sequences arrive as tiles of 8 steps by 128 channels. The kernels write these tiles to scratch in the same form. The
channels of one step are then one row of each tile, and one load with a stride of 8 rows reads all of them:

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
    tiles: int
    steps: int
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
            tiles=config.sizes.tiles,
            steps=config.sizes.steps,
            delta_softplus=config.delta_softplus,
            reverse=config.reverse,
            backward=backward,
            interpret=config.interpret,
        )

    @property
    def channels(self) -> int:
        """The width of a block of channels."""
        return self.tiles * LANES

    @property
    def padded_state(self) -> int:
        """The number of rows that a state takes where its entries are on sublanes."""
        return padded_state(self.d_state)

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
        """Returns the shape and block spec of each kind of operand. All are in VMEM, except `projection`, in SMEM.

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

    def to_blocks(self, x: Float[Array, "*axes D"]) -> Float[Array, "*blocked tiles 128"]:
        """Returns x in float32 with its channels, the last axis, padded with zeros and cut into blocks of tiles.

        The state of padding channels stays zero, so they need no mask.

        Args:
          x: (..., N, D), which becomes (..., blocks, N, tiles, 128), or (D,), which becomes (blocks, tiles, 128).
        """
        blocks = self.grid[1]
        x = jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 1) + [(0, blocks * self.channels - self.d_inner)])
        x = x.reshape(*x.shape[:-1], blocks, self.tiles, LANES)
        return x if x.ndim == 3 else jnp.moveaxis(x, -4, -3)

    def from_blocks(self, x: Float[Array, "*axes blocks N tiles 128"]) -> Float[Array, "*axes N D"]:
        """Returns the inverse of `to_blocks` for states: the channels in one axis, without padding."""
        x = jnp.moveaxis(x, -3, -4)
        return x.reshape(*x.shape[:-3], -1)[..., : self.d_inner]

    def from_vector_sums(self, x: Float[Array, "B blocks tiles 128"]) -> Float[Array, " D"]:
        """Returns the sum over the batch of vectors in blocks, without padding."""
        return x.sum(axis=0).reshape(-1)[: self.d_inner]

    def to_projection(self, x: Float[Array, "B L N"]) -> Float[Array, "B chunks 1 entries"]:
        """Returns x in float32, padded with zeros to complete chunks. A chunk is a row, ordered by step, then state."""
        x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, self.grid[2] * self.steps - self.length), (0, 0)))
        return x.reshape(self.operands()["projection"].shape)

    def from_projection_sums(self, x: Float[Array, "B blocks chunks rows 128"]) -> Float[Array, "B L N"]:
        """Returns the sum over blocks of channels, without padding."""
        x = x.sum(axis=1).reshape(self.batch, -1, self.padded_state)
        return x[:, : self.length, : self.d_state]


def padded_state(d_state: int) -> int:
    """Returns d_state rounded up to a multiple of 8, the number of sublanes."""
    return pl.cdiv(d_state, SUBLANES) * SUBLANES
