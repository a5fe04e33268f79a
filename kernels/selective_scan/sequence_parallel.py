"""The selective scan of a sequence whose parts lie on the devices of a mesh axis; for use inside `jax.shard_map`.

The recurrence is linear: steps with step sizes Δ_t take the state h before them to exp(A ΣΔ) h + s, where s is their
last state from a zero start. So devices tell each other s, (B, D, N), and ΣΔ, (B, D), whatever the sequence's length.
Each folds those of the parts before its own into the state that its part starts from, and scans its part by one of the
implementations of `selective_scan`. The gradient by states is as linear, and goes through the parts the other way.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kernels.partition import SEQUENCE_AXIS, vary_as
from kernels.selective_scan.api import check_arguments, selective_scan
from kernels.selective_scan.reference import (
    batch_zeros,
    compute_dtype,
    discretization_step,
    first_state,
)
from kernels.typing import Array, Bool, Float

# Steps of one turn of the loop over time. XLA's CPU backend shares sixteen among its cores, and takes a sixth of the
# time of two, four or eight (1,024 steps, 768 channels, 16 states, batch 2).
UNROLLED_STEPS = 16


def sequence_parallel_scan(
    u: Float[Array, "B L D"],
    delta: Float[Array, "B L D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B L N"],
    C: Float[Array, "B L N"],
    D: Float[Array, " D"] | None = None,
    z: Float[Array, "B L D"] | None = None,
    delta_bias: Float[Array, " D"] | None = None,
    *,
    axis_name: str = SEQUENCE_AXIS,
    delta_softplus: bool = False,
    reverse: bool = False,
    parts_reversed: bool | Bool[Array, ""] | None = None,
    initial_state: Float[Array, "B D N"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B L D"], Float[Array, "B D N"]]:
    """Returns (y, final_state) of this device's part of the sequence, of length L; see `selective_scan` for the rest.

    All devices of the axis call this, each with a part of the same length. Differentiable in every array argument. A
    parameter or initial state that is whole on all devices has its gradient summed over them by `jax.shard_map`.

    Args:
      axis_name: of the mesh; of type manual, since the function is for the inside of a `jax.shard_map`.
      reverse: scan each part from its last token to its first.
      parts_reversed: the last device's part comes first, and the first one's last; by default as `reverse`. It may be
        traced, but has to be the same on all devices.
      initial_state: the state before the first token of the whole sequence, the same on all devices.

    Returns:
      y, of u's shape and type, and the state after the part's last scanned token, in the type of the computation.

    Raises:
      ValueError, NotImplementedError: as `selective_scan`.
    """
    arrays = dict(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=initial_state)
    check_arguments(**arrays)
    arrays["initial_state"] = first_state(initial_state, u, A, compute_dtype(u, delta, A, B, C))
    arrays = {name: vary_as(u, x) for name, x in arrays.items() if x is not None}
    options = _Options(axis_name, delta_softplus, reverse, implementation)
    return _scan(options, arrays, jnp.asarray(reverse if parts_reversed is None else parts_reversed))


@dataclasses.dataclass(frozen=True)
class _Options:
    axis_name: str
    delta_softplus: bool
    reverse: bool
    implementation: str | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(options, arrays, parts_reversed):
    return _scan_part(options, _started(options, arrays, parts_reversed)[0])


def _scan_fwd(options, arrays, parts_reversed):
    started, step_sums = _started(options, arrays, parts_reversed)
    outputs, pullback = jax.vjp(functools.partial(_scan_part, options), started)
    # Kept: what the implementation keeps, the inputs, which live anyway, and the sums of all parts' step sizes.
    return outputs, (pullback, arrays, step_sums, parts_reversed)


def _scan_bwd(options, residuals, cotangents):
    """The part's own pullback is right once it gets the gradient by the final state through all later parts, too.

    Let g be a part's gradient by its final state, and r that by its start were g zero. By its start it is
    exp(A ΣΔ) g + r, which goes into g of the part before: the recurrence of the states, from the last part.
    """
    pullback, arrays, step_sums, parts_reversed = residuals
    dy, d_final_state = cotangents
    step_size, A = _discretize(options, arrays)
    d_sum = dy.astype(step_size.dtype)
    if "z" in arrays:
        d_sum *= jax.nn.silu(arrays["z"].astype(step_size.dtype))
    d_start = _accumulate_adjoint(options, A, step_size, d_sum, arrays["C"])
    d_start += _decay(step_size.sum(axis=1), A) * jnp.swapaxes(d_final_state, 1, 2)
    d_starts = jax.lax.all_gather(d_start, options.axis_name)
    from_later = _fold(options, A, d_starts, step_sums, jnp.zeros_like(d_start), ~parts_reversed)
    (gradients,) = pullback((dy, d_final_state + jnp.swapaxes(from_later, 1, 2)))
    is_first = _place(options, parts_reversed) == 0
    gradients["initial_state"] = jnp.where(is_first, gradients["initial_state"], 0)
    return gradients, None


_scan.defvjp(_scan_fwd, _scan_bwd)


def _scan_part(options, arrays):
    return selective_scan(
        **arrays,
        delta_softplus=options.delta_softplus,
        reverse=options.reverse,
        return_final_state=True,
        implementation=options.implementation,
    )


def _started(options, arrays, parts_reversed):
    """Returns the arrays with the state that this part starts from, and every part's sum of step sizes (P, B, D)."""
    step_size, A = _discretize(options, arrays)
    drive = step_size * arrays["u"].astype(step_size.dtype)
    final_state = _accumulate(options, A, step_size, drive, arrays["B"])
    final_states, step_sums = jax.lax.all_gather((final_state, step_size.sum(axis=1)), options.axis_name)
    start = jnp.swapaxes(arrays["initial_state"], 1, 2)
    start = _fold(options, A, final_states, step_sums, start, parts_reversed)
    return arrays | {"initial_state": jnp.swapaxes(start, 1, 2)}, step_sums


