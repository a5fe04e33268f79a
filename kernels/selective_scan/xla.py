"""The selective scan chunk by chunk in plain XLA: the CPU default, and correct on any backend.

The forward pass steps through time and keeps the state at each chunk's start. The backward pass recomputes a chunk's
decays and states from there, so that nothing of size (batch, length, d_inner, d_state) is ever in memory.

Inside, time comes first and channels last: sequences are (L, B, D), states (B, N, D). XLA vectorises the last axis, and
channels fill it better than the few entries of a state.
"""

import functools

import jax
import jax.numpy as jnp

from kernels.selective_scan.reference import compute_dtype, discretization_step, first_state, skip_and_gate
from kernels.typing import Array, Float

# Chunks beyond these lengths gain nothing: short ones pay for a chunk's start, long ones for compile time, since sums
# over a chunk are unrolled.
_MIN_CHUNK, _MAX_CHUNK = 8, 32
# The backward pass streams three arrays of a chunk's states; 2 MiB each keeps them in a desktop's last-level cache.
_CHUNK_BYTES = 2 * 2**20


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
    if u.shape[1] == 0:
        return skip_and_gate(jnp.zeros(u.shape, dtype), u, D, z), state
    y, final_state = _scan(reverse, u, step_size, A, B, C, state)
    return skip_and_gate(y, u, D, z), final_state


def chunk_length(length: int, state_bytes: int) -> int:
    """Steps a chunk: the power of two whose states fill the cache's share, but no more than the sequence needs."""
    steps = _MIN_CHUNK
    while steps < _MAX_CHUNK and steps < length and 2 * steps * state_bytes <= _CHUNK_BYTES:
        steps *= 2
    return steps


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(reverse, u, step_size, A, B, C, initial_state):
    """The recurrence alone: (y, final_state) without skip, gate and softplus, in the type of step_size."""
    (y, final_state), _ = _scan_fwd(reverse, u, step_size, A, B, C, initial_state)
    return y, final_state


def _scan_fwd(reverse, u, step_size, A, B, C, initial_state):
    batch, length, d_inner = u.shape
    dtype = step_size.dtype
    steps = chunk_length(length, initial_state.size * dtype.itemsize)
    A_t = A.astype(dtype).T  # (N, D)
    to_chunks = functools.partial(_to_chunks, steps=steps, dtype=dtype)

    def step(h, inputs):
        drive_t, step_size_t, B_t, C_t = inputs
        h = _decay(step_size_t, A_t) * h + drive_t[:, None, :] * B_t[:, :, None]
        return h, _sum_states(h * C_t[:, :, None])

    def chunk(h, inputs):
        h_end, y = jax.lax.scan(step, h, inputs, reverse=reverse)
        return h_end, (y, h)

    inputs = (to_chunks(step_size * u.astype(dtype)), *map(to_chunks, (step_size, B, C)))
    h_end, (y, h_starts) = jax.lax.scan(chunk, jnp.swapaxes(initial_state, 1, 2), inputs, reverse=reverse)
    # Kept: the inputs, which live anyway, and one state a chunk. Recomputed: decays and states of every step.
    residuals = (u, step_size, A, B, C, initial_state, h_starts)
    return (_from_chunks(y, length), jnp.swapaxes(h_end, 1, 2)), residuals


