"""The selective scan chunk by chunk in plain XLA: the CPU default, and correct on any backend.

The forward pass steps through time and keeps the state at each chunk's start. The backward pass recomputes a chunk's
decays and states from there, so that nothing of size (batch, length, d_inner, d_state) is ever in memory.

The work is cut into blocks of channels whose states stay in cache while time passes. Inputs and outputs keep their
layout: a window of some steps and channels is read, or written, at a time. It has time first, (steps, batch, d_inner),
and states have channels last, (batch, d_state, d_inner): XLA vectorises the last axis, and channels fill it better than
the few entries of a state. The batch stays whole, for it may be sharded over devices.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kernels.partition import vary_as
from kernels.selective_scan.reference import (
    batch_zeros,
    compute_dtype,
    discretization_step,
    first_state,
    skip_and_gate,
)
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
    y, final_state = _scan(reverse, u, step_size, vary_as(u, A), B, C, state)
    return skip_and_gate(y, u, D, z), final_state


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How many channels and time steps are worked on at once."""

    d_inner: int
    steps: int


def block_sizes(batch: int, length: int, d_inner: int, d_state: int) -> BlockSizes:
    """The most channels whose states take up to 96 KiB in float32, and the most steps whose states take 1.5 MiB.

    Measured on two Zen 4 cores, 1 MiB of second-level cache each: the gradient's time varies by a tenth from 12 to
    96 KiB and from 0.5 to 2 MiB, and grows beyond.
    """
    max_states, max_chunk_states = 24 * 1024, 384 * 1024
    # Blocks narrower than 64 channels would not fill vectors.
    widths = [n for n in _divisors(d_inner) if n >= min(64, d_inner)]
    width = max((n for n in widths if batch * d_state * n <= max_states), default=widths[0])
    max_steps = min(max(max_chunk_states // (batch * d_state * width), 8), 32)
    # Even chunks, without padding where a divisor is near.
    even_steps = -(-length // -(-length // max_steps))
    steps = max((n for n in _divisors(length) if max_steps // 2 <= n <= max_steps), default=even_steps)
    return BlockSizes(d_inner=width, steps=steps)


def _divisors(n):
    return [i for i in range(1, n + 1) if n % i == 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(reverse, u, step_size, A, B, C, initial_state):
    """The recurrence alone: (y, final_state) without skip, gate and softplus, in the type of step_size."""
    return _scan_fwd(reverse, u, step_size, A, B, C, initial_state)[0]


def _scan_fwd(reverse, u, step_size, A, B, C, initial_state):
    (batch, length, d_inner), d_state = u.shape, A.shape[1]
    dtype = step_size.dtype
    sizes = block_sizes(batch, length, d_inner, d_state)
    by_channel, by_state = _pad(sizes, u, step_size), _pad(sizes, B, C)
    padded_length = by_state[0].shape[1]
    A_t = A.astype(dtype).T

    def block(channels, outputs):
        A_block = _read(A_t, None, channels)

        def chunk(steps, loop):
            h, y, h_starts = loop
            u, step_size = (_read_steps(x, steps, channels, dtype) for x in by_channel)
            B, C = (_read_steps(x, steps, None, dtype) for x in by_state)
            h_starts = _write(h_starts, h[None], (steps[0] // sizes.steps, 1), None, None, channels)
            h, y_chunk = _forward_chunk(reverse, A_block, h, u, step_size, B, C)
            return h, _write_steps(y, y_chunk, steps, channels), h_starts

        state, y, h_starts = outputs
        h = _read(state, None, None, channels)
        h, y, h_starts = _for_windows(padded_length, sizes.steps, chunk, (h, y, h_starts), reverse)
        return _write(state, h, None, None, channels), y, h_starts

    state = jnp.swapaxes(initial_state, 1, 2)
    y = batch_zeros(u, (batch, padded_length, d_inner), dtype)
    h_starts = batch_zeros(u, (padded_length // sizes.steps, *state.shape), dtype, batch_axis=1)
    state, y, h_starts = _for_windows(d_inner, sizes.d_inner, block, (state, y, h_starts))
    # Kept: the inputs, which live anyway, and one state a chunk. Recomputed: decays and states of every step.
    return (y[:, :length], jnp.swapaxes(state, 1, 2)), (u, step_size, A, B, C, initial_state, h_starts)


def _scan_bwd(reverse, residuals, cotangents):
    *inputs, h_starts = residuals
    u, step_size, A, B, C, initial_state = inputs
    dy, d_final_state = cotangents
    (batch, length, d_inner), d_state = u.shape, A.shape[1]
    dtype = step_size.dtype
    sizes = block_sizes(batch, length, d_inner, d_state)
    by_channel, by_state = _pad(sizes, u, step_size, dy), _pad(sizes, B, C)
    padded_length = by_state[0].shape[1]
    A_t = A.astype(dtype).T

    def block(channels, outputs):
        A_block = _read(A_t, None, channels)

        def chunk(steps, loop):
            carried, buffers, d_by_channel, d_by_state = loop
            h_start = _read(h_starts, (steps[0] // sizes.steps, 1), None, None, channels)[0]
            u, step_size, dy = (_read_steps(x, steps, channels, dtype) for x in by_channel)
            B, C = (_read_steps(x, steps, None, dtype) for x in by_state)
            carried, buffers, gradients_by_channel, gradients_by_state = _backward_chunk(
                reverse, A_block, carried, buffers, h_start, u, step_size, B, C, dy
            )
            d_by_channel = [
                _write_steps(x, d, steps, channels) for x, d in zip(d_by_channel, gradients_by_channel, strict=True)
            ]
            # B and C serve every block of channels.
            d_by_state = [
                _write_steps(x, _read_steps(x, steps, None, dtype) + d, steps, None)
                for x, d in zip(d_by_state, gradients_by_state, strict=True)
            ]
            return carried, buffers, d_by_channel, d_by_state

        dh, dA, buffers, d_by_channel, d_by_state = outputs
        carry = _read(dh, None, None, channels)
        loop = ((carry, jnp.zeros_like(carry), jnp.zeros_like(carry[:, 0])), buffers, d_by_channel, d_by_state)
        loop = _for_windows(padded_length, sizes.steps, chunk, loop, not reverse)
        (carry, dA_block, _), buffers, d_by_channel, d_by_state = loop
        dh = _write(dh, carry, None, None, channels)
        return dh, _write(dA, dA_block, None, None, channels), buffers, d_by_channel, d_by_state

    # A chunk's states are a carry of all loops, because outputs of a scan would be new, zeroed arrays in each chunk.
    buffer = batch_zeros(u, (sizes.steps, batch, d_state, sizes.d_inner), dtype, batch_axis=1)
    sequence = batch_zeros(u, (batch, padded_length, d_inner), dtype)
    projection = batch_zeros(u, (batch, padded_length, d_state), dtype)
    outputs = (
        jnp.swapaxes(d_final_state, 1, 2),
        batch_zeros(u, (batch, d_state, d_inner), dtype),
        (buffer, buffer),
        [sequence.astype(u.dtype), sequence, sequence],
        [projection, projection],
    )
    dh, dA, _, d_by_channel, d_by_state = _for_windows(d_inner, sizes.d_inner, block, outputs)
    du, d_step_size, d_step_size_next = (x[:, :length] for x in d_by_channel)
    dB, dC = (x[:, :length] for x in d_by_state)

    # What no chunk has: the first step's d(Δ_t A), and the sum over all channels of dy_t Δ_t u_t.
    state = jnp.swapaxes(initial_state, 1, 2)
    first = -1 if reverse else 0
    step_size_padded = by_channel[1]
    dA = jnp.sum(dA + dh * state * step_size_padded[:, first, None, :], axis=0).T
    d_first = _sum_states(dh, state, A_t[None])[:, None]
    if reverse:
        d_step_size += jnp.concatenate([d_step_size_next[:, 1:], d_first], axis=1)
    else:
        d_step_size += jnp.concatenate([d_first, d_step_size_next[:, :-1]], axis=1)
    dB += C.astype(dtype) * jnp.sum(dy * step_size * u.astype(dtype), axis=2, keepdims=True)
    gradients = (du, d_step_size, dA, dB, dC, jnp.swapaxes(dh, 1, 2))
    return tuple(gradient.astype(x.dtype) for gradient, x in zip(gradients, inputs, strict=True))


_scan.defvjp(_scan_fwd, _scan_bwd)


def _forward_chunk(reverse, A, h, u, step_size, B, C):
    """Returns the state after the chunk and y.

    The decays of all steps come first, since XLA shares that among the CPU's cores, and single steps are too short to.
    """

    def step(h, inputs):
        decay_t, drive_t, B_t, C_t = inputs
        h = decay_t * h + drive_t[:, None, :] * B_t[:, :, None]
        return h, _sum_states(h, C_t[:, :, None])

    return jax.lax.scan(step, h, (_decay(step_size, A), step_size * u, B, C), reverse=reverse)


def _backward_chunk(reverse, A, carried, buffers, h_start, u, step_size, B, C, dy):
    """The adjoint recurrence from a chunk's last step to its first.

    Let carry_t be the loss's gradient by h_{t-1} through step t, and so carry_{t+1} + dy_t C_t that by h_t:

        carry_t     = exp(Δ_t A) (carry_{t+1} + dy_t C_t)
        dC_t        = Σ_d h_t dy_t
        dB_t        = Σ_d (carry_{t+1} + dy_t C_t) Δ_t u_t
        d(Δ_t u_t)  = Σ_n (carry_{t+1} + dy_t C_t) B_t
        d(Δ_t A)    = carry_t h_{t-1}

    The chunk stores h_t and carry_{t+1}. They line up in the last product too, one step on: carry_{t+1} h_t. So no sum
    reads the decays, and the terms dy_t C_t need no sum over states of channels.

    Args:
      carried: carry, dA so far, and the step size after the chunk's last step; returned for the chunk before.
      buffers: two arrays (steps, batch, d_state, d_inner) to be written over.

    Returns:
      carried, buffers, the gradients by u, Δ_t through Δ_t u_t, and Δ_{t+1} through Δ_{t+1} A, and those by B and C: dB
      without Σ_d dy_t Δ_t u_t C_t.
    """
    carry, dA, step_size_end = carried
    h_all, carry_all = buffers
    decay = _decay(step_size, A)
    drive = step_size * u
    if reverse:
        step_size_next = jnp.concatenate([step_size_end[None], step_size[:-1]])
    else:
        step_size_next = jnp.concatenate([step_size[1:], step_size_end[None]])

    def recompute(h, t):
        h = _at(decay, t) * h + _at(drive, t)[:, None, :] * _at(B, t)[:, :, None]
        return h, h

    def adjoint(accumulated, t):
        carry, dA = accumulated
        dA = dA + carry * _at(h_all, t) * _at(step_size_next, t)[:, None, :]
        return (_at(decay, t) * (carry + _at(dy, t)[:, None, :] * _at(C, t)[:, :, None]), dA), carry

    _, h_all = _loop_into(h_all, recompute, h_start, reverse)
    (carry, dA), carry_all = _loop_into(carry_all, adjoint, (carry, dA), not reverse)
    dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)  # float32 sums on TPU and GPU too
    dC = dot("tbnd,tbd->tbn", h_all, dy)
    dB = dot("tbnd,tbd->tbn", carry_all, drive)
    d_drive = dot("tbnd,tbn->tbd", carry_all, B) + dy * dot("tbn,tbn->tb", B, C)[:, :, None]
    d_step_size_next = _sum_states(carry_all, h_all, A[None, None])
    carried = (carry, dA, step_size[-1 if reverse else 0])
    return carried, (h_all, carry_all), (d_drive * step_size, d_drive * u, d_step_size_next), (dB, dC)


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


def _for_windows(total, size, body, carry, reverse=False):
    """carry = body((start, size), carry) for each window of size along an axis of total entries, or from the last."""
    count = total // size

    def window(i, carry):
        return body(((count - 1 - i if reverse else i) * size, size), carry)

    return jax.lax.fori_loop(0, count, window, carry)


def _pad(sizes, *sequences):
    """(B, L, ...) to whole chunks with zeros at the end: a step of size zero leaves the state as it is."""
    padding = -sequences[0].shape[1] % sizes.steps
    return [jnp.pad(x, ((0, 0), (0, padding), (0, 0))) if padding else x for x in sequences]


def _read(x, *windows):
    """The part of x within windows, one an axis: (start, size), or None for all of it."""
    windows = [window or (0, size) for window, size in zip(windows, x.shape, strict=True)]
    starts, sizes = zip(*windows, strict=True)
    return jax.lax.dynamic_slice(x, starts, sizes, allow_negative_indices=False)


def _write(x, part, *windows):
    """x with its part within windows replaced."""
    starts = [window[0] if window else 0 for window in windows]
    return jax.lax.dynamic_update_slice(x, part.astype(x.dtype), starts, allow_negative_indices=False)


def _read_steps(x, steps, channels, dtype):
    """A window of (B, L, ...), as (steps, batch, ...)."""
    return jnp.swapaxes(_read(x, None, steps, channels), 0, 1).astype(dtype)


def _write_steps(x, part, steps, channels):
    return _write(x, jnp.swapaxes(part, 0, 1), None, steps, channels)
