"""The selective scan with `jax.lax.associative_scan`: the portable fallback, parallel over the sequence.

It needs O(log L) parallel steps instead of L, but holds arrays of shape (batch, length, d_inner, d_state) in memory.
Gradients are those of `associative_scan`, which keep several such arrays.
"""

import jax
import jax.numpy as jnp

from ..typing import Array, Float
from .reference import compute_dtype, discretization_step, first_state, skip_and_gate


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
    # Float32 or wider for the same reason as in `reference.py`. No division by a product of decays occurs, which would
    # overflow where they decay to zero.
    dtype = compute_dtype(u, delta, A, B, C)
    step_size = discretization_step(delta, delta_bias, delta_softplus, dtype)
    A, B, C = (x.astype(dtype) for x in (A, B, C))
    state = first_state(initial_state, u, A, dtype)
    if u.shape[1] == 0:
        return skip_and_gate(jnp.zeros(u.shape, dtype), u, D, z), state

    # Step t is the affine map h -> decay_t h + drive_t. Composition of maps is associative, and the prefix compositions
    # of all steps, applied to zero, are the states.
    def compose(
        earlier: tuple[Float[Array, "*shape"], Float[Array, "*shape"]],
        later: tuple[Float[Array, "*shape"], Float[Array, "*shape"]],
    ) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
        decay_earlier, drive_earlier = earlier
        decay_later, drive_later = later
        return decay_later * decay_earlier, decay_later * drive_earlier + drive_later

    decay = jnp.exp(step_size[..., None] * A[None, None])
    drive = (step_size * u.astype(dtype))[..., None] * B[:, :, None, :]
    # The initial state enters the first scanned step's map, so that the maps can be applied to zero.
    first, last = (-1, 0) if reverse else (0, -1)
    drive = drive.at[:, first].add(decay[:, first] * state)
    _, h = jax.lax.associative_scan(compose, (decay, drive), axis=1, reverse=reverse)
    # HIGHEST: by default TPUs and GPUs round the factors of an einsum to bfloat16 or TF32.
    y = jnp.einsum("bldn,bln->bld", h, C, precision=jax.lax.Precision.HIGHEST)
    return skip_and_gate(y, u, D, z), h[:, last]