def _scan_bwd(reverse, residuals, cotangents):
    """The adjoint recurrence, with carry_t the loss's gradient by h_{t-1} through step t alone, and g_t that by h_t:

        g_t = carry_{t+1} + dy_t C_t          carry_t = exp(Δ_t A) g_t
        dC_t = Σ_d h_t dy_t                   dB_t = Σ_d g_t Δ_t u_t
        d(Δ_t u_t) = Σ_n g_t B_t              d(Δ_t A) = carry_t h_{t-1}

    A chunk keeps h_t and carry_{t+1}, both known when step t is done, and gets the last product for step t+1. So
    neither g nor the decays are needed once more, and g's other term, which has no sum of its own, is added at the end.
    """
    u, step_size, A, B, C, initial_state, h_starts = residuals
    dy, d_final_state = cotangents
    batch, length, d_inner = u.shape
    d_state = A.shape[1]
    dtype = step_size.dtype
    _, steps = h_starts.shape[0], chunk_length(length, initial_state.size * dtype.itemsize)
    A_t = A.astype(dtype).T
    to_chunks = functools.partial(_to_chunks, steps=steps, dtype=dtype)

    drive = step_size * u.astype(dtype)
    dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def chunk(accumulated, inputs):
        carry, dA, h_all, carry_all = accumulated
        h_start, step_size, step_size_next, drive, B, C, dy = inputs
        decay = _decay(step_size, A_t)

        def recompute(h, t):
            h = decay[t] * h + drive[t][:, None, :] * B[t][:, :, None]
            return h, h

        def adjoint(carry, t):
            return decay[t] * (carry + dy[t][:, None, :] * C[t][:, :, None]), carry

        _, h_all = _loop_into(h_all, recompute, h_start, reverse)
        carry, carry_all = _loop_into(carry_all, adjoint, carry, not reverse)
        dC = dot("tbnd,tbd->tbn", h_all, dy)
        dB = dot("tbnd,tbd->tbn", carry_all, drive)
        d_drive = dot("tbnd,tbn->tbd", carry_all, B)
        d_exponent = carry_all * h_all
        d_step_size_next = _sum_states(d_exponent * A_t[None, None])
        dA = dA + _sum_pairwise(list(d_exponent * step_size_next[:, :, None, :]))
        return (carry, dA, h_all, carry_all), (d_drive, d_step_size_next, dB, dC)

    step_size_next = _shift(step_size, jnp.zeros_like(step_size[:, :1]), forward=reverse)
    inputs = (h_starts, *map(to_chunks, (step_size, step_size_next, drive, B, C, dy)))
    zeros = jnp.zeros((batch, d_state, d_inner), dtype)
    # A chunk's states and carries live in the loop's own carry, because a scan's fresh outputs are zeroed each time.
    scratch = jnp.zeros((steps, *zeros.shape), dtype)
    accumulated = (jnp.swapaxes(d_final_state, 1, 2), zeros, scratch, scratch)
    (carry, dA, _, _), outputs = jax.lax.scan(chunk, accumulated, inputs, reverse=not reverse)
    d_drive, d_step_size_next, dB, dC = (_from_chunks(x, length) for x in outputs)

    first = slice(-1, None) if reverse else slice(0, 1)
    d_exponent = carry * jnp.swapaxes(initial_state, 1, 2)
    dA = jnp.sum(dA + d_exponent * step_size[:, first], axis=0)
    d_step_size = _shift(d_step_size_next, _sum_states(d_exponent * A_t[None])[:, None], forward=not reverse)

    dB = dB + C.astype(dtype) * dot("bld,bld->bl", dy, drive)[..., None]
    d_drive = d_drive + dy * dot("bln,bln->bl", B.astype(dtype), C.astype(dtype))[..., None]
    du = d_drive * step_size
    d_step_size = d_step_size + d_drive * u.astype(dtype)
    d_initial_state = jnp.swapaxes(carry, 1, 2)
    gradients = (du, d_step_size, dA.T, dB, dC, d_initial_state)
    return tuple(d.astype(x.dtype) for d, x in zip(gradients, (u, step_size, A, B, C, initial_state), strict=True))


_scan.defvjp(_scan_fwd, _scan_bwd)


def _decay(step_size, A_t):
    """exp(Δ A): (..., D) and (N, D) to (..., N, D)."""
    return jnp.exp(step_size[..., None, :] * A_t.reshape((1,) * (step_size.ndim - 1) + A_t.shape))


def _sum_states(x):
    """Sums (..., N, D) over N.

    Written as additions because XLA's CPU backend hands a reduction of this shape to a library routine that, at batch
    size 1, takes longer than all the rest of the step.
    """
    return _sum_pairwise([x[..., n, :] for n in range(x.shape[-2])])


def _sum_pairwise(terms):
    while len(terms) > 1:
        odd = terms[-1:] if len(terms) % 2 else []
        terms = [a + b for a, b in zip(terms[0::2], terms[1::2])] + odd
    return terms[0]


def _loop_into(buffer, step, carry, reverse):
    """`jax.lax.scan(step, carry, arange(len(buffer)))` that writes its outputs into buffer."""
    steps = buffer.shape[0]

    def body(i, loop):
        carry, buffer = loop
        t = steps - 1 - i if reverse else i
        carry, output = step(carry, t)
        return carry, jax.lax.dynamic_update_index_in_dim(buffer, output, t, 0)

    return jax.lax.fori_loop(0, steps, body, (carry, buffer))


def _shift(x, end, forward):
    """x moved by one along its axis 1, forward or back, with `end` in the place that falls free."""
    return jnp.concatenate([end, x[:, :-1]] if forward else [x[:, 1:], end], axis=1)


def _to_chunks(x, steps, dtype):
    """(B, L, ...) to (chunks, steps, B, ...). Padding is zero, and a step of size zero leaves the state as it is."""
    batch, length, width = x.shape
    x = jnp.pad(x.astype(dtype), ((0, 0), (0, -length % steps), (0, 0)))
    return jnp.moveaxis(x, 1, 0).reshape(-1, steps, batch, width)


def _from_chunks(x, length):
    """(chunks, steps, B, ...) to (B, L, ...), without the padding."""
    return jnp.moveaxis(x.reshape(-1, *x.shape[2:])[:length], 0, 1)
