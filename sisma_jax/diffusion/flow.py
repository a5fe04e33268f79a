"""Flow matching (Lipman et al., arXiv 2210.02747; Liu et al., arXiv 2209.03003).

Time runs from noise to data: x0 ~ Normal(0, I) at t = 0, the latent x1 at t = 1, and between them
xt = t x1 + (1 - t) x0, whose velocity is x1 - x0.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

# A network that predicts data implies the velocity (x1 - xt) / (1 - t), which is singular at the data end. The
# loss divides by no less than this (JiT, arXiv 2511.13720), so that no example outweighs all others.
MIN_REMAINING_IN_LOSS = 0.05
# A sampler comes closer to the data end than that, though never to it, and divides by no less than this.
MIN_REMAINING = 1e-3


def sample_time(key: Key[Array, ""], batch: int, mean: float, std: float) -> Float[Array, " B"]:
    """Returns logit-normal times in (0, 1): sigmoid(Normal(mean, std)) (arXiv 2403.03206, section 3.1)."""
    return jax.nn.sigmoid(mean + std * jax.random.normal(key, (batch,), jnp.float32))


def shift_time(t: Float[Array, "*T"], shift: float | Float[Array, ""]) -> Float[Array, "*T"]:
    """Returns times moved towards noise by a `shift` above 1, towards data by one below; 0 and 1 stay.

    The noise level n = 1 - t becomes n' = shift n / (1 + (shift - 1) n), which adds -log(shift) to the logit of t
    (arXiv 2403.03206, eq. 23, where time runs the other way and shift is sqrt(m / n) for m pixels in place of n).
    Logit-normal times are shifted by taking log(shift) from their mean.
    """
    return t / (1 + (shift - 1) * (1 - t))


def interpolate(
    x0: Float[Array, "B H W C"], x1: Float[Array, "B H W C"], t: Float[Array, " B"]
) -> Float[Array, "B H W C"]:
    """Returns xt = t x1 + (1 - t) x0."""
    t = t[:, None, None, None]
    return t * x1 + (1 - t) * x0


def to_velocity(
    output: Float[Array, "B H W C"],
    xt: Float[Array, "B H W C"],
    t: Float[Array, " B"],
    prediction: Literal["velocity", "data"],
    min_remaining: float = MIN_REMAINING,
) -> Float[Array, "B H W C"]:
    """Returns the velocity at (xt, t) that a network's output stands for.

    Args:
      output: the velocity itself, or an estimate of x1.
      min_remaining: least value of 1 - t that an estimate of x1 is divided by.
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
    """Returns the mean squared error of the velocity for each example, float32.

    With `data` prediction both the estimate and the truth are turned into velocities with the same floor on
    1 - t, so a perfect estimate has no loss at any t.
    """
    xt = interpolate(x0, x1, t)
    target = x1 - x0 if prediction == "velocity" else x1
    difference = to_velocity(output, xt, t, prediction, MIN_REMAINING_IN_LOSS) - to_velocity(
        target, xt, t, prediction, MIN_REMAINING_IN_LOSS
    )
    return jnp.mean(difference.astype(jnp.float32) ** 2, axis=(1, 2, 3))
