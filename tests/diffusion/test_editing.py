"""What is kept, what is painted, and the way from one to the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sisma_jax.diffusion import editing
from sisma_jax.diffusion.solvers import SOLVERS, integrate, time_grid
from tests.diffusion.test_sampling import KEYS, MASK, paint

REGION = np.zeros((8, 8), bool)
REGION[2:5, 3:7] = True


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_kept_arrives_and_what_is_painted_flows_as_before(solver):
    noise, kept = jax.random.normal(jax.random.key(0), (2, 1, 8, 8, 3))
    region = jnp.asarray(REGION)[None, ..., None]

    def velocity(x, t):
        return jnp.sin(3 * x) + t[:, None, None, None]

    times = time_grid(7, 3.0)
    edited = integrate(editing.keeping(velocity, noise, kept, region), noise, times, solver)
    painted = integrate(velocity, noise, times, solver)
    np.testing.assert_allclose(edited, jnp.where(region, painted, kept), atol=1e-5)


def test_what_is_kept_has_the_noise_of_its_time():
    noise, kept = jax.random.normal(jax.random.key(0), (2, 1, 2, 2, 3))
    seen = []

    def velocity(x, t):
        jax.debug.callback(lambda x, t: seen.append((np.asarray(x), float(t[0]))), x, t)
        return 100 * x

    region = jnp.array([[True, False], [False, False]])[None, ..., None]
    integrate(editing.keeping(velocity, noise, kept, region), noise, time_grid(4), "heun")
    jax.effects_barrier()
    assert len(seen) == 7
    for x, t in seen:
        np.testing.assert_allclose(x[:, 1], (t * kept + (1 - t) * noise)[:, 1], atol=1e-5)


def test_the_sampler_keeps_the_image_outside_of_the_region():
    image = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
    edits = paint(image=image, region=np.stack([REGION] * 3))
    np.testing.assert_array_equal(edits[:, ~REGION], np.broadcast_to(image, edits.shape)[:, ~REGION])
    assert (edits[:, REGION] != image[:, REGION]).any()
    everywhere = paint(image=image, region=np.ones((3, 8, 8), bool))
    np.testing.assert_array_equal(everywhere, paint(KEYS, MASK))


def test_a_latent_position_is_painted_if_any_of_its_pixels_is():
    got = editing.to_latent_grid(jnp.asarray(REGION)[None], 4)
    np.testing.assert_array_equal(got[0, ..., 0], [[True, True], [True, True]])
    got = editing.to_latent_grid(jnp.asarray(REGION)[None], 2)
    np.testing.assert_array_equal(got[0, ..., 0], REGION.reshape(4, 2, 4, 2).any((1, 3)))
