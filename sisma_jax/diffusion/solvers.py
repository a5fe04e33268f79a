"""Solvers of dx/dt = v(x, t) from noise (t = 0) to data (t = 1), each one `jax.lax.scan` over its evaluations.

`integrate` takes the velocity v, and `jump` takes average velocities.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sisma_jax.diffusion.flow import shift_time

Point = Float[Array, "B H W C"]
"""A point of the flow: noise, data, or a point between them."""
Velocity = Callable[[Point, Float[Array, " #B"]], Point]
"""(x, t) -> the velocity at time t."""
AverageVelocity = Callable[[Point, Float[Array, " #B"], Float[Array, " #B"]], Point]
"""(x, t, h) -> the average velocity between the times t and t + h, on the path through x at t."""

# A solver is a table with one row per evaluation of the velocity: the time, and the factors of its slope in the point
# of the next evaluation and in the next base; see `integrate`. The table has the dtype of the times, also under
# `jax_enable_x64`. Times are arrays of JAX or NumPy, and so is their table.
Times = Float[Array | np.ndarray, " T"]
Evaluations = tuple[Float[Array | np.ndarray, " E"], Float[Array | np.ndarray, " E"], Float[Array | np.ndarray, " E"]]


def time_grid(steps: int, shift: float | Float[Array, ""] = 1.0) -> Float[Array, " T"]:
    """Returns `steps` + 1 times increasing from 0 to 1, float32.

    Args:
      steps: at least 1.
      shift: positive. With 1, the times are equidistant. Larger values place more of them near noise, which suits
        high resolutions (see `shift_time`).

    Raises:
      ValueError: `steps` is not positive, or `shift` is a Python number that is not positive.
    """
    if steps < 1:
        raise ValueError(f"steps must be positive, got {steps}")
    if isinstance(shift, int | float) and not shift > 0:
        raise ValueError(f"shift must be positive, got {shift}")
    return jnp.asarray(shift_time(jnp.linspace(0.0, 1.0, steps + 1, dtype=jnp.float32), shift))


def integrate(velocity: Velocity, x0: Point, times: Float[Array, " T"], solver: str) -> Point:
    """Returns x at the last of `times`, integrated from `x0` at the first.

    | solver            | order | evaluations | exact if dx/dt is                                           |
    |-------------------|-------|-------------|-------------------------------------------------------------|
    | "euler"           | 1     | n           | constant                                                    |
    | "heun"            | 2     | 2n - 1      | constant; or linear in t, except for the last step          |
    | "midpoint"        | 2     | 2n          | linear in t                                                 |
    | "adams_bashforth" | 2     | n + 1       | linear in t                                                 |

    n is the number of steps. "Constant" and "linear" refer to the path; dx/dt is constant along it, for example, if the
    data are a single point. No solver evaluates at the last time, where a network that predicts data has no velocity.

    Every solver is one loop over its evaluations, so that the program contains the network once. The loop carries two
    arrays: the point x of the next evaluation and a base b. The slope v of an evaluation updates them to b + p v and
    b + q v, where p and q are in the solver's table.

    Args:
      velocity: (x, t) -> dx/dt, with t of shape (1,), the same for all examples.
      x0: point at the first time; its dtype is that of the result.
      times: increasing, at least two, float32 or wider.
      solver: a key of `SOLVERS`.

    Raises:
      ValueError: `solver` is unknown.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is not one of {', '.join(map(repr, SOLVERS))}")

    def evaluate(carry: tuple[Point, Point], row: tuple[Array, Array, Array]) -> tuple[tuple[Point, Point], None]:
        point, base = carry
        time, to_point, to_base = row
        slope = velocity(point, time[None])
        return (base + to_point * slope, base + to_base * slope), None

    time, to_point, to_base = map(jnp.asarray, SOLVERS[solver](times))
    return jax.lax.scan(evaluate, (x0, x0), (time, to_point, to_base))[0][0]


