"""The selective scan step by step (Mamba, arXiv 2312.00752, algorithm 2). It defines the op and is written for reading.

It also holds what all implementations share outside the recurrence: the dtype of the computation, the step size Δ, the
first state, and skip connection and gate. `jax.lax.scan` keeps the state of every step, (length, batch, d_inner,
d_state), for the gradient, so this implementation is not for training.
"""

import jax
import jax.numpy as jnp

from ..typing import Array, Float, Size

CHECKPOINT_NAME = "selective_scan"
"""The name, for policies of `jax.checkpoint`, of a scan's outputs and of the states that its gradient needs."""


def selective_scan_reference(
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
    # Float32 or wider, also for bfloat16 inputs: a state sums contributions of many steps, and with a decay near 1 they
    # would be lost to the 8 bits of a bfloat16 significand.
    dtype = compute_dtype(u, delta, A, B, C)
    step_size = discretization_step(delta, delta_bias, delta_softplus, dtype)
    A = A.astype(dtype)

    # The inputs are u_t and Δ_t, (B, D), and B_t and C_t, (B, N).
    def step(
        h: Float[Array, "B D N"], inputs: list[Float[Array, "B _"]]
    ) -> tuple[Float[Array, "B D N"], Float[Array, "B D"]]:
        u_t, step_size_t, B_t, C_t = inputs
        # The discretization of Mamba's code: exact for A (zero-order hold), first-order (Euler) for B.
        decay = jnp.exp(step_size_t[:, :, None] * A[None])
        h = decay * h + (step_size_t * u_t)[:, :, None] * B_t[:, None, :]
        return h, jnp.sum(h * C_t[:, None, :], axis=-1)

    by_time = [jnp.moveaxis(x.astype(dtype), 1, 0) for x in (u, step_size, B, C)]
    final_state, y = jax.lax.scan(step, first_state(initial_state, u, A, dtype), by_time, reverse=reverse)
    return skip_and_gate(jnp.moveaxis(y, 0, 1), u, D, z), final_state


def compute_dtype(*arrays: Array) -> jnp.dtype:
    """Returns the dtype of carries, reductions and exponentials.

    Args:
      arrays: inputs of the scan, floating-point.

    Returns:
      float32, or float64 if one of the arrays is float64.
    """
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def discretization_step(
    delta: Float[Array, "B L D"], delta_bias: Float[Array, " D"] | None, delta_softplus: bool, dtype: jnp.dtype
) -> Float[Array, "B L D"]:
    """Returns Δ in dtype: delta + delta_bias, or its softplus if delta_softplus."""
    delta = delta.astype(dtype)
    if delta_bias is not None:
        delta = delta + delta_bias.astype(dtype)[None, None, :]
    return jax.nn.softplus(delta) if delta_softplus else delta


def first_state(
    initial_state: Float[Array, "B D N"] | None, u: Float[Array, "B L D"], A: Float[Array, "D N"], dtype: jnp.dtype
) -> Float[Array, "B D N"]:
    """Returns the state before the first scanned step, in dtype; zeros if initial_state is None."""
    if initial_state is None:
        return batch_zeros(u, (u.shape[0], *A.shape), dtype)
    return initial_state.astype(dtype)


def batch_zeros(u: Float[Array, "B L D"], shape: tuple[Size, ...], dtype: jnp.dtype, batch_axis: int = 0) -> Array:
    """Returns zeros whose batch axis is sharded, or varies inside a `jax.shard_map`, like that of u.

    Args:
      u: input of the scan.
      shape: of the zeros.
      dtype: of the zeros.
      batch_axis: the axis of shape that is the batch.
    """
    # Computed from u, because a constant has no sharding. As the first carry of a loop it would be replicated, and its
    # type inside a shard_map would differ from that of the next carry.
    zeros = jnp.zeros_like(u[:, :1, :1], dtype).sum(axis=(1, 2))
    return jax.lax.broadcast_in_dim(zeros, shape, (batch_axis,))


def skip_and_gate(
    y: Float[Array, "B L D"],
    u: Float[Array, "B L D"],
    D: Float[Array, " D"] | None,
    z: Float[Array, "B L D"] | None,
) -> Float[Array, "B L D"]:
    """Returns (y + D u) silu(z), computed in the dtype of y and rounded once to the dtype of u."""
    if D is not None:
        y = y + D.astype(y.dtype)[None, None, :] * u.astype(y.dtype)
    if z is not None:
        y = y * jax.nn.silu(z.astype(y.dtype))
    return y.astype(u.dtype)
