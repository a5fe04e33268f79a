from typing import get_args

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sisma_jax import config
from sisma_jax.diffusion.solvers import SOLVERS, integrate, time_grid

X0 = jnp.linspace(-1.0, 1.0, 12).reshape(2, 2, 1, 3)
ALL = tuple(SOLVERS)

shifts = st.floats(0.01, 100)


def broadcast(t):
    return t[:, None, None, None]


def test_the_configuration_names_every_solver():
    assert get_args(config.Solver) == ALL


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_exact_on_a_straight_path(solver, steps, shift):
    target = X0 * 2 - 1
    got = integrate(lambda x, t: target - X0, X0, time_grid(steps, shift), solver)
    # A few units in the last place of 3, the largest value, over at most fourteen evaluations.
    np.testing.assert_allclose(got, target, atol=2e-6)


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_exact_for_one_point_of_data(solver, steps):
    """The velocity of a perfect data estimate, (x1 - x) / (1 - t), ends in x1 however few the steps."""
    x1 = jnp.full_like(X0, 0.3)
    got = integrate(lambda x, t: (x1 - x) / (1 - broadcast(t)), X0, time_grid(steps), solver)
    np.testing.assert_allclose(got, x1, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 6])
@pytest.mark.parametrize("shift", [1.0, 4.0])
@pytest.mark.parametrize("solver", ["heun", "midpoint", "adams_bashforth"])
def test_second_order_is_exact_for_a_velocity_linear_in_time(solver, shift, steps):
    """dx/dt = x0 + 3t gains x0 + 3/2; Heun's last step h, which is Euler's, lacks 3 h^2 / 2."""
    times = time_grid(steps, shift)
    got = integrate(lambda x, t: X0 + 3 * broadcast(t), X0, times, solver)
    lacking = 1.5 * (times[-1] - times[-2]) ** 2 if solver == "heun" else 0.0
    np.testing.assert_allclose(got, 2 * X0 + 1.5 - lacking, atol=2e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2), ("adams_bashforth", 2)])
def test_order_of_convergence(solver, order, shift):
    """dx/dt = 3 cos(3t) x (1 - x) has the solution logit(x) = logit(x0) + sin(3t)."""
    steps = np.array([64, 128, 256, 512])
    with jax.enable_x64(True):
        x0 = jnp.linspace(0.2, 0.8, 12).reshape(2, 2, 1, 3)
        exact = jax.nn.sigmoid(jax.scipy.special.logit(x0) + jnp.sin(3.0))

        def error(steps):
            times = time_grid(steps, shift).astype(jnp.float64)
            got = integrate(lambda x, t: 3 * jnp.cos(3 * broadcast(t)) * x * (1 - x), x0, times, solver)
            assert got.dtype == jnp.float64
            return float(jnp.abs(got - exact).max())

        errors = [error(int(n)) for n in steps]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert -slope == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize("solver", ALL)
def test_no_evaluation_at_the_end_of_time(solver):
    """A network that predicts data has no velocity at t = 1."""
    got = integrate(lambda x, t: 1 / (1 - broadcast(t)) * jnp.ones_like(x), X0, time_grid(4), solver)
    assert np.isfinite(got).all()


# Few numbers of steps, since each compiles its own program; any shift.
@pytest.mark.parametrize("steps", [1, 2, 3, 40])
@hypothesis.settings(max_examples=30)
@hypothesis.given(shift=shifts)
def test_evaluations_go_forward_within_time(steps, shift):
    wanted = {"euler": steps, "heun": 2 * steps - 1, "midpoint": 2 * steps, "adams_bashforth": steps + 1}
    for solver, table in SOLVERS.items():
        evaluated, to_point, to_base = map(np.asarray, table(time_grid(steps, shift)))
        assert evaluated.shape == to_point.shape == to_base.shape == (wanted[solver],)
        assert evaluated[0] == 0
        assert (np.diff(evaluated) >= 0).all()
        assert evaluated[-1] < 1


@pytest.mark.parametrize("solver", ALL)
def test_one_loop_and_one_network_whatever_the_number_of_steps(solver):
    """The program does not grow with the steps: nothing is unrolled."""

    def program(steps):
        return str(jax.make_jaxpr(lambda x: integrate(lambda x, t: jnp.tanh(x), x, time_grid(steps), solver))(X0))

    assert program(900).count(" = ") == program(10).count(" = ")
    assert program(10).count("tanh") == 1


@pytest.mark.parametrize("solver", ALL)
def test_examples_do_not_mix(solver):
    velocity = lambda x, t: jnp.sin(x) + broadcast(t)  # noqa: E731
    together = integrate(velocity, X0, time_grid(3), solver)
    alone = integrate(velocity, X0[1:], time_grid(3), solver)
    np.testing.assert_allclose(together[1:], alone, rtol=1e-6)


def test_unknown_solver():
    with pytest.raises(ValueError, match="'rk9' is not one of 'euler', 'heun', 'midpoint', 'adams_bashforth'"):
        integrate(lambda x, t: x, X0, time_grid(2), "rk9")


@pytest.mark.parametrize("steps", [1, 2, 3, 40, 1000])
@hypothesis.settings(max_examples=30)
@hypothesis.given(shift=shifts)
def test_times_increase_from_zero_to_one(steps, shift):
    times = np.asarray(time_grid(steps, shift))
    assert times.shape == (steps + 1,)
    assert times[0] == 0
    assert times[-1] == 1
    assert (np.diff(times) > 0).all()


def test_no_shift_is_equal_steps_to_the_last_bit():
    np.testing.assert_array_equal(time_grid(25), jnp.linspace(0, 1, 26))
    np.testing.assert_array_equal(jax.jit(time_grid, static_argnums=0)(25, jnp.float32(1)), jnp.linspace(0, 1, 26))


def test_more_shift_puts_steps_near_noise():
    """At shift s the noise level of the middle time is s / (1 + s), as in SD3."""
    np.testing.assert_allclose(1 - time_grid(2, 3.0)[1], 3 / 4, rtol=1e-6)
    assert (time_grid(10, 3.0) < 0.5).sum() > (time_grid(10) < 0.5).sum()
    np.testing.assert_allclose(time_grid(10, 1 / 3.0), 1 - time_grid(10, 3.0)[::-1], atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), "steps must be positive, got 0"), ((3, 0.0), "shift must be positive, got 0.0"), ((3, -1.0), "shift")],
)
def test_a_wrong_grid_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        time_grid(*arguments)
