"""The selective scan chunk by chunk in plain XLA: the CPU default, and correct on any backend.

The forward pass steps through time and keeps the state at each chunk's start. The backward pass recomputes a chunk's
decays and states from there, so that nothing of size (batch, length, d_inner, d_state) is ever in memory.

The work is cut into blocks of examples and channels whose state stays in a core's cache while time passes. Inputs and
outputs keep their layout; a window of them is read, and written, at a time. In a window time comes first, and channels
are last in states too, (batch, d_state, d_inner): XLA vectorises the last axis, and channels fill it better than the
few entries of a state.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kernels.selective_scan.reference import compute_dtype, discretization_step, first_state, skip_and_gate
from kernels.typing import Array, Float


def selective_scan_xla(
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
) -> tuple[Float[Array, "B L D"], Float[Array, "B D N"]]:
    """Returns (y, final_state); see `selective_scan` for the formula and the arguments."""
    dtype = compute_dtype(u, delta, A, B, C)
    step_size = discretization_step(delta, delta_bias, delta_softplus, dtype)
    state = first_state(initial_state, u, A, dtype)
    if 0 in u.shape or 0 in A.shape:
        return skip_and_gate(jnp.zeros(u.shape, dtype), u, D, z), state
    y, final_state = _scan(reverse, u, step_size, A, B, C, state)
    return skip_and_gate(y, u, D, z), final_state


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How many examples, channels and time steps are worked on at once."""

    batch: int
    d_inner: int
    steps: int


