"""The selective scan as a Pallas kernel for TPUs, forward and backward.

The grid goes over examples, blocks of channels and, innermost, chunks of time steps; the state stays in VMEM while the
chunks pass. The forward pass keeps the state at each chunk's start, and the backward pass recomputes a chunk's states
from there into VMEM, so that nothing of size (batch, length, d_inner, d_state) is ever in main memory. Discretisation,
skip and gate are computed inside.

Vectors of the recurrence hold channels alone: a register of 8 x 128 entries is one state index of 1,024 channels, so
that y_t = Σ_n C_t[n] h_t[n] adds whole registers, without sums across one. B_t[n] and C_t[n], the same for all
channels, are scalars in SMEM. Sequences arrive as tiles of 8 steps by 128 channels. They are copied to scratch as they
are, and a step's channels, spread over rows of as many tiles, are picked by a load with a stride of 8 rows:

    scratch row (group * tiles + tile) * 8 + i     step 8 group + i of the chunk, channels 128 tile ... 128 tile + 127
"""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.partition import vary_as
from kernels.selective_scan.pallas_tpu_kernels import LANES, SUBLANES, backward_kernel, forward_kernel
from kernels.selective_scan.reference import first_state, skip_and_gate
from kernels.typing import Array, Float

LOG2_E = math.log2(math.e)
# VMEM of one core is 128 MiB on v5e and v6e and 64 MiB on v7x; XLA keeps other arrays there too.
VMEM_BUDGET_BYTES = 32 * 2**20
VMEM_LIMIT_BYTES = 48 * 2**20


def selective_scan_pallas_tpu(
    u: Float[Array, "B L D"],
    delta: Float[Array, "B L D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B L N"],
    C: Float[Array, "B L N"],
    D: Float[Array, " D"] | None = None,
    z: Float[Array, "B L D"] | None = None,
    delta_bias: Float[Array, " D"] | None = None,
    *,
    delta_softplus: bool = False,
    reverse: bool = False,
    initial_state: Float[Array, "B D N"] | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "B L D"], Float[Array, "B D N"]]:
    """Returns (y, final_state); see `selective_scan` for the formula and the arguments.

    Args:
      interpret: run on the CPU, with `pltpu.InterpretParams` as on a TPU's memories.

    Raises:
      NotImplementedError: see `check_supported_by_pallas_tpu`.
    """
    check_supported_by_pallas_tpu(u, delta, A, B, C, D, z, delta_bias, initial_state)
    state = first_state(initial_state, u, A, jnp.dtype("float32"))
    if 0 in u.shape or 0 in A.shape:
        return skip_and_gate(jnp.zeros(u.shape, jnp.float32), u, D, z), state
    sizes = block_sizes(u.shape[1], u.shape[2], A.shape[1], u.dtype.itemsize)
    config = _Config(sizes, delta_softplus, reverse, interpret)
    A, D, delta_bias = (x if x is None else vary_as(u, x) for x in (A, D, delta_bias))
    return _scan(config, u, delta, A, B, C, D, z, delta_bias, state)


