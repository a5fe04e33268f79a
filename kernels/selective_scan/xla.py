"""The selective scan chunk by chunk in plain XLA: the CPU default, and correct on any backend.

The forward pass steps through time and keeps the state at each chunk's start. The backward pass recomputes a chunk's
decays and states from there, so that nothing of size (batch, length, d_inner, d_state) is ever in memory.

The work is cut into blocks of examples and channels whose state stays in a core's cache while time passes. Within a
block, axes are ordered (chunks, steps, batch, d_inner) for sequences and (batch, d_state, d_inner) for states: XLA
vectorises the last axis, and channels fill it better than the few entries of a state.
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
    D: Float[Array, "D"] | None = None,
    z: Float[Array, "B L D"] | None = None,
    delta_bias: Float[Array, "D"] | None = None,
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
    """The largest even cut whose state takes half of a 32 KiB first-level cache, and 32 steps of it.

    Measured on two Zen 4 cores: with states of 16 KiB the gradient takes a quarter less time than with 48 or 128 KiB,
    and chunks of fewer than 16 or more than 64 steps cost more.
    """
    max_state = 4096
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
    sizes = block_sizes(*u.shape, A.shape[1])
    by_batch, by_channels, by_both = _cut_inputs(sizes, u, step_size, A, B, C, initial_state)
    forward = functools.partial(_forward_block, reverse)
    y, h_end, h_starts = _map_blocks(forward, by_batch, by_channels, by_both)
    # Kept: the inputs, which live anyway, and one state a chunk. Recomputed: decays and states of every step.
    return (_join_sequence(y, u.shape[1]), _join_state(h_end)), (u, step_size, A, B, C, initial_state, h_starts)


def _scan_bwd(reverse, residuals, cotangents):
    *inputs, h_starts = residuals
    u, step_size, A, B, C, initial_state = inputs
    dy, d_final_state = cotangents
    length = u.shape[1]
    sizes = block_sizes(*u.shape, A.shape[1])
    by_batch, by_channels, by_both = _cut_inputs(sizes, *inputs)
    by_both += (h_starts, _cut_sequence(dy, sizes, sizes.d_inner), _cut_state(d_final_state, sizes))
    backward = functools.partial(_backward_block, reverse)
    du, d_step_size, dA, dB, dC, d_initial_state = _map_blocks(backward, by_batch, by_channels, by_both)
    gradients = (
        _join_sequence(du, length),
        _join_sequence(d_step_size, length),
        jnp.swapaxes(jnp.sum(dA, axis=0), 1, 2).reshape(A.shape),
        _join_sequence(jnp.sum(dB, axis=1, keepdims=True), length),
        _join_sequence(jnp.sum(dC, axis=1, keepdims=True), length),
        _join_state(d_initial_state),
    )
    return tuple(gradient.astype(x.dtype) for gradient, x in zip(gradients, inputs, strict=True))


_scan.defvjp(_scan_fwd, _scan_bwd)


def _forward_block(reverse, B, C, A, u, step_size, h):
    """Returns y, the last state, and the state before each chunk, (chunks, batch, d_state, d_inner)."""

    def step(h, inputs):
        u_t, step_size_t, B_t, C_t = inputs
        h = _decay(step_size_t, A) * h + (step_size_t * u_t)[:, None, :] * B_t[:, :, None]
        return h, _sum_states(h, C_t[:, :, None])

    def chunk(h, inputs):
        h_end, y = jax.lax.scan(step, h, inputs, reverse=reverse)
        return h_end, (y, h)

    h_end, (y, h_starts) = jax.lax.scan(chunk, h, (u, step_size, B, C), reverse=reverse)
    return y, h_end, h_starts


def _backward_block(reverse, B, C, A, u, step_size, h_first, h_starts, dy, d_h_end):
    """The adjoint recurrence of a block.

    Let carry_t be the loss's gradient by h_{t-1} through step t, and so carry_{t+1} + dy_t C_t that by h_t:

        carry_t     = exp(Δ_t A) (carry_{t+1} + dy_t C_t)
        dC_t        = Σ_d h_t dy_t
        dB_t        = Σ_d (carry_{t+1} + dy_t C_t) Δ_t u_t
        d(Δ_t u_t)  = Σ_n (carry_{t+1} + dy_t C_t) B_t
        d(Δ_t A)    = carry_t h_{t-1}

    A chunk stores h_t and carry_{t+1}, which line up in the last product too, shifted by a step: carry_{t+1} h_t. So no
    sum reads the decays, and the terms dy_t C_t need no sum over d_state times d_inner entries.
    """
    dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)  # float32 sums on TPU and GPU too

    def chunk(accumulated, inputs):
        carry, dA, h_all, carry_all = accumulated
        h_start, u, step_size, step_size_next, B, C, dy = inputs
        decay = _decay(step_size, A)
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
        dC = dot("tbnd,tbd->tbn", h_all, dy)
        dB = dot("tbnd,tbd->tbn", carry_all, drive) + C * dot("tbd,tbd->tb", dy, drive)[:, :, None]
        d_drive = dot("tbnd,tbn->tbd", carry_all, B) + dy * dot("tbn,tbn->tb", B, C)[:, :, None]
        d_step_size_next = _sum_states(carry_all, h_all, A[None, None])
        return (carry, dA, h_all, carry_all), (d_drive * step_size, d_drive * u, d_step_size_next, dB, dC)

    # A chunk's states live in the loop's carry because a scan would zero a new array for them each time.
    chunk_states = jnp.zeros((u.shape[1], *h_first.shape), h_first.dtype)
    inputs = (h_starts, u, step_size, _shift(step_size, jnp.zeros_like(step_size[0, 0]), -1 if reverse else 1), B, C, dy)
    accumulated = (d_h_end, jnp.zeros_like(h_first), chunk_states, chunk_states)
    (carry, dA, _, _), outputs = jax.lax.scan(chunk, accumulated, inputs, reverse=not reverse)
    du, d_step_size, d_step_size_next, dB, dC = outputs

    # The first step's product has no step before it to be computed in.
    first = (-1, -1) if reverse else (0, 0)
    dA = dA + carry * h_first * step_size[first][:, None, :]
    d_first = _sum_states(carry, h_first, A[None])
    d_step_size = d_step_size + _shift(d_step_size_next, d_first, 1 if reverse else -1)
    return du, d_step_size, jnp.sum(dA, axis=0), dB, dC, carry


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


def _shift(x, end, offset):
    """(chunks, steps, ...) with every step replaced by the one `offset`, 1 or -1, after it; `end` fills the gap."""
    by_step = x.reshape(-1, *x.shape[2:])
    parts = (by_step[1:], end[None]) if offset == 1 else (end[None], by_step[:-1])
    return jnp.concatenate(parts).reshape(x.shape)


def _map_blocks(function, by_batch, by_channels, by_both):
    """Maps function over the blocks, one at a time: outputs get the axes (batch blocks, channel blocks) in front."""

    def map_channels(inputs):
        by_batch, by_both = inputs
        return jax.lax.map(lambda inputs: function(*by_batch, *inputs[0], *inputs[1]), (by_channels, by_both))

    return jax.lax.map(map_channels, (by_batch, by_both))


def _cut_inputs(sizes, u, step_size, A, B, C, initial_state):
    """The blocks' inputs in the type of the computation: those that vary with the batch, the channels, and both."""
    u, A, B, C = (x.astype(step_size.dtype) for x in (u, A, B, C))
    d_inner, d_state = A.shape
    by_batch = tuple(_cut_sequence(x, sizes, d_state)[:, 0] for x in (B, C))
    by_channels = (jnp.swapaxes(A.reshape(-1, sizes.d_inner, d_state), 1, 2),)
    sequences = (_cut_sequence(x, sizes, sizes.d_inner) for x in (u, step_size))
    return by_batch, by_channels, (*sequences, _cut_state(initial_state, sizes))


