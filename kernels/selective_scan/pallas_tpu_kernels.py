"""The bodies of the TPU kernels: one chunk of time steps of one block of channels; see `pallas_tpu`.

`r` holds the references to blocks and scratch by name; an optional argument that is absent is None. Everything inside
is float32. States are lists with one (tiles, 128) array a state index.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

LANES, SUBLANES = 128, 8
# Sequences are read and written in tiles of 16 rows, the least that bfloat16 has.
ROWS = 16

LN2 = math.log(2)


def forward_kernel(r, layout):
    d_state, left = layout.d_state, _left(layout)

    @pl.when(pl.program_id(2) == 0)
    def _():
        r.final_state[...] = r.initial_state[...]

    if r.chunk_states is not None:
        r.chunk_states[0] = r.final_state[...]

    @functools.partial(_for_tiles, layout, left)
    def _(tile):
        _discretize(r, layout, tile)

    def group(g, h):
        h = list(h)
        for i in _in_order(layout.reverse):
            t = g * SUBLANES + i
            step_size, drive = (x[_step(layout, g, i)] for x in (r.step_size, r.drive))
            y = jnp.zeros_like(drive)
            for n in range(d_state):
                h[n] = jnp.exp2(step_size * r.A[0, n]) * h[n] + drive * _entry(layout, r.B, t, n)
                y = y + h[n] * _entry(layout, r.C, t, n)
            r.y_sum[_step(layout, g, i)] = y
        return h

    h = [r.final_state[0, 0, n] for n in range(d_state)]
    h = _for_groups(layout, group, h, layout.reverse)
    for n in range(d_state):
        r.final_state[0, 0, n] = h[n]

    @functools.partial(_for_tiles, layout, left)
    def _(tile):
        y = tile.take(r.y_sum)
        if r.D is not None:
            y = y + tile.vector(r.D) * tile.get(r.u)
        if r.z is not None:
            y = y * jax.nn.silu(tile.get(r.z))
        tile.set(r.y, y)


def backward_kernel(r, layout):
    """The adjoint recurrence; carry_t is the loss's gradient by h_t through the steps after t.

    g_t           = carry_t + dy_t C_t
    dC_t          = Σ_d h_t dy_t
    dB_t          = Σ_d g_t Δ_t u_t
    d(Δ_t u_t)    = Σ_n g_t B_t
    carry_{t-1}   = exp(Δ_t A) g_t
    d(Δ_t A)      = carry_{t-1} h_{t-1}
    """
    d_state, left = layout.d_state, _left(layout)

    @pl.when(pl.program_id(2) == 0)
    def _():
        r.d_initial_state[...] = r.d_final_state[...]
        for total in (r.dA, r.dD, r.d_delta_bias):
            if total is not None:
                total[...] = jnp.zeros_like(total)

    @functools.partial(_for_tiles, layout, left)
    def _(tile):
        _discretize(r, layout, tile)
        dy = tile.get(r.d_out)
        tile.put(r.dy, dy if r.z is None else dy * jax.nn.silu(tile.get(r.z)))

    h = [r.chunk_states[0, 0, 0, n] for n in range(d_state)]

    def recompute(g, h):
        h = list(h)
        for i in _in_order(layout.reverse):
            t = g * SUBLANES + i
            step_size, drive, dy = (x[_step(layout, g, i)] for x in (r.step_size, r.drive, r.dy))
            y = jnp.zeros_like(drive)
            for n in range(d_state):
                r.states[t, n] = h[n]
                h[n] = jnp.exp2(step_size * r.A[0, n]) * h[n] + drive * _entry(layout, r.B, t, n)
                r.products[_product(layout, i, n)] = h[n] * dy
                if r.z is not None:
                    y = y + h[n] * _entry(layout, r.C, t, n)
            if r.z is not None:
                r.y_sum[_step(layout, g, i)] = y
            _sum_channels(layout, r.products, r.dC_rows, g, i)
        return h

    _for_groups(layout, recompute, h, layout.reverse)

    # An index's operations stand together: with all indices of one operation together, registers do not suffice.
    def adjoint(g, carry):
        carry = list(carry)
        for i in _in_order(not layout.reverse):
            t = g * SUBLANES + i
            step_size, drive, dy = (x[_step(layout, g, i)] for x in (r.step_size, r.drive, r.dy))
            d_drive = d_step_size = jnp.zeros_like(dy)
            for n in range(d_state):
                dh = carry[n] + dy * _entry(layout, r.C, t, n)
                r.products[_product(layout, i, n)] = dh * drive
                d_drive = d_drive + dh * _entry(layout, r.B, t, n)
                carry[n] = jnp.exp2(step_size * r.A[0, n]) * dh
                d_exponent = carry[n] * r.states[t, n]
                d_step_size = d_step_size + d_exponent * r.A[0, n]
                r.dA[0, 0, n] += d_exponent * step_size
            r.d_drive[_step(layout, g, i)] = d_drive
            r.d_step_size[_step(layout, g, i)] = d_step_size
            _sum_channels(layout, r.products, r.dB_rows, g, i)
        return carry

    carry = [r.d_initial_state[0, 0, n] for n in range(d_state)]
    carry = _for_groups(layout, adjoint, carry, not layout.reverse)
    for n in range(d_state):
        r.d_initial_state[0, 0, n] = carry[n]

    @functools.partial(_for_tiles, layout, left)
    def _(tile):
        u, dy, d_drive = tile.get(r.u), tile.take(r.dy), tile.take(r.d_drive)
        du = d_drive * tile.take(r.step_size)
        if r.D is not None:
            du = du + tile.vector(r.D) * dy
            tile.add(r.dD, dy * u)
        tile.set(r.du, du)
        # The kernel's A is the A of the formula over ln 2, for exp2.
        d_delta = d_drive * u + LN2 * tile.take(r.d_step_size)
        if layout.delta_softplus:
            d_delta = d_delta * jax.nn.sigmoid(_biased_delta(r, tile))
        tile.set(r.d_delta, d_delta)
        if r.d_delta_bias is not None:
            tile.add(r.d_delta_bias, d_delta)
        if r.z is not None:
            y = tile.take(r.y_sum)
            if r.D is not None:
                y = y + tile.vector(r.D) * u
            z = tile.get(r.z)
            gate = jax.nn.sigmoid(z)
            tile.set(r.dz, tile.get(r.d_out) * y * gate * (1 + z * (1 - gate)))

    _add_lanes(r.dB_rows, r.dB)
    _add_lanes(r.dC_rows, r.dC)


class _Tile:
    """16 steps by 128 channels of the chunk: in blocks of sequences as they are, in scratch as two groups of steps."""

    def __init__(self, layout, left, pair, column):
        self._column = column
        starts = (pair * ROWS, column * LANES)
        self._left = [None if n is None else n - start for n, start in zip(left, starts, strict=True)]
        self._rows = pl.ds(pl.multiple_of(pair * ROWS, ROWS), ROWS)
        self._lanes = pl.ds(column * LANES, LANES)
        self._scratch = [
            pl.ds(pl.multiple_of(((2 * pair + half) * layout.tiles + column) * SUBLANES, SUBLANES), SUBLANES)
            for half in range(2)
        ]

    def get(self, block):
        """From a sequence; zeros beyond its end, where memory may hold anything."""
        return self.valid(block[0, self._rows, self._lanes].astype(jnp.float32))

    def set(self, block, x):
        block[0, self._rows, self._lanes] = x.astype(block.dtype)

    def take(self, scratch):
        return jnp.concatenate([scratch[rows] for rows in self._scratch])

    def put(self, scratch, x):
        for half, rows in enumerate(self._scratch):
            scratch[rows] = x[half * SUBLANES : (half + 1) * SUBLANES]

    def vector(self, block):
        """This tile's part of a vector with an entry for each channel."""
        return block[0, self._column : self._column + 1]

    def add(self, block, x):
        """Adds the sum over steps to a vector."""
        block[0, 0, self._column : self._column + 1] += jnp.sum(self.valid(x), axis=0, keepdims=True)

    def valid(self, x):
        for axis, left in enumerate(self._left):
            if left is not None:
                x = jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < left, x, 0.0)
        return x


