"""How the CUDA kernels of `pallas_gpu` cut a scan into blocks: sizes, grid, block shapes and index maps.

The grid is (blocks of channels, chunks of time steps, examples). All of its axes are parallel: the programs of a kernel
run in any order and share nothing, and recurrences across chunks have a kernel of their own.

All operands are in global memory (HBM). On a GPU a block spec copies nothing: it only offsets the pointers that a
program gets, so a block may be larger than the registers. A kernel loads a row, or a state, from its block into
registers when it reads the reference. A program is a single warp, and so needs no barriers.
"""

import dataclasses

from jax.experimental import pallas as pl


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """What one program, which is one warp, works on.

    d_inner and d_state are powers of two, because Triton requires this of its arrays.
    """

    d_inner: int  # channels
    d_state: int  # state entries per channel, with padding
    steps: int  # time steps of a group, which are unrolled; the backward pass reads the state before each group
    chunk: int  # time steps of the chunk, a multiple of steps


def block_sizes(batch: int, length: int, d_inner: int, d_state: int) -> BlockSizes:
    """Returns blocks of 512 state entries, and the longest chunks of 32 x 2^k steps that still give 2,048 programs.

    512 entries are 16 per lane of the warp. Triton gives each lane 4 state indices of 4 channels, so that a sum over
    either axis first adds registers and then takes two or three shuffles. The backward pass, with about ten such
    arrays, just fits into the 255 registers of a lane: `benchmarks/compile_for_h100.py` counts them.

    2,048 programs are about 16 warps for each of the 132 multiprocessors of an H100, enough to hide the latency of
    memory. If there are more, the chunks are made longer, because each chunk keeps states in memory. A sequence that
    fits into one chunk needs fewer kernels.

    Args:
      batch: number of examples.
      length: steps of the sequence, at least 1.
      d_inner: number of channels.
      d_state: states per channel, at most 512; the limit of the kernels is `pallas_gpu.MAX_D_STATE`.
    """
    d_state = pl.next_power_of_2(d_state)
    width, steps, chunk = min(32, 512 // d_state), 8, 32
    blocks = batch * pl.cdiv(d_inner, width)
    while chunk < length and blocks * pl.cdiv(length, 2 * chunk) >= 2048:
        chunk *= 2
    # A short sequence is one chunk, rounded up to complete groups.
    return BlockSizes(width, d_state, steps, min(chunk, pl.cdiv(length, steps) * steps))


@dataclasses.dataclass(frozen=True)
class Problem:
    """The sizes and options for which the kernels are compiled; hashable, as `nondiff_argnums` requires."""

    batch: int
    length: int
    d_inner: int
    d_state: int
    sizes: BlockSizes
    delta_softplus: bool
    reverse: bool
    interpret: bool
    # The programs of a call take the channels of blocks[first_block : first_block + call_blocks]; by default of all.
    first_block: int = 0
    max_blocks: int | None = None

    @property
    def blocks(self) -> int:
        """The number of blocks of channels; the last one may be ragged."""
        return pl.cdiv(self.d_inner, self.sizes.d_inner)

    @property
    def call_blocks(self) -> int:
        """The number of blocks of channels of a call."""
        remaining = self.blocks - self.first_block
        return remaining if self.max_blocks is None else min(self.max_blocks, remaining)

    @property
    def chunks(self) -> int:
        """The number of chunks; the last one may be ragged."""
        return pl.cdiv(self.length, self.sizes.chunk)


def operands(problem: Problem) -> dict[str, tuple[tuple[int, ...], pl.BlockSpec]]:
    """Returns the shape of the array and the block spec of every operand of the kernels, by name.

    Index maps take the grid's indices: i block of channels, c chunk, b example. None in a block shape is an axis of
    size 1 that the reference does not have. States have channels last, (d_state, d_inner), like sequences: neighbouring
    lanes of the warp then read neighbouring addresses.
    """
    sizes, batch, length, chunks = problem.sizes, problem.batch, problem.length, problem.chunks
    n, d, chunk, groups = sizes.d_state, sizes.d_inner, sizes.chunk, sizes.chunk // sizes.steps
    width, first = problem.blocks * d, problem.first_block
    layouts = [
        # Sequences and projections have the caller's shape and dtype, because a padded copy would cost memory and time.
        # Their blocks may be ragged, and kernels mask what is outside.
        (
            "u delta z dy y du ddelta dz",
            (batch, length, problem.d_inner),
            (None, chunk, d),
            lambda i, c, b: (b, c, first + i),
        ),
        ("B C", (batch, length, problem.d_state), (None, chunk, n), lambda i, c, b: (b, c, 0)),
        # Everything else is float32 and padded with zeros to complete blocks, and needs no masks.
        ("D delta_bias", (width,), (d,), lambda i, c, b: (first + i,)),
        ("A", (n, width), (n, d), lambda i, c, b: (0, first + i)),
        ("first last final_state", (batch, n, width), (None, n, d), lambda i, c, b: (b, 0, first + i)),
        # One entry per chunk. For programs of a chunk, a block is that chunk's entry; for `combine`, whose programs go
        # through all chunks, a block has the entries of all chunks and the names are plural.
        ("start end dA", (batch, chunks, n, width), (None, None, n, d), lambda i, c, b: (b, c, 0, first + i)),
        ("step_sum dD ddelta_bias", (batch, chunks, width), (None, None, d), lambda i, c, b: (b, c, first + i)),
        ("starts ends", (batch, chunks, n, width), (None, chunks, n, d), lambda i, c, b: (b, 0, 0, first + i)),
        ("step_sums", (batch, chunks, width), (None, chunks, d), lambda i, c, b: (b, 0, first + i)),
        # One state per group of steps: with groups of 8, an eighth of all states, while the backward pass runs.
        (
            "group_starts",
            (batch, chunks * groups, n, width),
            (None, groups, n, d),
            lambda i, c, b: (b, c, 0, first + i),
        ),
        # One array per block of channels of a call: the parts of a sum over channels, which XLA adds after the kernel.
        # Atomic additions would save this memory, but their order, and so the rounding, would change from run to run.
        (
            "dB dC",
            (problem.call_blocks, batch, chunks * chunk, n),
            (None, None, chunk, n),
            lambda i, c, b: (i, b, c, 0),
        ),
    ]
    specs = {names: (shape, pl.BlockSpec(block, index_map)) for names, shape, block, index_map in layouts}
    return {name: spec for names, spec in specs.items() for name in names.split()}
