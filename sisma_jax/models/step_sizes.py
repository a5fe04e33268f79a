"""Initial values of the step sizes Δ of a state-space model, as in Mamba (arXiv 2312.00752, section 3.6)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

# Initial step sizes are log-uniform in [DT_MIN, DT_MAX].
DT_MIN, DT_MAX = 1e-3, 1e-1


def initial_dt_bias(count: int, rngs: nnx.Rngs) -> Float[Array, " D"]:
    """Returns biases whose softplus is log-uniform in [DT_MIN, DT_MAX], float32.

    Args:
      count: number of step sizes per token.
      rngs: randomness of the values.
    """
    log_dt = jax.random.uniform(rngs.params(), (count,), jnp.float32, minval=math.log(DT_MIN), maxval=math.log(DT_MAX))
    dt = jnp.exp(log_dt)
    return dt + jnp.log(-jnp.expm1(-dt))  # the inverse of softplus
