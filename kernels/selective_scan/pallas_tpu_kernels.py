"""The bodies of the TPU kernels: one chunk of time steps of one block of channels; see `pallas_tpu`.

Each body has three parts: a loop over tiles that prepares the inputs of all channels in scratch, a loop over strips
with the recurrence, and a loop over tiles that finishes and writes the outputs. The loops over tiles do all work that
is elementwise in steps and channels, with masks for ragged edges. It overlaps with what they give to the matrix unit
and to the units that permute lanes. The recurrence then reads scratch without masks.

Everything inside is float32, because it accumulates over the sequence, and because the vector units of TPUs before v6e
compute in float32 only.

An array with an entry per state index and channel of a strip is a list of registers, as `Strip.load` returns it. Loops
over the list and over the steps of a group are unrolled at trace time. In the order of the code, all operations of one
register and step stand together: in the other order, with one operation for all registers before the next, the
intermediate values of all of them would be alive at once and exceed the 64 registers.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ..typing import Array, Float, Int, Ref
from .pallas_tpu_layout import GROUP, SUBLANES, Layout
from .pallas_tpu_tiles import (
    Registers,
    Slice,
    Strip,
    Tile,
    add_lanes,
    clear,
    entry_rows,
    for_groups,
    for_strips,
    for_tiles,
    in_order,
    spread,
    sum_sublanes,
    turned_rows,
)

LN2 = math.log(2)
LOG2_E = math.log2(math.e)


# Block shapes are those of `Layout.operands`: sequence (1, steps, channels), projection (1, 1, steps, lanes),
# state (1, padded_state, channels), matrix (padded_state, channels), vector (1, channels). All references are in VMEM.
# Optional arguments that are absent are None.
@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardRefs:
    """The references of one program of the forward kernel."""

    # Inputs.
    u: Ref  # sequence, in the caller's dtype
    delta: Ref  # sequence
    z: Ref | None = None  # sequence
    A: Ref  # matrix, multiplied by log2 e
    B: Ref  # projection
    C: Ref  # projection
    D: Ref | None = None  # vector
    delta_bias: Ref | None = None  # vector
    initial_state: Ref  # state
    # Outputs.
    y: Ref  # sequence
    final_state: Ref  # state: the running state, from chunk to chunk
    chunk_states: Ref | None = None  # (1, 1, padded_state, channels): absent without a gradient
    # Scratch, float32. Of the chunk, (steps * padded_state, 128):
    B_rows: Ref  # B, broadcast to all lanes
    C_rows: Ref
    # Of the chunk, (tiles of the block * steps, 128):
    step_size: Ref  # Δ
    drive: Ref  # Δ u
    y_sum: Ref  # Σ_n C_n h_n
    # Of a group, (tiles * TURNED_ROWS, 128), for `sum_sublanes`:
    y_turned: Ref


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardRefs:
    """The references of one program of the backward kernel."""

    # Inputs.
    u: Ref  # sequence, in the caller's dtype
    delta: Ref  # sequence
    z: Ref | None = None  # sequence
    d_out: Ref  # sequence: the gradient of the output y
    A: Ref  # matrix, multiplied by log2 e
    B: Ref  # projection
    C: Ref  # projection
    D: Ref | None = None  # vector
    delta_bias: Ref | None = None  # vector
    chunk_states: Ref  # (1, 1, padded_state, channels): the state before the chunk's first scanned step
    d_final_state: Ref  # state
    # Outputs. Those that the chunks share (dA, dD, d_delta_bias, d_initial_state) stay in VMEM between them, and so do
    # dB_rows and dC_rows, which each chunk leaves cleared.
    du: Ref  # sequence
    d_delta: Ref  # sequence
    dz: Ref | None = None  # sequence
    dA: Ref  # state
    dB: Ref  # (1, 1, 1, steps * padded_state / 128, 128): sums over the block's channels
    dC: Ref  # as dB
    d_initial_state: Ref  # state: the running carry, from chunk to chunk
    dD: Ref | None = None  # (1, 8, channels)
    d_delta_bias: Ref | None = None  # (1, 8, channels)
    # Scratch, float32. Of the chunk, (steps * padded_state, 128):
    B_rows: Ref  # B, broadcast to all lanes
    C_rows: Ref
    dB_rows: Ref  # partial sums of dB over channels
    dC_rows: Ref
    # Of the chunk, (tiles of the block * steps, 128). y_sum and y_turned are present if z is.
    step_size: Ref  # Δ
    drive: Ref  # Δ u
    dy: Ref  # the gradient of the gate's input, d_out silu(z)
    d_drive: Ref  # the gradient of Δ u
    d_step_size: Ref  # the gradient of Δ through Δ A, divided by ln 2
    y_sum: Ref | None = None  # Σ_n C_n h_n
    # Of a strip, (steps * tiles * padded_state, 128):
    states: Ref  # the state before each step
    # Of a group, (tiles * TURNED_ROWS, 128), for `sum_sublanes`:
    d_drive_turned: Ref
    d_step_size_turned: Ref
    y_turned: Ref | None = None


def forward_kernel(r: ForwardRefs, layout: Layout) -> None:
    """Scans one chunk: writes y, and replaces the state before the chunk in `final_state` by the state after it."""

    # Chunks are visited in the order of the scan: chunk number 0 of the pass holds the first scanned step.
    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        r.final_state[...] = r.initial_state[...]

    if r.chunk_states is not None:
        r.chunk_states[0] = r.final_state[...]

    def prepare(g: Int[Array, ""], tiles: list[Tile]) -> None:
        spread(layout, g, r.B, r.B_rows)
        spread(layout, g, r.C, r.C_rows)
        for tile in tiles:
            _discretize(r, layout, tile)

    for_tiles(layout, prepare)

    @functools.partial(for_strips, layout)
    def _(strip: Strip) -> None:
        A = strip.load(r.A)

        def group(g: Int[Array, ""], h: Registers) -> Registers:
            h = list(h)
            for i in in_order(layout.reverse):
                B, C = _projections(r, layout, g, i)
                for column in range(layout.tiles):
                    step_size, drive = (strip.row(x, g, i, column) for x in (r.step_size, r.drive))
                    terms: Registers = []
                    for n in range(layout.state_registers):
                        k = column * layout.state_registers + n
                        h[k] = jnp.exp2(step_size * A[k]) * h[k] + drive * B[n]
                        terms.append(h[k] * C[n])
                    r.y_turned[turned_rows(i, column)] = functools.reduce(jnp.add, terms)
            for column in range(layout.tiles):
                strip.put(r.y_sum, g, column, sum_sublanes(r.y_turned, column))
            return h

        h = for_groups(layout, group, strip.load(r.final_state, 0), layout.reverse)
        strip.store(r.final_state, h, 0)

    # Skip and gate read u and z in tiles, the form in which they arrive, so they come after the recurrence.
    def finish(_: Int[Array, ""], tiles: list[Tile]) -> None:
        for tile in tiles:
            y = tile.take(r.y_sum)
            if r.D is not None:
                y = y + tile.vector(r.D) * tile.get(r.u)
            if r.z is not None:
                y = y * jax.nn.silu(tile.get(r.z))
            tile.set(r.y, y)

    for_tiles(layout, finish)


def backward_kernel(r: BackwardRefs, layout: Layout) -> None:
    """The adjoint recurrence of one chunk, from its last scanned step to its first.

    Let carry_t be the gradient of the loss with respect to h_t, through the steps after t, and dy_t the gradient with
    respect to the input of the gate, D u_t + C_t · h_t:

        g_t           = carry_t + dy_t C_t             the gradient with respect to h_t
        dC_t          = Σ_d h_t dy_t
        dB_t          = Σ_d g_t Δ_t u_t
        d(Δ_t u_t)    = Σ_n g_t B_t
        carry_{t-1}   = exp(Δ_t A) g_t
        d(Δ_t A)      = carry_{t-1} h_{t-1}

    The pass visits the chunks in the opposite order of the scan. In each it first scans forward, to recompute the
    states h_{t-1} into scratch and dC, and then backward.
    """
    registers = layout.state_registers

    # Chunk number 0 of this pass holds the last scanned step.
    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        r.d_initial_state[...] = r.d_final_state[...]
        for total in (r.dA, r.dD, r.d_delta_bias):
            if total is not None:
                total[...] = jnp.zeros(total.shape, total.dtype)
        clear(layout, r.dB_rows, r.dC_rows)

    # Steps and channels beyond the end have Δ = 0 and dy = 0, so the loops over steps below change nothing there.
    def prepare(g: Int[Array, ""], tiles: list[Tile]) -> None:
        spread(layout, g, r.B, r.B_rows)
        spread(layout, g, r.C, r.C_rows)
        for tile in tiles:
            _discretize(r, layout, tile)
            dy = tile.get(r.d_out)
            tile.put(r.dy, dy if r.z is None else dy * jax.nn.silu(tile.get(r.z)))

    for_tiles(layout, prepare)

    @functools.partial(for_strips, layout)
    def _(strip: Strip) -> None:
        A = strip.load(r.A)

        def recompute(g: Int[Array, ""], h: Registers) -> Registers:
            h = list(h)
            for i in in_order(layout.reverse):
                B, C = _projections(r, layout, g, i)
                dC: list[Registers] = [[] for _ in range(registers)]
                for column in range(layout.tiles):
                    step_size, drive, dy = (strip.row(x, g, i, column) for x in (r.step_size, r.drive, r.dy))
                    terms: Registers = []
                    for n in range(registers):
                        k = column * registers + n
                        # The state before the step: the adjoint multiplies it with the carry. dC needs the state after
                        # it, which is here, and so is computed in this loop.
                        r.states[_state_rows(layout, g, i, k)] = h[k]
                        h[k] = jnp.exp2(step_size * A[k]) * h[k] + drive * B[n]
                        dC[n].append(h[k] * dy)
                        terms.append(h[k] * C[n])
                    if r.y_turned is not None:
                        r.y_turned[turned_rows(i, column)] = functools.reduce(jnp.add, terms)
                for n in range(registers):
                    r.dC_rows[entry_rows(layout, g, i, n)] += functools.reduce(jnp.add, dC[n])
            if r.y_turned is not None and r.y_sum is not None:
                for column in range(layout.tiles):
                    strip.put(r.y_sum, g, column, sum_sublanes(r.y_turned, column))
            return h

        for_groups(layout, recompute, strip.load(r.chunk_states, 0, 0), layout.reverse)

        def adjoint(g: Int[Array, ""], carry_and_dA: tuple[Registers, Registers]) -> tuple[Registers, Registers]:
            carry, dA = (list(x) for x in carry_and_dA)
            for i in in_order(not layout.reverse):
                B, C = _projections(r, layout, g, i)
                dB: list[Registers] = [[] for _ in range(registers)]
                for column in range(layout.tiles):
                    step_size, drive, dy = (strip.row(x, g, i, column) for x in (r.step_size, r.drive, r.dy))
                    d_drive: Registers = []
                    d_step_size: Registers = []
                    for n in range(registers):
                        k = column * registers + n
                        dh = carry[k] + dy * C[n]
                        dB[n].append(dh * drive)
                        d_drive.append(dh * B[n])
                        # The decay is computed again. Storing it in `recompute` would take the memory of the states
                        # once more; it saves bundles on v6e, but not on v5e, which stores one register per bundle.
                        carry[k] = jnp.exp2(step_size * A[k]) * dh
                        d_exponent = carry[k] * r.states[_state_rows(layout, g, i, k)]
                        d_step_size.append(d_exponent * A[k])
                        dA[k] = dA[k] + d_exponent * step_size
                    r.d_drive_turned[turned_rows(i, column)] = functools.reduce(jnp.add, d_drive)
                    r.d_step_size_turned[turned_rows(i, column)] = functools.reduce(jnp.add, d_step_size)
                for n in range(registers):
                    r.dB_rows[entry_rows(layout, g, i, n)] += functools.reduce(jnp.add, dB[n])
            for column in range(layout.tiles):
                strip.put(r.d_drive, g, column, sum_sublanes(r.d_drive_turned, column))
                strip.put(r.d_step_size, g, column, sum_sublanes(r.d_step_size_turned, column))
            return carry, dA

        first = strip.load(r.d_initial_state, 0), strip.load(r.dA, 0)
        carry, dA = for_groups(layout, adjoint, first, not layout.reverse)
        strip.store(r.d_initial_state, carry, 0)
        strip.store(r.dA, dA, 0)

    # From the gradients of Δ and Δ u to those of the arguments: elementwise, by tiles.
    def finish(g: Int[Array, ""], tiles: list[Tile]) -> None:
        add_lanes(layout, g, r.dB_rows, r.dB)
        add_lanes(layout, g, r.dC_rows, r.dC)
        for tile in tiles:
            _finish_gradients(r, layout, tile)

    for_tiles(layout, finish)


def _finish_gradients(r: BackwardRefs, layout: Layout, tile: Tile) -> None:
    """Writes a tile of the gradients of u, delta and z, and adds to those of D and delta_bias."""
    u, dy, d_drive = tile.get(r.u), tile.take(r.dy), tile.take(r.d_drive)
    du = d_drive * tile.take(r.step_size)
    if r.D is not None:
        du = du + tile.vector(r.D) * dy
    if r.dD is not None:
        tile.add(r.dD, dy * u)
    tile.set(r.du, du)
    # r.A is A log2 e, and log2 e ln 2 = 1: this factor restores the gradient through Δ A.
    d_delta = d_drive * u + LN2 * tile.take(r.d_step_size)
    if layout.delta_softplus:
        d_delta = d_delta * jax.nn.sigmoid(_biased_delta(r, tile))
    tile.set(r.d_delta, d_delta)
    if r.d_delta_bias is not None:
        tile.add(r.d_delta_bias, d_delta)
    # z, y_sum and dz are present together.
    if r.z is not None and r.y_sum is not None and r.dz is not None:
        y = tile.take(r.y_sum)
        if r.D is not None:
            y = y + tile.vector(r.D) * u
        z = tile.get(r.z)
        gate = jax.nn.sigmoid(z)
        # silu(z) = z σ(z), so its derivative is σ(z) (1 + z (1 - σ(z))).
        tile.set(r.dz, tile.get(r.d_out) * y * gate * (1 + z * (1 - gate)))


def _projections(
    r: ForwardRefs | BackwardRefs, layout: Layout, g: Int[Array, ""], i: int
) -> tuple[Registers, Registers]:
    """(B_t, C_t) of step i of group g, broadcast to all lanes."""
    rows = [entry_rows(layout, g, i, n) for n in range(layout.state_registers)]
    return [r.B_rows[x] for x in rows], [r.C_rows[x] for x in rows]


def _state_rows(layout: Layout, g: Int[Array, ""], i: int, k: int) -> Slice:
    """The index in `states` of step i of group g and the k-th register of a strip's state."""
    return pl.ds(pl.multiple_of(((g * GROUP + i) * layout.strip_registers + k) * SUBLANES, SUBLANES), SUBLANES)


def _biased_delta(r: ForwardRefs | BackwardRefs, tile: Tile) -> Float[Array, "16 128"]:
    """delta + delta_bias."""
    delta = tile.get(r.delta)
    return delta if r.delta_bias is None else delta + tile.vector(r.delta_bias)


def _discretize(r: ForwardRefs | BackwardRefs, layout: Layout, tile: Tile) -> None:
    """Writes Δ and Δ u to scratch: zeros beyond the end of the array, so that steps there leave the state unchanged."""
    delta = _biased_delta(r, tile)
    # Masked after the softplus, which is not zero at zero.
    step_size = tile.valid(_softplus(delta) if layout.delta_softplus else delta)
    tile.put(r.step_size, step_size)
    tile.put(r.drive, step_size * tile.get(r.u))


def _softplus(x: Float[Array, "16 128"]) -> Float[Array, "16 128"]:
    """softplus(x) by the formula of `jax.nn.softplus`, without its selection of NaN, which the sum passes on anyway."""
    # A power of 2 for the reason given at `A`; -log2 e also contains the sign, which would be an operation more.
    return jnp.maximum(x, 0.0) + jnp.log1p(jnp.exp2(-LOG2_E * jnp.abs(x)))
