"""Classifier-free guidance (arXiv 2207.12598): one velocity of two function evaluations."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sisma_jax.diffusion.flow import MIN_REMAINING
from sisma_jax.diffusion.solvers import Point, Velocity
from sisma_jax.models.condition import Condition

# Standard deviations of a data estimate below this count as this, so that a constant estimate is not divided by zero.
MIN_DEVIATION = 1e-6


def guided(
    denoise: Callable[[Point, Float[Array, " B"], Condition], Point],
    condition: Condition,
    null: Condition,
    scale: float | Float[Array, ""],
    *,
    interval: tuple[float | Float[Array, ""], float | Float[Array, ""]] = (0.0, 1.0),
    rescale: float | Float[Array, ""] = 0.0,
) -> Velocity:
    """Returns the guided velocity v_null + scale (v - v_null), where v is that with the condition.

    Both evaluations run as one batch of twice the size.

    Args:
      denoise: (x, t, condition) -> velocity.
      null: the condition of "nothing given".
      interval: times [low, high) that are guided; at others the velocity is v to the last bit. Noise levels
        (s_low, s_high] of the paper (arXiv 2404.07724, noise over signal, so s = (1 - t) / t) are the times
        [1 / (1 + s_high), 1 / (1 + s_low)). Both evaluations are made at all times: to skip one would put the network
        into the program twice.
      rescale: in [0, 1]; how far the guided estimate of the data is brought to the standard deviation that it has
        without guidance, against over-exposure (see `_rescaled`).
    """
    both_conditions = jax.tree.map(_in_turn, condition, null)

    def velocity(x: Point, t: Float[Array, " B"]) -> Point:
        both = denoise(_in_turn(x, x), _in_turn(t, t), both_conditions)
        pairs = both.reshape(-1, 2, *x.shape[1:])
        conditional, unconditional = pairs[:, 0], pairs[:, 1]
        extrapolated = unconditional + scale * (conditional - unconditional)
        low, high = interval
        is_guided = (low <= t) & (t < high)
        # Chosen at the end, and not by a scale of 1, which would leave rounding and the rescaling in.
        chosen = _rescaled(extrapolated, conditional, x, t, rescale)
        return jnp.where(is_guided[:, None, None, None], chosen, conditional)

    return velocity


def _in_turn(x: Array, y: Array) -> Array:
    """Returns rows of x and y in turn, so that a device that has some of both has their pairs, and none has to move."""
    return jnp.stack([x, y], axis=1).reshape(-1, *x.shape[1:])


def _rescaled(
    extrapolated: Point, conditional: Point, x: Point, t: Float[Array, " B"], rescale: float | Float[Array, ""]
) -> Point:
    """Returns the guided velocity with its over-exposure taken back (arXiv 2305.08891, eq. 15 and 16).

    The paper multiplies the guided output by rescale std(conditional) / std(guided) + 1 - rescale, with the deviations
    of each image over pixels and channels. Its output predicts the velocity of a variance-preserving path, which at
    pure noise is the data estimate but for its sign. Our velocity x1 - x0 has all of the noise in it there, whose
    deviation would hide that of the image; so what is multiplied is the data estimate, x + (1 - t) v.
    """
    remaining = (1 - t)[:, None, None, None]
    data, wanted_data = x + remaining * extrapolated, x + remaining * conditional
    deviation, wanted = (jnp.std(estimate, axis=(1, 2, 3), keepdims=True) for estimate in (data, wanted_data))
    factor = rescale * wanted / jnp.maximum(deviation, MIN_DEVIATION) + (1 - rescale)
    # As a difference, so that no rescaling leaves the velocity as it was, bit for bit.
    return extrapolated + (factor - 1) * data / jnp.maximum(remaining, MIN_REMAINING)
