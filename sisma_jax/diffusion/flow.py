"""Flow matching (Lipman et al., arXiv 2210.02747; Liu et al., arXiv 2209.03003).

Time runs from noise to data: x0 ~ Normal(0, I) at t = 0, and the latent x1 at t = 1. Between them,
xt = t x1 + (1 - t) x0, whose velocity is x1 - x0.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

# The velocity of a network that predicts data is (x1 - xt) / (1 - t), which is singular at t = 1. The loss bounds the
# divisor by this value (JiT, arXiv 2511.13720). Otherwise single examples near t = 1 would dominate the loss.
MIN_REMAINING_IN_LOSS = 0.05
# The same bound for samplers, which evaluate closer to t = 1 but never at it.
MIN_REMAINING = 1e-3


def sample_time(key: Key[Array, ""], batch: int, mean: float, std: float) -> Float[Array, " B"]:
    """Returns float32 times in (0, 1) with a logit-normal distribution (arXiv 2403.03206, section 3.1).

    Args:
      key: random key.
      batch: number of times.
      mean: mean of the logit of t.
      std: standard deviation of the logit of t.
    """
    return jax.nn.sigmoid(mean + std * jax.random.normal(key, (batch,), jnp.float32))


def shift_time(
    t: Float[Array | np.ndarray, "*T"], shift: float | np.floating[Any] | Float[Array, ""]
) -> Float[Array | np.ndarray, "*T"]:
    """Returns times in [0, 1], moved towards noise if shift > 1 and towards data if shift < 1.

    The noise level n = 1 - t becomes n' = shift n / (1 + (shift - 1) n). This subtracts log(shift) from the logit of t
    and leaves 0 and 1 unchanged (arXiv 2403.03206, eq. 23, where time runs in the other direction and shift is
    sqrt(m / n) when the resolution changes from n to m pixels).

    Args:
      t: times in [0, 1].
      shift: positive.
    """
    return t / (1 + (shift - 1) * (1 - t))


def interpolate(
    x0: Float[Array, "B H W C"], x1: Float[Array, "B H W C"], t: Float[Array, " B"]
) -> Float[Array, "B H W C"]:
    """Returns xt = t x1 + (1 - t) x0, the point of the flow at time t between noise x0 and data x1."""
    t = t[:, None, None, None]
    return t * x1 + (1 - t) * x0


def to_velocity(
    output: Float[Array, "B H W C"],
    xt: Float[Array, "B H W C"],
    t: Float[Array, " #B"],
    prediction: Literal["velocity", "data"],
    min_remaining: float = MIN_REMAINING,
) -> Float[Array, "B H W C"]:
    """Returns the velocity at (xt, t) that corresponds to a network's output.

    Args:
      output: the velocity itself, or an estimate of x1.
      xt: input of the network.
      t: times in [0, 1]; one row for all examples, or one per example.
      prediction: which of the two `output` is.
      min_remaining: lower bound of the divisor 1 - t for an estimate of x1.
    """
    if prediction == "velocity":
        return output
    remaining = jnp.maximum(1 - t, min_remaining)
    return (output - xt) / remaining[:, None, None, None]


def loss_per_example(
    output: Float[Array, "B H W C"],
    x0: Float[Array, "B H W C"],
    x1: Float[Array, "B H W C"],
    t: Float[Array, " B"],
    prediction: Literal["velocity", "data"],
) -> Float[Array, " B"]:
    """Returns the mean squared error of the velocity of each example, float32.

    With `data` prediction, both the estimate and x1 are converted to velocities with the same lower bound on 1 - t, so
    that a perfect estimate has zero loss at every t.

    Args:
      output: output of the network at (xt, t).
      x0: noise.
      x1: data.
      t: times in [0, 1].
      prediction: what the network predicts.
    """
    xt = interpolate(x0, x1, t)
    target = x1 - x0 if prediction == "velocity" else x1
    difference = to_velocity(output, xt, t, prediction, MIN_REMAINING_IN_LOSS) - to_velocity(
        target, xt, t, prediction, MIN_REMAINING_IN_LOSS
    )
    return jnp.mean(difference.astype(jnp.float32) ** 2, axis=(1, 2, 3))