def check_supported_by_pallas_tpu(u, delta, A, B, C, D=None, z=None, delta_bias=None, initial_state=None) -> None:
    """Raises NotImplementedError for a type that the kernel does not have, or a state too large for VMEM."""
    arrays = dict(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=initial_state)
    for name, x in arrays.items():
        if x is not None and x.dtype not in (jnp.float32, jnp.bfloat16):
            raise NotImplementedError(f"{name}: got dtype {x.dtype}, pallas_tpu wants float32 or bfloat16")
    block_sizes(u.shape[1], u.shape[2], A.shape[1], u.dtype.itemsize)


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How many channels, in tiles of 128, and time steps one invocation of the kernel works on."""

    tiles: int
    steps: int


def block_sizes(length: int, d_inner: int, d_state: int, itemsize: int) -> BlockSizes:
    """The widest blocks of at most 1,024 channels, and the most steps up to 128 whose states fit in VMEM.

    A register takes 1,024 channels, and a narrower block costs as many instructions. So the number of blocks is the
    least possible, and their width the least for that number: 1,536 channels are two blocks of 768.
    """
    tiles_in_all = pl.cdiv(d_inner, LANES)
    blocks = pl.cdiv(tiles_in_all, SUBLANES)
    tiles = pl.cdiv(tiles_in_all, blocks)
    # A power of two that a 16-row tile of bfloat16 divides, no longer than the sequence needs.
    steps = min(128, max(16, pl.next_power_of_2(length)))
    while _vmem_bytes(BlockSizes(tiles, steps), d_state, itemsize) > VMEM_BUDGET_BYTES:
        if steps == 16:
            raise NotImplementedError(f"pallas_tpu: states of {d_state} entries a channel do not fit in VMEM")
        steps //= 2
    return BlockSizes(tiles, steps)


def _vmem_bytes(sizes, d_state, itemsize):
    """What the backward pass, the larger, holds: its scratch, and two buffers for each array that streams through."""
    sequence = sizes.steps * sizes.tiles * LANES
    rows = _padded_state(d_state) * LANES * 4
    states = (sizes.steps + 8) * d_state * SUBLANES * LANES * 4
    products = SUBLANES * d_state * SUBLANES * LANES * 4
    return states + products + 2 * sizes.steps * rows + 6 * sequence * 4 + 2 * 7 * sequence * itemsize


def _padded_state(d_state):
    return _whole(d_state, SUBLANES)


def _whole(size, unit):
    """The least multiple of unit that is not less than size."""
    return pl.cdiv(size, unit) * unit


@dataclasses.dataclass(frozen=True)
class _Config:
    sizes: BlockSizes
    delta_softplus: bool
    reverse: bool
    interpret: bool | pltpu.InterpretParams


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(config, u, delta, A, B, C, D, z, delta_bias, initial_state):
    outputs = _forward(config, u, delta, A, B, C, D, z, delta_bias, initial_state, keep_chunk_states=False)
    return outputs["y"], outputs["final_state"]


def _scan_fwd(config, *inputs):
    outputs = _forward(config, *inputs, keep_chunk_states=True)
    # Kept: the inputs, which live anyway, and one state a chunk. Recomputed: step sizes, decays and states.
    return (outputs["y"], outputs["final_state"]), (inputs, outputs["chunk_states"])


def _scan_bwd(config, residuals, cotangents):
    inputs, chunk_states = residuals
    gradients = _backward(config, *inputs, chunk_states, *cotangents)
    return tuple(None if x is None else g.astype(x.dtype) for g, x in zip(gradients, inputs, strict=True))


_scan.defvjp(_scan_fwd, _scan_bwd)


def _forward(config, u, delta, A, B, C, D, z, delta_bias, initial_state, keep_chunk_states):
    layout = _Layout.of(config, u, A, backward=False)
    inputs = {
        "u": (u, "sequence"),
        "delta": (delta, "sequence"),
        "z": (z, "sequence"),
        "A": (layout.to_blocks(A.astype(jnp.float32).T) * LOG2_E, "matrix"),
        "B": (layout.to_projection(B), "projection"),
        "C": (layout.to_projection(C), "projection"),
        "D": (layout.to_blocks(D), "vector"),
        "delta_bias": (layout.to_blocks(delta_bias), "vector"),
        "initial_state": (layout.to_blocks(jnp.swapaxes(initial_state, 1, 2)), "state"),
    }
    outputs = {"y": ("sequence", u.dtype), "final_state": ("state", jnp.float32)}
    if keep_chunk_states:
        outputs["chunk_states"] = ("chunk_states", jnp.float32)
    by_step = (layout.steps * layout.tiles, LANES)
    scratch = {name: by_step for name in ("step_size", "drive", "y_sum")}
    optional = ("z", "D", "delta_bias", "chunk_states")
    result = _call(forward_kernel, layout, inputs, outputs, scratch, optional, operations=6)
    return result | {"final_state": jnp.swapaxes(layout.from_blocks(result["final_state"]), 1, 2)}


def _backward(config, u, delta, A, B, C, D, z, delta_bias, initial_state, chunk_states, dy, d_final_state):
    """Returns the gradients in the order of the forward pass's arguments; those of absent ones may be anything."""
    layout = _Layout.of(config, u, A, backward=True)
    inputs = {
        "u": (u, "sequence"),
        "delta": (delta, "sequence"),
        "z": (z, "sequence"),
        "d_out": (dy, "sequence"),
        "A": (layout.to_blocks(A.astype(jnp.float32).T) * LOG2_E, "matrix"),
        "B": (layout.to_projection(B), "projection"),
        "C": (layout.to_projection(C), "projection"),
        "D": (layout.to_blocks(D), "vector"),
        "delta_bias": (layout.to_blocks(delta_bias), "vector"),
        "chunk_states": (chunk_states, "chunk_states"),
        "d_final_state": (layout.to_blocks(jnp.swapaxes(d_final_state, 1, 2)), "state"),
    }
    outputs = {
        "du": ("sequence", u.dtype),
        "d_delta": ("sequence", delta.dtype),
        "dA": ("state", jnp.float32),
        "dB": ("projection_sums", jnp.float32),
        "dC": ("projection_sums", jnp.float32),
        "d_initial_state": ("state", jnp.float32),
    }
    by_step = (layout.steps * layout.tiles, LANES)
    by_row = (layout.steps * layout.padded_state, LANES)
    scratch = {name: by_step for name in ("step_size", "drive", "dy", "d_drive", "d_step_size")}
    scratch |= {
        "dB_rows": by_row,
        "dC_rows": by_row,
        "states": (layout.steps, layout.d_state, layout.tiles, LANES),
        "products": (SUBLANES * layout.d_state * SUBLANES, LANES),
    }
    if D is not None:
        outputs["dD"] = ("vector_sums", jnp.float32)
    if delta_bias is not None:
        outputs["d_delta_bias"] = ("vector_sums", jnp.float32)
    if z is not None:
        outputs["dz"] = ("sequence", z.dtype)
        scratch["y_sum"] = by_step
    optional = ("z", "dz", "D", "dD", "delta_bias", "d_delta_bias")
    d = _call(backward_kernel, layout, inputs, outputs, scratch, optional, operations=20)
    dA = layout.from_blocks(d["dA"]).sum(axis=0).T
    dB, dC = (layout.from_projection_sums(d[name]) for name in ("dB", "dC"))
    dD, d_delta_bias = (layout.from_vector_sums(d.get(name)) for name in ("dD", "d_delta_bias"))
    d_initial_state = jnp.swapaxes(layout.from_blocks(d["d_initial_state"]), 1, 2)
    return d["du"], d["d_delta"], dA, dB, dC, dD, d.get("dz"), d_delta_bias, d_initial_state


