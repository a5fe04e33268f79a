import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sisma_jax.diffusion import flow

KEY = jax.random.key(0)


def pair(batch: int = 4) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(KEY, 3)
    x0, x1 = (jax.random.normal(key, (batch, 4, 4, 3)) for key in keys[:2])
    return x0, x1, jax.random.uniform(keys[2], (batch,))


def test_time_zero_is_noise_and_time_one_is_data():
    x0, x1, _ = pair()
    np.testing.assert_array_equal(flow.interpolate(x0, x1, jnp.zeros(4)), x0)
    np.testing.assert_array_equal(flow.interpolate(x0, x1, jnp.ones(4)), x1)


def test_velocity_is_the_derivative_of_the_path():
    x0, x1, t = pair()
    _, derivative = jax.jvp(lambda t: flow.interpolate(x0, x1, t), (t,), (jnp.ones_like(t),))
    np.testing.assert_allclose(derivative, x1 - x0, rtol=1e-6)


def test_times_are_logit_normal():
    t = np.asarray(flow.sample_time(KEY, 20_000, 0.5, 0.8))
    assert t.min() > 0
    assert t.max() < 1
    logits = np.log(t / (1 - t))
    # 20,000 draws: standard errors of 0.006 and 0.004.
    assert logits.mean() == pytest.approx(0.5, abs=0.03)
    assert logits.std() == pytest.approx(0.8, abs=0.02)


def test_a_shift_of_logit_normal_times_is_one_of_their_mean():
    shifted = flow.shift_time(flow.sample_time(KEY, 1000, 0.5, 0.8), 3.0)
    np.testing.assert_allclose(shifted, flow.sample_time(KEY, 1000, 0.5 - np.log(3.0), 0.8), rtol=1e-5)


def test_shifting_back_is_the_inverse():
    t = jnp.linspace(0.0, 1.0, 17)
    np.testing.assert_allclose(flow.shift_time(flow.shift_time(t, 5.0), 1 / 5.0), t, atol=1e-6)
    np.testing.assert_array_equal(flow.shift_time(t, 1.0), t)


def test_a_data_estimate_implies_the_velocity():
    x0, x1, t = pair()
    xt = flow.interpolate(x0, x1, t)
    # 1 - t is as small as 0.05 here, so float32 loses up to two digits.
    np.testing.assert_allclose(flow.to_velocity(x1, xt, t, "data"), x1 - x0, atol=1e-4)


@pytest.mark.parametrize("prediction", ["velocity", "data"])
def test_a_perfect_network_has_no_loss(prediction):
    x0, x1, _ = pair()
    t = jnp.array([0.01, 0.5, 0.97, 0.9999])
    perfect = x1 - x0 if prediction == "velocity" else x1
    np.testing.assert_array_equal(flow.loss_per_example(perfect, x0, x1, t, prediction), 0)


def test_loss_of_a_known_error():
    x0, x1, _ = pair(2)
    t = jnp.array([0.5, 0.99])
    np.testing.assert_allclose(flow.loss_per_example(x1 - x0 + 0.1, x0, x1, t, "velocity"), 0.01, rtol=1e-4)
    remaining = np.maximum(1 - np.asarray(t), flow.MIN_REMAINING_IN_LOSS)
    got = flow.loss_per_example(x1 + 0.1, x0, x1, t, "data")
    np.testing.assert_allclose(got, (0.1 / remaining) ** 2, rtol=1e-4)
