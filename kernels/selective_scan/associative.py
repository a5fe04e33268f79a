"""The selective scan by `jax.lax.associative_scan`: the portable fallback. It holds (B, L, D, N) arrays in memory."""

import jax
import jax.numpy as jnp

from kernels.selective_scan.reference import compute_dtype, discretization_step, first_state, skip_and_gate
from kernels.typing import Array, Float


def selective_scan_associative(
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
    A, B, C = (x.astype(dtype) for x in (A, B, C))
    state = first_state(initial_state, u, A, dtype)
    if u.shape[1] == 0:
        return skip_and_gate(jnp.zeros(u.shape, dtype), u, D, z), state

    # Step t is the affine map h -> decay_t h + drive_t; the scan composes the maps, the earlier one first.
    def compose(earlier, later):
        decay_earlier, drive_earlier = earlier
        decay_later, drive_later = later
        return decay_later * decay_earlier, decay_later * drive_earlier + drive_later

    decay = jnp.exp(step_size[..., None] * A[None, None])
    drive = (step_size * u.astype(dtype))[..., None] * B[:, :, None, :]
    first, last = (-1, 0) if reverse else (0, -1)
    drive = drive.at[:, first].add(decay[:, first] * state)
    _, h = jax.lax.associative_scan(compose, (decay, drive), axis=1, reverse=reverse)
    return skip_and_gate(jnp.einsum("bldn,bln->bld", h, C), u, D, z), h[:, last]