def _cut_sequence(x, sizes, width):
    """(B, L, width of all blocks) to (batch blocks, width blocks, chunks, steps, batch, width).

    Padding at the end is zero, and a step of size zero leaves the state as it is.
    """
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % sizes.steps), (0, 0)))
    x = x.reshape(-1, sizes.batch, x.shape[1] // sizes.steps, sizes.steps, x.shape[2] // width, width)
    return x.transpose(0, 4, 2, 3, 1, 5)


def _join_sequence(x, length):
    """The inverse of `_cut_sequence`."""
    x = x.transpose(0, 4, 2, 3, 1, 5)
    batch_blocks, batch, chunks, steps, width_blocks, width = x.shape
    return x.reshape(batch_blocks * batch, chunks * steps, width_blocks * width)[:, :length]


def _cut_state(h, sizes):
    """(B, D, N) to (batch blocks, channel blocks, batch, N, channels)."""
    _, d_inner, d_state = h.shape
    h = h.reshape(-1, sizes.batch, d_inner // sizes.d_inner, sizes.d_inner, d_state)
    return h.transpose(0, 2, 1, 4, 3)


def _join_state(h):
    """The inverse of `_cut_state`."""
    h = h.transpose(0, 2, 1, 4, 3)
    batch_blocks, batch, channel_blocks, channels, d_state = h.shape
    return h.reshape(batch_blocks * batch, channel_blocks * channels, d_state)
