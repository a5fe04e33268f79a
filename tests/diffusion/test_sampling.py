import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sisma_jax.diffusion import sampling
from sisma_jax.models.autoencoder import IdentityAutoencoder
from tests.models.test_sisma import make_model

MASK = jax.random.randint(jax.random.key(3), (3, 8, 8), 0, 19).astype(jnp.uint8)
KEYS = jax.random.split(jax.random.key(0), 3)


GRAPH, PARAMS = nnx.split(make_model())


def paint(keys=KEYS, mask=MASK, guidance=1.0, prediction="data", steps=3, solver="euler"):
    @jax.jit
    def sample(params, keys, mask, traced_guidance):
        return sampling.sample(
            nnx.merge(GRAPH, params),
            keys,
            mask,
            autoencoder=IdentityAutoencoder(),
            prediction=prediction,
            steps=steps,
            solver=solver,
            guidance=guidance if isinstance(guidance, float) and guidance == 1 else traced_guidance,
        )

    return np.asarray(sample(PARAMS, keys, mask, jnp.float32(guidance)))


def test_bytes_and_floats_are_inverse():
    image = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    assert float(sampling.from_uint8(image).min()) == -1
    assert float(sampling.from_uint8(image).max()) == 1
    np.testing.assert_array_equal(sampling.to_uint8(sampling.from_uint8(image)), image)
    np.testing.assert_array_equal(sampling.to_uint8(jnp.full((1, 1, 1, 3), 1.7)), 255)


@pytest.mark.parametrize("prediction", ["velocity", "data"])
@pytest.mark.parametrize("solver", ["euler", "heun"])
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