def jump(average: AverageVelocity, x0: Point, times: Float[Array, " T"]) -> Point:
    """Returns x at the last of `times` from `x0` at the first, with one evaluation between two times.

    There is no error of discretization: one step is exact if the average velocity is.

    Args:
      average: (x, t, h) -> average velocity, with t and h of shape (1,), the same for all examples.
      x0: point at the first time; its dtype is that of the result.
      times: increasing, at least two, float32 or wider.
    """

    def step(point: Point, row: tuple[Array, Array]) -> tuple[Point, None]:
        time, duration = row
        return point + duration * average(point, time[None], duration[None]), None

    return jax.lax.scan(step, x0, (times[:-1], jnp.diff(times)))[0]


def evaluations(steps: int, shift: float, solver: str) -> Float[np.ndarray, "3 E"]:
    """Returns a solver's table as NumPy arrays, float32: times, factors of the point, factors of the base.

    Unlike `integrate`, this needs no program of JAX, which would be compiled for each number of steps.

    Args:
      steps: at least 1.
      shift: positive; see `time_grid`.
      solver: a key of `SOLVERS`.
    """
    times = shift_time(np.linspace(0.0, 1.0, steps + 1, dtype=np.float32), np.float32(shift))
    return np.stack(SOLVERS[solver](times)).astype(np.float32)


def step_ends(steps: int, solver: str) -> list[int]:
    """Returns the number of evaluations that are done after each step.

    Args:
      steps: at least 1.
      solver: a key of `SOLVERS`.
    """
    if solver == "euler":
        return list(range(1, steps + 1))
    if solver == "adams_bashforth":  # the first step is the midpoint method's
        return list(range(2, steps + 2))
    ends = list(range(2, 2 * steps + 1, 2))
    return [*ends[:-1], ends[-1] - 1] if solver == "heun" else ends


def _euler(times: Times) -> Evaluations:
    step = times[1:] - times[:-1]
    return times[:-1], step, step


def _heun(times: Times) -> Evaluations:
    """A full step, then the mean of the slopes at its two ends.

    The evaluation at the last time is omitted, so that the last step is Euler's (as in EDM, arXiv 2206.00364). A single
    step of order 1 keeps the whole method at order 2.
    """
    step = times[1:] - times[:-1]
    time, to_point, to_base = _by_turns(times[:-1], times[1:]), _by_turns(step, step / 2), _by_turns(step / 2, step / 2)
    return time[:-1], to_point[:-1], to_base[:-1]


def _midpoint(times: Times) -> Evaluations:
    """Half a step, then the full step with the slope at its midpoint."""
    step = times[1:] - times[:-1]
    time = _by_turns(times[:-1], times[:-1] + step / 2)
    return time, _by_turns(step / 2, step), _by_turns(0 * step, step)


def _adams_bashforth(times: Times) -> Evaluations:
    """Second order for unequal steps: integrates the line through the last two slopes.

    Let v be the slope at the start of a step of size h, and u the slope evaluated g earlier. The step adds
    (h + h^2 / 2g) v - (h^2 / 2g) u to x. The first step has no earlier slope and uses the midpoint method, so that all
    steps have order 2. For the second step, u is the slope at that midpoint, half a step earlier.
    """
    xp = times.__array_namespace__()
    step = times[1:] - times[:-1]
    evaluated = xp.concat([times[:1], times[:1] + step[:1] / 2, times[1:-1]])
    gap = evaluated[2:] - evaluated[1:-1]
    of_past = step[1:] ** 2 / (2 * gap)
    to_point = xp.concat([step[:1] / 2, step[:1], step[1:] + of_past])
    # The base is x minus the next step's share of this slope. The first evaluation of the midpoint step keeps it.
    taken_off = xp.concat([step[:1] / 2, of_past, 0 * step[:1]])
    return evaluated, to_point, to_point - taken_off


SOLVERS: dict[str, Callable[[Times], Evaluations]] = {
    "euler": _euler,
    "heun": _heun,
    "midpoint": _midpoint,
    "adams_bashforth": _adams_bashforth,
}
"""Functions from the times to a solver's table, by the name of the solver."""


def _by_turns(
    first: Float[Array | np.ndarray, " N"], second: Float[Array | np.ndarray, " N"]
) -> Float[Array | np.ndarray, " 2*N"]:
    """Returns the elements of both arrays alternately."""
    return first.__array_namespace__().stack([first, second], axis=1).reshape(-1)