def _call(kernel, layout, inputs, outputs, scratch, optional, operations):
    """Runs the kernel over the layout's grid; returns its outputs by name.

    Args:
      inputs: {name: (array, kind)}; those whose array is None are left out.
      outputs: {name: (kind, dtype)}.
      scratch: {name: shape}, float32.
      optional: names that the kernel asks for though they may be in none of the three.
      operations: arithmetic operations for each entry of a state, for XLA's schedule.
    """
    inputs = {name: entry for name, entry in inputs.items() if entry[0] is not None}
    kinds = layout.kinds()
    varies = jax.typeof(inputs["u"][0]).manual_axis_type  # in a `jax.shard_map`, over the axes that split the batch
    out_shape = [
        jax.ShapeDtypeStruct(kinds[kind].shape, dtype, manual_axis_type=varies) for kind, dtype in outputs.values()
    ]

    def body(*refs):
        names = (*inputs, *outputs, *scratch)
        kernel(types.SimpleNamespace(**(dict.fromkeys(optional) | dict(zip(names, refs, strict=True)))), layout)

    entries = layout.batch * layout.length * layout.d_inner * layout.d_state
    results = pl.pallas_call(
        body,
        grid=layout.grid,
        in_specs=[kinds[kind].spec for _, kind in inputs.values()],
        out_specs=[kinds[kind].spec for kind, _ in outputs.values()],
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
        compiler_params=pltpu.CompilerParams(
            # Chunks follow one another: the state stays where the last one left it.
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=operations * entries,
            transcendentals=entries * (2 if layout.backward else 1),
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*(x for x, _ in inputs.values()), *out_shape)),
        ),
        interpret=layout.interpret,
        name=f"selective_scan_{'backward' if layout.backward else 'forward'}",
    )(*(x for x, _ in inputs.values()))
    return dict(zip(outputs, results, strict=True))


