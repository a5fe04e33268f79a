import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sisma_jax.diffusion import sampling
from sisma_jax.diffusion.solvers import SOLVERS
from sisma_jax.models.autoencoder import IdentityAutoencoder
from tests.models.test_sisma import make_model

MASK = jax.random.randint(jax.random.key(3), (3, 8, 8), 0, 19).astype(jnp.uint8)
KEYS = jax.random.split(jax.random.key(0), 3)


GRAPH, PARAMS = nnx.split(make_model())


def paint(
    keys=KEYS, mask=MASK, guidance=1.0, prediction="data", steps=3, solver="euler", image=None, region=None, **settings
):
    @jax.jit
    def sample(params, keys, mask, traced_guidance, settings):
        return sampling.sample(
            nnx.merge(GRAPH, params),
            keys,
            mask,
            autoencoder=IdentityAutoencoder(),
            prediction=prediction,
            steps=steps,
            solver=solver,
            guidance=guidance if isinstance(guidance, float) and guidance == 1 else traced_guidance,
            image=None if image is None else jnp.asarray(image),
            region=None if region is None else jnp.asarray(region),
            **settings,
        )

    return np.asarray(sample(PARAMS, keys, mask, jnp.float32(guidance), jax.tree.map(jnp.float32, settings)))


def test_bytes_and_floats_are_inverse():
    image = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    assert float(sampling.from_uint8(image).min()) == -1
    assert float(sampling.from_uint8(image).max()) == 1
    np.testing.assert_array_equal(sampling.to_uint8(sampling.from_uint8(image)), image)
    np.testing.assert_array_equal(sampling.to_uint8(jnp.full((1, 1, 1, 3), 1.7)), 255)


@pytest.mark.parametrize(("prediction", "solver"), [("velocity", "euler"), *(("data", solver) for solver in SOLVERS)])
def test_samples_are_images_and_depend_on_key_and_mask(prediction, solver):
    base = paint(prediction=prediction, solver=solver)
    assert base.shape == (3, 8, 8, 3)
    assert base.dtype == np.uint8
    np.testing.assert_array_equal(base, paint(prediction=prediction, solver=solver))
    assert (base != paint(keys=KEYS[::-1], prediction=prediction, solver=solver)).any()
    assert (base != paint(mask=(MASK + 1) % 19, prediction=prediction, solver=solver)).any()


def test_an_image_does_not_depend_on_its_batch():
    together = paint().astype(int)
    alone = paint(keys=KEYS[1:2], mask=MASK[1:2]).astype(int)
    # One level of 255: rounding of sums in another order.
    assert np.abs(together[1:2] - alone).max() <= 1


def test_guidance_one_as_number_and_as_array_agree():
    one = paint(guidance=1.0).astype(int)
    traced = paint(guidance=jnp.float32(1.0)).astype(int)
    assert np.abs(one - traced).max() <= 1


def test_guidance_zero_ignores_the_mask_and_more_guidance_moves_away():
    np.testing.assert_array_equal(paint(guidance=0.0), paint(guidance=0.0, mask=(MASK + 1) % 19))
    assert (paint(guidance=1.0) != paint(guidance=4.0)).any()


def test_guided_velocity_is_the_extrapolation():
    features, null = jnp.ones((2, 1, 1, 4)), jnp.zeros((2, 1, 1, 4))

    def denoise(x, t, features):
        return x * features.mean() if features.shape[0] == x.shape[0] == 2 else x + features[:, :, :, :1]

    x, t = jnp.ones((2, 2, 2, 1)), jnp.zeros((2,))
    velocity = sampling.guided(denoise, features, null, 3.0)(x, t)
    # With the mask 2, without it 1: 1 + 3 (2 - 1).
    np.testing.assert_allclose(velocity, 4.0)


def toy_denoise(x, t, features):
    """A velocity that is not linear in any of its arguments and differs from pixel to pixel."""
    ramp = jnp.linspace(0.0, 1.0, x[0].size).reshape(1, *x.shape[1:])
    return jnp.sin(3 * x * ramp) + jnp.cos(t)[:, None, None, None] + features[:, :, :, :1] * ramp


FEATURES, NULL = jnp.linspace(0.5, 1.5, 3).reshape(3, 1, 1, 1), jnp.zeros((3, 1, 1, 1))
X, T = jax.random.normal(jax.random.key(1), (3, 4, 4, 3)), jnp.array([0.0, 0.4, 0.95])


@jax.jit
def guide(scale, low=0.0, high=1.0, rescale=0.0, x=X, t=T, features=FEATURES, null=NULL):
    return sampling.guided(toy_denoise, features, null, scale, interval=(low, high), rescale=rescale)(x, t)


@jax.jit
def guide_plainly(scale):
    with_mask, without_mask = toy_denoise(X, T, FEATURES), toy_denoise(X, T, NULL)
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
    np.testing.assert_array_equal(sampling._rescaled(extrapolated, with_mask, X, T, 0.0), extrapolated)


def test_a_constant_estimate_is_rescaled_without_division_by_zero():
    # The network says all-grey at every pixel: no deviation to bring back, none to divide by.
    grey = -X / (1 - T)[:, None, None, None]
    assert np.isfinite(sampling._rescaled(grey, grey, X, T, 1.0)).all()


@hypothesis.settings(max_examples=25)
@hypothesis.given(scales, fractions, fractions, fractions, st.integers(0, 2))
def test_guidance_does_not_mix_examples(scale, low, high, rescale, i):
    together = guide(scale, low, high, rescale)[i : i + 1]
    one = slice(i, i + 1)
    alone = guide(scale, low, high, rescale, x=X[one], t=T[one], features=FEATURES[one], null=NULL[one])
    # Velocities to 40 here, and the same rounding as above.
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=2e-5)


def test_every_setting_changes_the_samples_and_its_neutral_value_does_not():
    settings = {"shift": 1.0, "guidance_interval": (0.0, 1.0), "guidance_rescale": 0.0}
    neutral = paint(guidance=4.0, **settings)
    # One level of 255: traced values may be compiled to sums in another order.
    assert np.abs(paint(guidance=4.0).astype(int) - neutral).max() <= 1
    for changed in ({"shift": 4.0}, {"guidance_interval": (0.0, 0.5)}, {"guidance_rescale": 1.0}):
        assert (neutral != paint(guidance=4.0, **(settings | changed))).any(), changed


def test_an_empty_interval_paints_the_conditional_samples():
    unguided = paint(guidance=1.0).astype(int)
    assert (
        np.abs(unguided - paint(guidance=4.0, guidance_interval=(0.5, 0.5), guidance_rescale=0.7, shift=1.0)).max() <= 1
    )
