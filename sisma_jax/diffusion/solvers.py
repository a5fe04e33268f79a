"""Solvers of dx/dt = v(x, t) from noise (t = 0) to data (t = 1), as one loop for `jax.jit`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sisma_jax.diffusion.flow import shift_time

Point = Float[Array, "B H W C"]
"""Of the flow: noise, data, or what is between."""
Velocity = Callable[[Point, Float[Array, " B"]], Point]

# Constants are in the type of the times: float32, also under `jax_enable_x64`.
# A solver as a table with one row per evaluation of the velocity: its time, and how far its slope carries the point of
# the next evaluation and the base that the row after it starts from. See `integrate`.
Evaluations = tuple[Float[Array, " E"], Float[Array, " E"], Float[Array, " E"]]


def time_grid(steps: int, shift: float | Float[Array, ""] = 1.0) -> Float[Array, " T"]:
    """Returns `steps` + 1 times increasing from 0 to 1, float32.

    Args:
      steps: at least 1.
      shift: positive. 1 spaces the times equally; more puts more of them near noise, as high resolutions want
        (see `shift_time`).

    Raises:
      ValueError: no steps, or a shift that is known and not positive.
    """
    if steps < 1:
        raise ValueError(f"steps must be positive, got {steps}")
    if isinstance(shift, int | float) and not shift > 0:
        raise ValueError(f"shift must be positive, got {shift}")
    return shift_time(jnp.linspace(0.0, 1.0, steps + 1, dtype=jnp.float32), shift)


def integrate(velocity: Velocity, x0: Point, times: Float[Array, " T"], solver: str) -> Point:
    """Returns x at the last of `times`, starting from `x0` at the first.

    | solver            | order | evaluations | exact where dx/dt is                                        |
    |-------------------|-------|-------------|-------------------------------------------------------------|
    | "euler"           | 1     | n           | constant                                                    |
    | "heun"            | 2     | 2n - 1      | constant; linear in t, but for the last step                |
    | "midpoint"        | 2     | 2n          | linear in t                                                 |
    | "adams_bashforth" | 2     | n + 1       | linear in t                                                 |

    (n steps; what is constant need be so along the path only, as it is where the data are one point.) None evaluates
    at the last time, where a network that predicts data has no velocity.

    Every solver is one loop over its evaluations, so the network stands once in the program. Two arrays go through it:
    the point x of the next evaluation and a base b, and an evaluation's slope v moves them to b + p v and b + q v, with
    p and q from the solver's table. Float32 or wider, as `times` are.

    Args:
      velocity: (x, t) -> dx/dt, with one t per example.
      times: increasing, at least two.
      solver: a key of `SOLVERS`.

    Raises:
      ValueError: an unknown solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is not one of {', '.join(map(repr, SOLVERS))}")

    def evaluate(carry: tuple[Point, Point], row: tuple[Array, Array, Array]) -> tuple[tuple[Point, Point], None]:
        point, base = carry
        time, to_point, to_base = row
        slope = velocity(point, jnp.full((point.shape[0],), time))
        return (base + to_point * slope, base + to_base * slope), None

    return jax.lax.scan(evaluate, (x0, x0), SOLVERS[solver](times))[0][0]


def _euler(times: Float[Array, " T"]) -> Evaluations:
    step = jnp.diff(times)
    return times[:-1], step, step


def _heun(times: Float[Array, " T"]) -> Evaluations:
    """Full step, then the mean of the slopes at its two ends.

    The very last evaluation, at the end of time, is left out; what remains of the last step is Euler's (as in EDM,
    arXiv 2206.00364). One step of order 1 leaves the whole at order 2.
    """
    step = jnp.diff(times)
    time, to_point, to_base = _by_turns(times[:-1], times[1:]), _by_turns(step, step / 2), jnp.repeat(step / 2, 2)
    return time[:-1], to_point[:-1], to_base[:-1]


def _midpoint(times: Float[Array, " T"]) -> Evaluations:
    """Half a step, then the whole step with the slope found there."""
    step = jnp.diff(times)
    time = _by_turns(times[:-1], times[:-1] + step / 2)
    return time, _by_turns(step / 2, step), _by_turns(jnp.zeros_like(step), step)


def _adams_bashforth(times: Float[Array, " T"]) -> Evaluations:
    """The second order for unequal steps: integrates the line through the last two slopes.

    With the slope v at the start of a step h, and u evaluated g before it, x moves by (h + h^2 / 2g) v - (h^2 / 2g) u.
    The first step has no slope before it and is the midpoint's, so no step is of lower order than the others; the
    second step's u is the slope found there, half a step back.
    """
    step = jnp.diff(times)
    evaluated = jnp.concatenate([times[:1], times[:1] + step[:1] / 2, times[1:-1]])
    gap = jnp.diff(evaluated)[1:]
    of_past = step[1:] ** 2 / (2 * gap)
    to_point = jnp.concatenate([step[:1] / 2, step[:1], step[1:] + of_past])
    # The base is x with the next step's share of this slope already taken off; at the midpoint's first half it stays.
    taken_off = jnp.concatenate([step[:1] / 2, of_past, jnp.zeros_like(step[:1])])
    return evaluated, to_point, to_point - taken_off


SOLVERS: dict[str, Callable[[Float[Array, " T"]], Evaluations]] = {
    "euler": _euler,
    "heun": _heun,
    "midpoint": _midpoint,
    "adams_bashforth": _adams_bashforth,
}


def _by_turns(first: Float[Array, " N"], second: Float[Array, " N"]) -> Float[Array, " 2*N"]:
    return jnp.stack([first, second], axis=1).reshape(-1)