@dataclasses.dataclass(frozen=True)
class _Kind:
    """An array in main memory and how it is cut for the grid."""

    shape: tuple[int, ...]
    spec: pl.BlockSpec


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How a problem is cut into blocks. The grid's axes: example, block of channels, chunk in the order of the pass."""

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
    def of(cls, config, u, A, backward):
        options = (config.delta_softplus, config.reverse, backward, config.interpret)
        return cls(*u.shape, A.shape[1], config.sizes.tiles, config.sizes.steps, *options)

    @property
    def channels(self):
        return self.tiles * LANES

    @property
    def padded_state(self):
        return _padded_state(self.d_state)

    @property
    def grid(self):
        return self.batch, pl.cdiv(self.d_inner, self.channels), pl.cdiv(self.length, self.steps)

    def chunk(self, c):
        """The place in the sequence of the pass's chunk number c."""
        return self.grid[2] - 1 - c if self.reverse != self.backward else c

    def kinds(self):
        batch, blocks, chunks = self.grid
        vector = (self.tiles, LANES)
        matrix = (self.d_state, *vector)
        projection = (1, self.steps * self.d_state)
        sums = (self.steps * self.padded_state // LANES, LANES)
        chunk = self.chunk
        return {
            "sequence": _Kind(
                (batch, self.length, self.d_inner),
                pl.BlockSpec((1, self.steps, self.channels), lambda b, d, c: (b, chunk(c), d)),
            ),
            "projection": _Kind(
                (batch, chunks, *projection),
                pl.BlockSpec((1, 1, *projection), lambda b, d, c: (b, chunk(c), 0, 0), memory_space=pltpu.SMEM),
            ),
            "projection_sums": _Kind(
                (batch, blocks, chunks, *sums),
                pl.BlockSpec((1, 1, 1, *sums), lambda b, d, c: (b, d, chunk(c), 0, 0)),
            ),
            "vector": _Kind((blocks, *vector), pl.BlockSpec((1, *vector), lambda b, d, c: (d, 0, 0))),
            "vector_sums": _Kind((batch, blocks, *vector), pl.BlockSpec((1, 1, *vector), lambda b, d, c: (b, d, 0, 0))),
            "matrix": _Kind((blocks, *matrix), pl.BlockSpec((1, *matrix), lambda b, d, c: (d, 0, 0, 0))),
            "state": _Kind((batch, blocks, *matrix), pl.BlockSpec((1, 1, *matrix), lambda b, d, c: (b, d, 0, 0, 0))),
            "chunk_states": _Kind(
                (batch, chunks, blocks, *matrix),
                pl.BlockSpec((1, 1, 1, *matrix), lambda b, d, c: (b, chunk(c), d, 0, 0, 0)),
            ),
        }

    def to_blocks(self, x):
        """(..., N, D) to (..., blocks, N, tiles, 128), or (D,) to (blocks, tiles, 128), padded with zeros."""
        if x is None:
            return None
        blocks = self.grid[1]
        x = jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 1) + [(0, blocks * self.channels - self.d_inner)])
        x = x.reshape(*x.shape[:-1], blocks, self.tiles, LANES)
        return x if x.ndim == 3 else jnp.moveaxis(x, -4, -3)

    def from_blocks(self, x):
        """The inverse of `to_blocks` for states: (..., blocks, N, tiles, 128) to (..., N, D)."""
        x = jnp.moveaxis(x, -3, -4)
        return x.reshape(*x.shape[:-3], -1)[..., : self.d_inner]

    def from_vector_sums(self, x):
        """(batch, blocks, tiles, 128) to (D,)."""
        return None if x is None else x.sum(axis=0).reshape(-1)[: self.d_inner]

    def to_projection(self, x):
        """(B, L, N) to float32 in whole chunks, in which step, then state index, are one axis; padded with zeros."""
        x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, self.grid[2] * self.steps - self.length), (0, 0)))
        return x.reshape(self.kinds()["projection"].shape)

    def from_projection_sums(self, x):
        """The sums over each block's channels, added up: (B, L, N)."""
        x = x.sum(axis=1).reshape(self.batch, -1, self.padded_state)
        return x[:, : self.length, : self.d_state]