def _discretize(options, arrays):
    """Returns Δ (B, L, D) and A (N, D); states too have channels last here, (B, N, D), which fill a vector better."""
    dtype = arrays["initial_state"].dtype
    step_size = discretization_step(arrays["delta"], arrays.get("delta_bias"), options.delta_softplus, dtype)
    return step_size, arrays["A"].astype(dtype).T


def _fold(options, A, states, step_sums, start, from_last):
    """Returns h <- exp(A ΣΔ) h + state over the parts before this device's, or from the last part to those after it.

    Args:
      states: (P, B, N, D), of all parts.
      step_sums: (P, B, D), of all parts.
      start: h before the first part that is folded.
    """

    def add(i, h):
        part = jnp.where(from_last, states.shape[0] - 1 - i, i)
        return _decay(step_sums[part], A) * h + states[part]

    return jax.lax.fori_loop(0, _place(options, from_last), add, start)


def _place(options, from_last):
    """How many parts come before this device's."""
    index = jax.lax.axis_index(options.axis_name)
    return jnp.where(from_last, jax.lax.axis_size(options.axis_name) - 1 - index, index)


def _accumulate(options, A, step_size, drive, B):
    """Returns the last h of h <- exp(Δ_t A) h + drive_t B_t, from zero; a scan without outputs takes half the time."""
    return _loop(options.reverse, lambda h, decay, inputs: decay * h + inputs, A, step_size, drive, B)


def _accumulate_adjoint(options, A, step_size, d_sum, C):
    """Returns the last g of g <- exp(Δ_t A) (g + d_sum_t C_t), from zero and against the scan's direction."""
    return _loop(not options.reverse, lambda g, decay, inputs: decay * (g + inputs), A, step_size, d_sum, C)


def _loop(reverse, step, A, step_size, by_channel, by_state):
    """Returns the last state of state <- step(state, exp(Δ_t A), by_channel_t by_state_t), all (B, N, D)."""
    (batch, length, d_inner), dtype = step_size.shape, step_size.dtype
    unrolled = min(UNROLLED_STEPS, max(length, 1))
    padding = ((0, 0), (0, -length % unrolled), (0, 0))  # steps of size zero that add nothing
    arrays = [jnp.pad(x.astype(dtype), padding) for x in (step_size, by_channel, by_state)]
    turns = arrays[0].shape[1] // unrolled

    def turn(i, state):
        first = (turns - 1 - i if reverse else i) * unrolled
        step_size, by_channel, by_state = (jax.lax.dynamic_slice_in_dim(x, first, unrolled, 1) for x in arrays)
        for t in reversed(range(unrolled)) if reverse else range(unrolled):
            inputs = by_channel[:, t, None, :] * by_state[:, t, :, None]
            state = step(state, _decay(step_size[:, t], A), inputs)
        return state

    return jax.lax.fori_loop(0, turns, turn, batch_zeros(step_size, (batch, A.shape[0], d_inner), dtype))


def _decay(step_size, A):
    """exp(Δ A): (B, D) and (N, D) to (B, N, D)."""
    return jnp.exp(step_size[:, None, :] * A[None])