def block_sizes(batch: int, length: int, d_inner: int, d_state: int) -> BlockSizes:
    """The largest even cut whose state stays under 24 KiB of a 32 KiB first-level cache, and 32 steps of it.

    Measured on two Zen 4 cores: from 12 to 48 KiB and from 16 to 64 steps the gradient's time varies by a tenth; with
    larger blocks it grows.
    """
    max_state = 6144
    d_block = _largest_divisor(d_inner, max_state // d_state)
    if d_block < 64:  # Too narrow for vector instructions to pay: rather leave the cache.
        d_block = d_inner
    chunks = -(-length // 32)
    return BlockSizes(
        batch=_largest_divisor(batch, max_state // (d_state * d_block)),
        d_inner=d_block,
        steps=-(-length // chunks),  # evenly, so that there is little padding
    )


def _largest_divisor(n, limit):
    return max(i for i in range(1, max(1, min(n, limit)) + 1) if n % i == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(reverse, u, step_size, A, B, C, initial_state):
    """The recurrence alone: (y, final_state) without skip, gate and softplus, in the type of step_size."""
    return _scan_fwd(reverse, u, step_size, A, B, C, initial_state)[0]


def _scan_fwd(reverse, u, step_size, A, B, C, initial_state):
    batch, length, d_inner = u.shape
    dtype = step_size.dtype
    sizes = block_sizes(batch, length, d_inner, A.shape[1])
    sequences = [_pad(x, sizes.steps) for x in (u, step_size, B, C)]
    A_t = A.astype(dtype).T

    def block(rows, columns, outputs):
        A_block = _read(A_t, None, columns)

        def step(h, inputs):
            u_t, step_size_t, B_t, C_t = inputs
            h = _decay(step_size_t, A_block) * h + (step_size_t * u_t)[:, None, :] * B_t[:, :, None]
            return h, _sum_states(h, C_t[:, :, None])

        def chunk(i, steps, loop):
            h, y, h_starts = loop
            u, step_size, B, C = sequences
            inputs = (
                _read_steps(u, rows, steps, columns, dtype),
                _read_steps(step_size, rows, steps, columns, dtype),
                _read_steps(B, rows, steps, None, dtype),
                _read_steps(C, rows, steps, None, dtype),
            )
            h_starts = _write(h_starts, h[None], (i, 1), rows, None, columns)
            h, y_chunk = jax.lax.scan(step, h, inputs, reverse=reverse)
            return h, _write_steps(y, y_chunk, rows, steps, columns), h_starts

        state, y, h_starts = outputs
        h = _read(state, rows, None, columns)
        h, y, h_starts = _for_chunks(chunks, sizes.steps, reverse, chunk, (h, y, h_starts))
        return _write(state, h, rows, None, columns), y, h_starts

    padded_length = sequences[0].shape[1]
    chunks = padded_length // sizes.steps
    state = jnp.swapaxes(initial_state, 1, 2)
    y = jnp.zeros((batch, padded_length, d_inner), dtype)
    h_starts = jnp.zeros((chunks, *state.shape), dtype)
    state, y, h_starts = _for_blocks(batch, d_inner, sizes, block, (state, y, h_starts))
    # Kept: the inputs, which live anyway, and one state a chunk. Recomputed: decays and states of every step.
    return (y[:, :length], jnp.swapaxes(state, 1, 2)), (u, step_size, A, B, C, initial_state, h_starts)


def _scan_bwd(reverse, residuals, cotangents):
    """The adjoint recurrence.

    Let carry_t be the loss's gradient by h_{t-1} through step t, and so carry_{t+1} + dy_t C_t that by h_t:

        carry_t     = exp(Δ_t A) (carry_{t+1} + dy_t C_t)
        dC_t        = Σ_d h_t dy_t
        dB_t        = Σ_d (carry_{t+1} + dy_t C_t) Δ_t u_t
        d(Δ_t u_t)  = Σ_n (carry_{t+1} + dy_t C_t) B_t
        d(Δ_t A)    = carry_t h_{t-1}

    A chunk stores h_t and carry_{t+1}. They line up in the last product too, shifted by a step: carry_{t+1} h_t. So no
    sum reads the decays, and the terms dy_t C_t need no sum over d_state times d_inner entries.
    """
    u, step_size, A, B, C, initial_state, h_starts = residuals
    dy, d_final_state = cotangents
    batch, length, d_inner = u.shape
    dtype = step_size.dtype
    sizes = block_sizes(batch, length, d_inner, A.shape[1])
    sequences = [_pad(x, sizes.steps) for x in (u, step_size, B, C, dy)]
    A_t = A.astype(dtype).T
    state = jnp.swapaxes(initial_state, 1, 2)
    dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)  # float32 sums on TPU and GPU too

    def block(rows, columns, outputs):
        A_block = _read(A_t, None, columns)

        def chunk(i, steps, loop):
            (carry, dA, step_size_end), (h_all, carry_all), (du, d_step_size, d_step_size_next, dB, dC) = loop
            u, step_size, B, C, dy = sequences
            u = _read_steps(u, rows, steps, columns, dtype)
            step_size = _read_steps(step_size, rows, steps, columns, dtype)
            B = _read_steps(B, rows, steps, None, dtype)
            C = _read_steps(C, rows, steps, None, dtype)
            dy = _read_steps(dy, rows, steps, columns, dtype)
            h_start = _read(h_starts, (i, 1), rows, None, columns)[0]
            step_size_next = _next_step(step_size, step_size_end, reverse)
            decay = _decay(step_size, A_block)
            drive = step_size * u

            def recompute(h, t):
                h = _at(decay, t) * h + _at(drive, t)[:, None, :] * _at(B, t)[:, :, None]
                return h, h

            def adjoint(accumulated, t):
                carry, dA = accumulated
                dA = dA + carry * _at(h_all, t) * _at(step_size_next, t)[:, None, :]
                return (_at(decay, t) * (carry + _at(dy, t)[:, None, :] * _at(C, t)[:, :, None]), dA), carry

            _, h_all = _loop_into(h_all, recompute, h_start, reverse)
            (carry, dA), carry_all = _loop_into(carry_all, adjoint, (carry, dA), not reverse)
            dC_block = dot("tbnd,tbd->tbn", h_all, dy)
            dB_block = dot("tbnd,tbd->tbn", carry_all, drive)
            d_drive = dot("tbnd,tbn->tbd", carry_all, B) + dy * dot("tbn,tbn->tb", B, C)[:, :, None]
            d_step_size_next_block = _sum_states(carry_all, h_all, A_block[None, None])
            sequence_outputs = (
                _write_steps(du, d_drive * step_size, rows, steps, columns),
                _write_steps(d_step_size, d_drive * u, rows, steps, columns),
                _write_steps(d_step_size_next, d_step_size_next_block, rows, steps, columns),
                _write_steps(dB, _read_steps(dB, rows, steps, None, dtype) + dB_block, rows, steps, None),
                _write_steps(dC, _read_steps(dC, rows, steps, None, dtype) + dC_block, rows, steps, None),
            )
            return (carry, dA, step_size[-1 if reverse else 0]), (h_all, carry_all), sequence_outputs

        d_state, dA_t, chunk_states, sequence_outputs = outputs
        carry = _read(d_state, rows, None, columns)
        loop = ((carry, jnp.zeros_like(carry), jnp.zeros_like(carry[:, 0])), chunk_states, sequence_outputs)
        loop = _for_chunks(chunks, sizes.steps, not reverse, chunk, loop)
        (carry, dA, step_size_first), chunk_states, sequence_outputs = loop
        # The first step's product has no step before it to be computed in.
        dA = dA + carry * _read(state, rows, None, columns) * step_size_first[:, None, :]
        dA_t = _write(dA_t, _read(dA_t, None, columns) + jnp.sum(dA, axis=0), None, columns)
        return _write(d_state, carry, rows, None, columns), dA_t, chunk_states, sequence_outputs

    padded_length = sequences[0].shape[1]
    chunks = padded_length // sizes.steps
    channels = jnp.zeros((batch, padded_length, d_inner), dtype)
    states = jnp.zeros((batch, padded_length, A.shape[1]), dtype)
    # A chunk's states live in the loops' carry because a scan would zero a new array for them each time.
    chunk_states = jnp.zeros((sizes.steps, sizes.batch, A.shape[1], sizes.d_inner), dtype)
    outputs = (
        jnp.swapaxes(d_final_state, 1, 2),
        jnp.zeros_like(A_t),
        (chunk_states, chunk_states),
        (channels.astype(u.dtype), channels, channels, states, states),
    )
    d_state, dA_t, _, outputs = _for_blocks(batch, d_inner, sizes, block, outputs)
    du, d_step_size, d_step_size_next, dB, dC = (x[:, :length] for x in outputs)
    # What sums no states is left for the end, where it is cheap.
    dB += C.astype(dtype) * jnp.sum(dy * step_size * u.astype(dtype), axis=2, keepdims=True)
    d_first = _sum_states(d_state, state, A_t[None])[:, None]
    if reverse:
        d_step_size += jnp.concatenate([d_step_size_next[:, 1:], d_first], axis=1)
    else:
        d_step_size += jnp.concatenate([d_first, d_step_size_next[:, :-1]], axis=1)
    gradients = (du, d_step_size, dA_t.T, dB, dC, jnp.swapaxes(d_state, 1, 2))
    inputs = (u, step_size, A, B, C, initial_state)
    return tuple(gradient.astype(x.dtype) for gradient, x in zip(gradients, inputs, strict=True))


_scan.defvjp(_scan_fwd, _scan_bwd)


def _decay(step_size, A):
    """exp(Δ A): (..., D) and (N, D) to (..., N, D)."""
    return jnp.exp(step_size[..., None, :] * A.reshape((1,) * (step_size.ndim - 1) + A.shape))


def _sum_states(*factors):
    """The factors' product, (..., N, D), summed over N in pairs.

    Written as additions because XLA's CPU backend hands such a reduction to a library routine that takes, at batch size
    1, longer than all the rest of a step. Slices come before products, which then need no memory of their own.
    """
    d_state = factors[0].shape[-2]
    slices = ([jax.lax.index_in_dim(x, n, -2, keepdims=False) for x in factors] for n in range(d_state))
    terms = [functools.reduce(jnp.multiply, factors_n) for factors_n in slices]
    while len(terms) > 1:
        odd = terms[-1:] if len(terms) % 2 else []
        terms = [a + b for a, b in zip(terms[0::2], terms[1::2], strict=False)] + odd
    return terms[0]


def _loop_into(buffer, step, carry, reverse):
    """`jax.lax.scan(step, carry, arange(len(buffer)))` that writes its outputs into buffer."""
    steps = buffer.shape[0]

    def body(i, loop):
        carry, buffer = loop
        t = steps - 1 - i if reverse else i
        carry, output = step(carry, t)
        return carry, jax.lax.dynamic_update_index_in_dim(buffer, output, t, 0, allow_negative_indices=False)

    return jax.lax.fori_loop(0, steps, body, (carry, buffer))


def _at(x, t):
    return jax.lax.dynamic_index_in_dim(x, t, 0, keepdims=False, allow_negative_indices=False)


def _next_step(x, end, reverse):
    """Each step of (steps, ...) replaced by the one that the scan takes after it, and the last one by `end`."""
    return jnp.concatenate([end[None], x[:-1]] if reverse else [x[1:], end[None]])


def _for_blocks(batch, d_inner, sizes, body, outputs):
    """Updates outputs by body(rows, columns, outputs) for every block of examples and channels."""
    channel_blocks = d_inner // sizes.d_inner

    def block(i, outputs):
        row, column = i // channel_blocks * sizes.batch, i % channel_blocks * sizes.d_inner
        return body((row, sizes.batch), (column, sizes.d_inner), outputs)

    return jax.lax.fori_loop(0, batch // sizes.batch * channel_blocks, block, outputs)


def _for_chunks(chunks, chunk_steps, reverse, body, loop):
    """Updates loop by body(i, steps, loop) for every chunk i."""

    def chunk(i, loop):
        i = chunks - 1 - i if reverse else i
        return body(i, (i * chunk_steps, chunk_steps), loop)

    return jax.lax.fori_loop(0, chunks, chunk, loop)


def _pad(x, steps):
    """(B, L, ...) to whole chunks with zeros at the end: a step of size zero leaves the state as it is."""
    padding = -x.shape[1] % steps
    return jnp.pad(x, ((0, 0), (0, padding), (0, 0))) if padding else x


def _read(x, *windows):
    """The part of x within windows, one an axis: (start, size), or None for the whole axis."""
    windows = [window or (0, size) for window, size in zip(windows, x.shape, strict=True)]
    starts, sizes = zip(*windows, strict=True)
    return jax.lax.dynamic_slice(x, starts, sizes, allow_negative_indices=False)


def _write(x, part, *windows):
    """x with its part within windows replaced."""
    starts = [window[0] if window else 0 for window in windows]
    return jax.lax.dynamic_update_slice(x, part.astype(x.dtype), starts, allow_negative_indices=False)


def _read_steps(x, rows, steps, columns, dtype):
    """A window of (B, L, ...) as (steps, batch, ...)."""
    return jnp.swapaxes(_read(x, rows, steps, columns), 0, 1).astype(dtype)


def _write_steps(x, part, rows, steps, columns):
    return _write(x, jnp.swapaxes(part, 0, 1), rows, steps, columns)
