"""Classifier-free guidance (arXiv 2207.12598): one velocity from two function evaluations."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sisma_jax.diffusion.flow import MIN_REMAINING
from sisma_jax.diffusion.solvers import Point, Velocity
from sisma_jax.models.condition import Condition, interleaved

# Lower bound of the standard deviation of a data estimate, so that a constant estimate is not divided by zero.
MIN_DEVIATION = 1e-6


def guided(
    denoise: Callable[[Point, Float[Array, " #B"], Condition], Point],
    condition: Condition,
    null: Condition,
    scale: float | Float[Array, ""],
    *,
    interval: tuple[float | Float[Array, ""], float | Float[Array, ""]] = (0.0, 1.0),
    rescale: float | Float[Array, ""] = 0.0,
    skips: bool = False,
) -> Velocity:
    """Returns the guided velocity v_null + scale (v - v_null), where v is the velocity with the condition.

    Both function evaluations run as one batch of twice the size.

    Args:
      denoise: (x, t, condition) -> velocity.
      condition: condition of each example.
      null: the null condition, with which the network was trained for dropped conditions; of each example, or of one.
      scale: guidance scale; 1 is no guidance.
      interval: guidance applies at times in [low, high). At all other times the result is bit-identical to v. The noise
        levels (s_low, s_high] of the paper (arXiv 2404.07724; noise over signal, s = (1 - t) / t) are the times
        [1 / (1 + s_high), 1 / (1 + s_low)).
      rescale: in [0, 1]; how far the guided data estimate is rescaled to the standard deviation of the unguided one,
        against over-exposure (see `_rescaled`).
      skips: skip the evaluation with the null condition at times when no example is guided. The program then contains
        the network twice.
    """
    velocities = jointly(denoise, condition, null)

    def velocity(x: Point, t: Float[Array, " #B"]) -> Point:
        low, high = interval
        is_guided = (low <= t) & (t < high)

        def extrapolated(x: Point) -> Point:
            conditional, unconditional = velocities((x, t), (x, t))
            guided = unconditional + scale * (conditional - unconditional)
            # A scale of 1 outside the interval would not be bit-identical to v.
            chosen = _rescaled(guided, conditional, x, t, rescale)
            return jnp.where(is_guided[:, None, None, None], chosen, conditional)

        if not skips:
            return extrapolated(x)
        return jax.lax.cond(is_guided.any(), extrapolated, lambda x: denoise(x, t, condition), x)

    return velocity


def jointly(
    denoise: Callable[[Point, Float[Array, " #B"], Condition], Point], *conditions: Condition
) -> Callable[..., tuple[Point, ...]]:
    """Returns a function of a pair (x, t) for each condition, which returns the velocity of each.

    All function evaluations run as one batch.

    Args:
      denoise: (x, t, condition) -> velocity.
      conditions: each of B examples, or of one; at least one of B. If all points have the same time, it may have
        one row.
    """
    every = interleaved(*conditions)

    def velocities(*points: tuple[Point, Float[Array, " #B"]]) -> tuple[Point, ...]:
        xs, times = zip(*points, strict=True)
        is_one = times[0].shape[0] == 1 and all(t is times[0] for t in times)
        y = denoise(_in_turn(xs), times[0] if is_one else _in_turn(times), every)
        return tuple(jnp.moveaxis(y.reshape(-1, len(points), *y.shape[1:]), 1, 0))

    return velocities


def _in_turn(arrays: Sequence[Array]) -> Array:
    """Returns the rows of the arrays in turn; see `interleaved`."""
    return jnp.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])


def _rescaled(
    extrapolated: Point, conditional: Point, x: Point, t: Float[Array, " #B"], rescale: float | Float[Array, ""]
) -> Point:
    """Returns the guided velocity, rescaled against over-exposure (arXiv 2305.08891, eq. 15 and 16).

    The paper multiplies the guided output by rescale std(conditional) / std(guided) + 1 - rescale, with the standard
    deviations of each image over pixels and channels. Its output predicts the velocity of a variance-preserving path,
    which at pure noise equals the negative data estimate. Our velocity x1 - x0 contains the noise, whose standard
    deviation would dominate that of the image. Therefore this function rescales the data estimate x + (1 - t) v.
    """
    remaining = (1 - t)[:, None, None, None]
    data, wanted_data = x + remaining * extrapolated, x + remaining * conditional
    deviation, wanted = (jnp.std(estimate, axis=(1, 2, 3), keepdims=True) for estimate in (data, wanted_data))
    factor = rescale * wanted / jnp.maximum(deviation, MIN_DEVIATION) + (1 - rescale)
    # Written as a difference, so that rescale = 0 returns the velocity bit for bit.
    return extrapolated + (factor - 1) * data / jnp.maximum(remaining, MIN_REMAINING)