def _left(layout):
    """How many steps and channels are left from the block's start on; None where blocks end with the sequence."""
    steps = layout.length - layout.chunk(pl.program_id(2)) * layout.steps
    channels = layout.d_inner - pl.program_id(1) * layout.channels
    return (
        steps if layout.length % layout.steps else None,
        channels if layout.d_inner % layout.channels else None,
    )


def _biased_delta(r, tile):
    delta = tile.get(r.delta)
    return delta if r.delta_bias is None else delta + tile.vector(r.delta_bias)


def _discretize(r, layout, tile):
    """Writes Δ and Δ u to scratch: zeros beyond the sequence's end, so that steps there change no state."""
    delta = _biased_delta(r, tile)
    step_size = tile.valid(jax.nn.softplus(delta) if layout.delta_softplus else delta)
    tile.put(r.step_size, step_size)
    tile.put(r.drive, step_size * tile.get(r.u))


def _for_tiles(layout, left, body):
    @pl.loop(0, layout.steps // ROWS)
    def _(pair):
        for column in range(layout.tiles):
            body(_Tile(layout, left, pair, column))


def _for_groups(layout, body, carry, reverse):
    """carry = body(g, carry) for each group of 8 steps."""
    groups = layout.steps // SUBLANES
    return jax.lax.fori_loop(0, groups, lambda k, carry: body(groups - 1 - k if reverse else k, carry), carry)


def _in_order(reverse):
    return range(SUBLANES)[:: -1 if reverse else 1]


def _step(layout, g, i):
    """Where scratch has the channels of step i in group g."""
    return pl.ds(g * SUBLANES * layout.tiles + i, layout.tiles, stride=SUBLANES), slice(None)


def _entry(layout, block, t, n):
    """The scalar B_t[n], or C_t[n]."""
    return block[0, 0, 0, t * layout.d_state + n]


def _product(layout, i, n):
    """Where scratch has the product, one of all channels, for state index n of step i in its group."""
    return pl.ds((i * layout.d_state + n) * SUBLANES, layout.tiles)


def _sum_channels(layout, products, sums, g, i):
    """Adds each product's tiles: a row of 128 partial sums over channels for each state index.

    Eight products come back from scratch transposed, by loads with a stride, so that whole registers are added.
    """
    for n in range(0, layout.d_state, SUBLANES):
        count = min(SUBLANES, layout.d_state - n)
        first = (i * layout.d_state + n) * SUBLANES
        transposed = (products[pl.ds(first + tile, count, stride=SUBLANES)] for tile in range(layout.tiles))
        row = pl.multiple_of((g * SUBLANES + i) * layout.padded_state + n, SUBLANES)
        sums[pl.ds(row, count)] = functools.reduce(jnp.add, transposed)


def _add_lanes(rows, sums):
    """Each of the rows' sums, 128 of them in a row of `sums`."""
    for k in range(rows.shape[0] // LANES):
        block = rows[k * LANES : (k + 1) * LANES]
        sums[0, 0, 0, k : k + 1] = jnp.sum(jnp.swapaxes(block, 0, 1), axis=0, keepdims=True)
