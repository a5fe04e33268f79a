"""Solvers of dx/dt = v(x, t) from noise (t = 0) to data (t = 1), rolled into one loop for `jax.jit`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Latent = Float[Array, "B H W C"]
Velocity = Callable[[Latent, Float[Array, " B"]], Latent]


def time_grid(steps: int) -> Float[Array, " T"]:
    """Returns the `steps` + 1 equally spaced times from 0 to 1."""
    return jnp.linspace(0.0, 1.0, steps + 1)


def integrate(velocity: Velocity, x0: Latent, times: Float[Array, " T"], solver: str) -> Latent:
    """Returns x at the last of `times`, starting from `x0` at the first.

    Euler has order 1 and one evaluation a step; Heun has order 2 and two, but for its last step, which is Euler's
    (as in EDM, arXiv 2206.00364): a network that predicts data has no velocity at t = 1. One step of order 1 leaves
    the whole at order 2.

    Args:
      velocity: (x, t) -> dx/dt, with one t an example.
      times: increasing, at least two.
      solver: "euler" or "heun".

    Raises:
      ValueError: an unknown solver.
    """

    def at(x: Latent, t: Array) -> Latent:
        return velocity(x, jnp.full((x.shape[0],), t))

    def euler(x: Latent, interval: tuple[Array, Array]) -> tuple[Latent, None]:
        start, end = interval
        return x + (end - start) * at(x, start), None

    def heun(x: Latent, interval: tuple[Array, Array]) -> tuple[Latent, None]:
        start, end = interval
        slope = at(x, start)
        return x + (end - start) * 0.5 * (slope + at(x + (end - start) * slope, end)), None

    if solver == "euler":
        return jax.lax.scan(euler, x0, (times[:-1], times[1:]))[0]
    if solver == "heun":
        x, _ = jax.lax.scan(heun, x0, (times[:-2], times[1:-1]))
        return euler(x, (times[-2], times[-1]))[0]
    raise ValueError(f"solver {solver!r} is not one of 'euler', 'heun'")
