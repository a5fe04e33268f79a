"""Classifier-free guidance: the extrapolation, where it applies, and how far its contrast is brought back."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from sisma_jax.diffusion import guidance
from sisma_jax.models.condition import Condition


def test_guided_velocity_is_the_extrapolation():
    given, null = Condition(jnp.ones((2, 1, 1, 4))), Condition(jnp.zeros((2, 1, 1, 4)))

    def denoise(x, t, condition):
        return x + condition.mask[:, :, :, :1]

    x, t = jnp.ones((2, 2, 2, 1)), jnp.zeros((2,))
    velocity = guidance.guided(denoise, given, null, 3.0)(x, t)
    # With the mask 2, without it 1: 1 + 3 (2 - 1).
    np.testing.assert_allclose(velocity, 4.0)


def toy_denoise(x, t, condition):
    """A velocity that is not linear in any of its arguments and differs from pixel to pixel."""
    ramp = jnp.linspace(0.0, 1.0, x[0].size).reshape(1, *x.shape[1:])
    return jnp.sin(3 * x * ramp) + jnp.cos(t)[:, None, None, None] + condition.mask[:, :, :, :1] * ramp


GIVEN, NULL = Condition(jnp.linspace(0.5, 1.5, 3).reshape(3, 1, 1, 1)), Condition(jnp.zeros((3, 1, 1, 1)))
X, T = jax.random.normal(jax.random.key(1), (3, 4, 4, 3)), jnp.array([0.0, 0.4, 0.95])


@jax.jit
def guide(scale, low=0.0, high=1.0, rescale=0.0, x=X, t=T, given=GIVEN, null=NULL):
    return guidance.guided(toy_denoise, given, null, scale, interval=(low, high), rescale=rescale)(x, t)


@jax.jit
def guide_plainly(scale):
    with_mask, without_mask = toy_denoise(X, T, GIVEN), toy_denoise(X, T, NULL)
    return without_mask + scale * (with_mask - without_mask), with_mask


scales, fractions = st.floats(0, 10, width=32), st.floats(0, 1, width=32)


@hypothesis.given(scales)
def test_without_interval_and_rescaling_guidance_is_plain(scale):
    np.testing.assert_allclose(guide(scale), guide_plainly(scale)[0], atol=1e-5)


@hypothesis.given(fractions)
def test_guidance_of_scale_one_is_conditional_however_rescaled(rescale):
    # The extrapolation rounds, and so does the rescaling, whose error is divided by 1 - t = 0.05 at the last time.
    np.testing.assert_allclose(guide(1.0, rescale=rescale), guide_plainly(1.0)[1], atol=2e-5)


@hypothesis.given(scales, fractions, fractions, fractions)
def test_outside_the_interval_guidance_is_conditional_to_the_last_bit(scale, low, high, rescale):
    got = guide(scale, low, high, rescale)
    everywhere, conditional = guide(scale, rescale=rescale), guide(scale, 0.5, 0.5)
    for i, t in enumerate(T):
        np.testing.assert_array_equal(got[i], everywhere[i] if low <= t < high else conditional[i])


def test_the_null_condition_is_evaluated_only_inside_the_interval():
    rows = []

    def counted(x, t, condition):
        jax.debug.callback(lambda: rows.append(len(x)))
        return toy_denoise(x, t, condition)

    def run(t, skips):
        interval = (jnp.float32(0.3), jnp.float32(0.7))
        v = guidance.guided(counted, GIVEN, NULL, 3.0, interval=interval, skips=skips)(X, jnp.full(3, t))
        jax.effects_barrier()
        return v

    for t, wanted in ((0.1, 3), (0.5, 6), (0.7, 3)):
        rows.clear()
        skipping = run(t, skips=True)
        assert rows == [wanted]
        np.testing.assert_allclose(skipping, run(t, skips=False), atol=1e-6)


def test_one_null_condition_stands_for_all():
    one = Condition(NULL.mask[:1])
    np.testing.assert_array_equal(guide(3.0, null=one), guide(3.0))


def test_an_empty_interval_is_conditional():
    # To rounding: the network runs in batches of another size.
    np.testing.assert_allclose(guide(7.0, 0.4, 0.4, 0.5), guide_plainly(1.0)[1], atol=1e-6)
    # Each end of [low, high) at the time 0.4 itself.
    assert (guide(7.0, T[1], 1.0)[1] != guide(1.0)[1]).any()
    np.testing.assert_array_equal(guide(7.0, 0.0, T[1])[1], guide(7.0, 0.0, 0.0)[1])


@hypothesis.given(scales, fractions)
def test_rescaling_brings_the_deviation_of_the_data_estimate_back(scale, rescale):
    remaining = (1 - T)[:, None, None, None]
    plain, conditional = guide_plainly(scale)
    deviation = [np.std(X + remaining * v, axis=(1, 2, 3)) for v in (guide(scale, rescale=rescale), plain, conditional)]
    np.testing.assert_allclose(deviation[0], rescale * deviation[2] + (1 - rescale) * deviation[1], rtol=1e-4)


@hypothesis.given(scales)
def test_no_rescaling_changes_no_bit(scale):
    with_mask, without_mask = guide_plainly(1.0)[1], toy_denoise(X, T, NULL)
    extrapolated = without_mask + scale * (with_mask - without_mask)
    np.testing.assert_array_equal(guidance._rescaled(extrapolated, with_mask, X, T, 0.0), extrapolated)


def test_a_constant_estimate_is_rescaled_without_division_by_zero():
    # The network says all-grey at every pixel: no deviation to bring back, none to divide by.
    grey = -X / (1 - T)[:, None, None, None]
    assert np.isfinite(guidance._rescaled(grey, grey, X, T, 1.0)).all()


@hypothesis.settings(max_examples=25)
@hypothesis.given(scales, fractions, fractions, fractions, st.integers(0, 2))
def test_guidance_does_not_mix_examples(scale, low, high, rescale, i):
    together = guide(scale, low, high, rescale)[i : i + 1]
    one = slice(i, i + 1)
    inputs = {"x": X, "t": T, "given": GIVEN, "null": NULL}
    alone = guide(scale, low, high, rescale, **jax.tree.map(lambda rows: rows[one], inputs))
    # Velocities to 40 here, and the same rounding as above.
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=2e-5)
