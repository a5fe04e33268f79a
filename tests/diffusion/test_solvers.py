import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sisma_jax.diffusion.solvers import integrate, time_grid

X0 = jnp.linspace(-1.0, 1.0, 12).reshape(2, 2, 1, 3)


def broadcast(t):
    return t[:, None, None, None]


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("steps", [1, 7])
def test_exact_on_a_straight_path(solver, steps):
    target = X0 * 2 - 1
    got = integrate(lambda x, t: target - X0, X0, time_grid(steps), solver)
    np.testing.assert_allclose(got, target, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 5])
def test_euler_is_exact_for_one_point_of_data(steps):
    """The velocity of a perfect data estimate, (x1 - x) / (1 - t), ends in x1 however few the steps."""
    x1 = jnp.full_like(X0, 0.3)
    got = integrate(lambda x, t: (x1 - x) / (1 - broadcast(t)), X0, time_grid(steps), "euler")
    np.testing.assert_allclose(got, x1, atol=1e-6)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(solver, order):
    """dx/dt = x cos(3t) has the solution x0 exp(sin(3t) / 3)."""
    exact = X0 * np.exp(np.sin(3.0) / 3)

    def error(steps):
        got = integrate(lambda x, t: x * jnp.cos(3 * broadcast(t)), X0, time_grid(steps), solver)
        return float(jnp.abs(got - exact).max())

    assert np.log2(error(64) / error(128)) == pytest.approx(order, abs=0.15)


def test_no_evaluation_at_the_end_of_time():
    """A network that predicts data has no velocity at t = 1."""
    for solver in ("euler", "heun"):
        got = integrate(lambda x, t: 1 / (1 - broadcast(t)) * jnp.ones_like(x), X0, time_grid(4), solver)
        assert np.isfinite(got).all()


def test_one_loop_whatever_the_number_of_steps():
    """The program does not grow with the steps: nothing is unrolled."""

    def size(steps):
        return len(str(jax.make_jaxpr(lambda x: integrate(lambda x, t: -x, x, time_grid(steps), "heun"))(X0)))

    assert abs(size(100) - size(10)) < 50


def test_unknown_solver():
    with pytest.raises(ValueError, match="'rk9' is not one of"):
        integrate(lambda x, t: x, X0, time_grid(2), "rk9")
