"""The bodies of the TPU kernels: one chunk of time steps of one block of channels; see `pallas_tpu`.

Each body has three parts: a loop over tiles that prepares inputs in scratch, loops over groups of 8 steps with the
recurrence, and a loop over tiles that finishes and writes the outputs. The loops over tiles do all work that is
elementwise in steps and channels, on full registers and with masks for ragged edges. The recurrence then reads scratch
without masks. Everything inside is float32, because it accumulates over the sequence, and because the vector units of
TPUs before v6e compute in float32 only.

A state, and any other array with an entry per state index and channel, is a list with one (tiles, 128) array, at most
one register, per state index. Loops over the list and over the steps of a group are unrolled at trace time.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ..typing import Array, Float, Int, Ref
from .pallas_tpu_layout import SUBLANES, Layout
from .pallas_tpu_tiles import (
    Tile,
    add_lanes,
    entry,
    for_groups,
    for_tiles,
    in_order,
    product_rows,
    remaining_entries,
    step_rows,
    sum_channels,
)

LN2 = math.log(2)
State = list[Float[Array, "tiles 128"]]


# Block shapes are those of `Layout.operands`: sequence (1, steps, channels), projection (1, 1, 1, steps * d_state),
# state (1, 1, d_state, tiles, 128), matrix (1, d_state, tiles, 128), vector (1, tiles, 128). Optional arguments that
# are absent are None.
@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardRefs:
    """The references of one program of the forward kernel."""

    # Inputs.
    u: Ref  # sequence, VMEM, in the caller's dtype
    delta: Ref  # sequence, VMEM
    z: Ref | None = None  # sequence, VMEM
    A: Ref  # matrix, VMEM, multiplied by log2 e
    B: Ref  # projection, SMEM
    C: Ref  # projection, SMEM
    D: Ref | None = None  # vector, VMEM
    delta_bias: Ref | None = None  # vector, VMEM
    initial_state: Ref  # state, VMEM
    # Outputs.
    y: Ref  # sequence, VMEM
    final_state: Ref  # state, VMEM: the running state, from chunk to chunk
    chunk_states: Ref | None = None  # (1, 1, 1, d_state, tiles, 128), VMEM: absent without a gradient
    # Scratch, (steps * tiles, 128) float32 in VMEM, in the order that `pallas_tpu_layout` describes.
    step_size: Ref  # Δ
    drive: Ref  # Δ u
    y_sum: Ref  # Σ_n C_n h_n


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardRefs:
    """The references of one program of the backward kernel."""

    # Inputs.
    u: Ref  # sequence, VMEM, in the caller's dtype
    delta: Ref  # sequence, VMEM
    z: Ref | None = None  # sequence, VMEM
    d_out: Ref  # sequence, VMEM: the gradient of the output y
    A: Ref  # matrix, VMEM, multiplied by log2 e
    B: Ref  # projection, SMEM
    C: Ref  # projection, SMEM
    D: Ref | None = None  # vector, VMEM
    delta_bias: Ref | None = None  # vector, VMEM
    chunk_states: Ref  # (1, 1, 1, d_state, tiles, 128), VMEM: the state before the chunk's first scanned step
    d_final_state: Ref  # state, VMEM
    # Outputs. Those that the chunks share (dA, dD, d_delta_bias, d_initial_state) stay in VMEM between them.
    du: Ref  # sequence, VMEM
    d_delta: Ref  # sequence, VMEM
    dz: Ref | None = None  # sequence, VMEM
    dA: Ref  # state, VMEM
    dB: Ref  # (1, 1, 1, steps * padded_state / 128, 128), VMEM: sums over the block's channels
    dC: Ref  # as dB
    d_initial_state: Ref  # state, VMEM: the running carry, from chunk to chunk
    dD: Ref | None = None  # (1, 1, tiles, 128), VMEM
    d_delta_bias: Ref | None = None  # (1, 1, tiles, 128), VMEM
    # Scratch, float32 in VMEM. The first six are stored like those of `ForwardRefs`. y_sum is present if z is.
    step_size: Ref  # Δ
    drive: Ref  # Δ u
    dy: Ref  # the gradient of the gate's input, d_out silu(z)
    d_drive: Ref  # the gradient of Δ u
    d_step_size: Ref  # the gradient of Δ through Δ A, divided by ln 2
    y_sum: Ref | None = None  # Σ_n C_n h_n
    dB_rows: Ref  # (steps * padded_state, 128): partial sums of dB over channels
    dC_rows: Ref  # the same of dC
    states: Ref  # (steps, d_state, tiles, 128): the state before each step
    products: Ref  # (8 * d_state * 8, 128): terms of dB or dC, for the 8 steps of a group


def forward_kernel(r: ForwardRefs, layout: Layout) -> None:
    """Scans one chunk: writes y, and replaces the state before the chunk in `final_state` by the state after it."""
    d_state, remaining = layout.d_state, remaining_entries(layout)

    # Chunks are visited in the order of the scan: chunk number 0 of the pass holds the first scanned step.
    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        r.final_state[...] = r.initial_state[...]

    if r.chunk_states is not None:
        r.chunk_states[0] = r.final_state[...]

    @functools.partial(for_tiles, layout, remaining)
    def _(tile: Tile) -> None:
        _discretize(r, layout, tile)

    # The carry of the loop is the state, in registers: with 16 state indices, 16 of the 64 that a TPU core has.
    def group(g: Int[Array, ""], h: State) -> State:
        h = list(h)
        for i in in_order(layout.reverse):
            t = g * SUBLANES + i
            step_size, drive = (x[step_rows(layout, g, i)] for x in (r.step_size, r.drive))
            y = jnp.zeros_like(drive)
            for n in range(d_state):
                h[n] = jnp.exp2(step_size * r.A[0, n]) * h[n] + drive * entry(layout, r.B, t, n)
                y = y + h[n] * entry(layout, r.C, t, n)
            r.y_sum[step_rows(layout, g, i)] = y
        return h

    h = [r.final_state[0, 0, n] for n in range(d_state)]
    h = for_groups(layout, group, h, layout.reverse)
    for n in range(d_state):
        r.final_state[0, 0, n] = h[n]

    # Skip and gate read u and z in tiles, the form in which they arrive, so they come after the recurrence.
    @functools.partial(for_tiles, layout, remaining)
    def _(tile: Tile) -> None:
        y = tile.take(r.y_sum)
        if r.D is not None:
            y = y + tile.vector(r.D) * tile.get(r.u)
        if r.z is not None:
            y = y * jax.nn.silu(tile.get(r.z))
        tile.set(r.y, y)


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
    d_state, remaining = layout.d_state, remaining_entries(layout)

    # Chunk number 0 of this pass holds the last scanned step.
    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        r.d_initial_state[...] = r.d_final_state[...]
        for total in (r.dA, r.dD, r.d_delta_bias):
            if total is not None:
                total[...] = jnp.zeros(total.shape, total.dtype)

    # Steps and channels beyond the end have Δ = 0 and dy = 0, so the loops over steps below change nothing there.
    @functools.partial(for_tiles, layout, remaining)
    def _(tile: Tile) -> None:
        _discretize(r, layout, tile)
        dy = tile.get(r.d_out)
        tile.put(r.dy, dy if r.z is None else dy * jax.nn.silu(tile.get(r.z)))

    h = [r.chunk_states[0, 0, 0, n] for n in range(d_state)]

    def recompute(g: Int[Array, ""], h: State) -> State:
        h = list(h)
        for i in in_order(layout.reverse):
            t = g * SUBLANES + i
            step_size, drive, dy = (x[step_rows(layout, g, i)] for x in (r.step_size, r.drive, r.dy))
            y = jnp.zeros_like(drive)
            for n in range(d_state):
                # The state before the step: the adjoint multiplies it with the carry. dC needs the state after it,
                # which is here, and so is computed in this loop.
                r.states[t, n] = h[n]
                h[n] = jnp.exp2(step_size * r.A[0, n]) * h[n] + drive * entry(layout, r.B, t, n)
                r.products[product_rows(layout, i, n)] = h[n] * dy
                if r.y_sum is not None:
                    y = y + h[n] * entry(layout, r.C, t, n)
            if r.y_sum is not None:
                r.y_sum[step_rows(layout, g, i)] = y
            sum_channels(layout, r.products, r.dC_rows, g, i)
        return h

    for_groups(layout, recompute, h, layout.reverse)

    # All operations of one state index stand together. In the other order, with one operation for all state indices
    # before the next, the intermediate values of all indices are alive at once and exceed the 64 registers.
    def adjoint(g: Int[Array, ""], carry: State) -> State:
        carry = list(carry)
        for i in in_order(not layout.reverse):
            t = g * SUBLANES + i
            step_size, drive, dy = (x[step_rows(layout, g, i)] for x in (r.step_size, r.drive, r.dy))
            d_drive = d_step_size = jnp.zeros_like(dy)
            for n in range(d_state):
                dh = carry[n] + dy * entry(layout, r.C, t, n)
                r.products[product_rows(layout, i, n)] = dh * drive
                d_drive = d_drive + dh * entry(layout, r.B, t, n)
                # The decay is computed again: loading it would take the memory of the states once more.
                carry[n] = jnp.exp2(step_size * r.A[0, n]) * dh
                d_exponent = carry[n] * r.states[t, n]
                d_step_size = d_step_size + d_exponent * r.A[0, n]
                r.dA[0, 0, n] += d_exponent * step_size
            r.d_drive[step_rows(layout, g, i)] = d_drive
            r.d_step_size[step_rows(layout, g, i)] = d_step_size
            sum_channels(layout, r.products, r.dB_rows, g, i)
        return carry

    carry = [r.d_initial_state[0, 0, n] for n in range(d_state)]
    carry = for_groups(layout, adjoint, carry, not layout.reverse)
    for n in range(d_state):
        r.d_initial_state[0, 0, n] = carry[n]

    # From the gradients of Δ and Δ u to those of the arguments: elementwise, by tiles.
    @functools.partial(for_tiles, layout, remaining)
    def _(tile: Tile) -> None:
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

    add_lanes(r.dB_rows, r.dB)
    add_lanes(r.dC_rows, r.dC)


def _biased_delta(r: ForwardRefs | BackwardRefs, tile: Tile) -> Float[Array, "16 128"]:
    """delta + delta_bias."""
    delta = tile.get(r.delta)
    return delta if r.delta_bias is None else delta + tile.vector(r.delta_bias)


def _discretize(r: ForwardRefs | BackwardRefs, layout: Layout, tile: Tile) -> None:
    """Writes Δ and Δ u to scratch: zeros beyond the end of the array, so that steps there leave the state unchanged."""
    delta = _biased_delta(r, tile)
    # Masked after the softplus, which is not zero at zero.
    step_size = tile.valid(jax.nn.softplus(delta) if layout.delta_softplus else delta)
    tile.put(r.step_size, step_size)
    tile.put(r.drive, step_size * tile.get(r.u))
