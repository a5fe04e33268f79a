"""What is kept, what is painted, and the way from one to the other."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sisma_jax.diffusion import editing
from sisma_jax.diffusion.solvers import SOLVERS, integrate, time_grid
from sisma_jax.errors import InputError
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


@hypothesis.given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_no_part_of_a_region_is_lost_when_it_is_resized(size, new_size, data):
    region = np.zeros((size, size), bool)
    row, column = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, size - 1))
    region[row, column] = True
    resized = editing.resize_region(region, new_size)
    assert resized.shape == (new_size, new_size)
    assert resized.any()
    inside = np.argwhere(resized).mean(0) / new_size
    assert np.abs(inside - (np.array([row, column]) + 0.5) / size).max() <= 1 / size + 1 / new_size


@hypothesis.given(hnp.arrays(bool, (9, 11)).filter(np.any), st.floats(0, 5))
def test_weights_fall_from_the_region_to_the_margin(region, margin):
    weight = editing.feather(region, margin)
    points = np.argwhere(region)
    distance = np.array([[np.hypot(*(points - [i, j]).T).min() for j in range(11)] for i in range(9)])
    np.testing.assert_allclose(weight, np.clip(1 - distance / (margin + 1), 0, 1), atol=1e-4)


@pytest.mark.parametrize("size", [4, 8, 12, 20])
def test_the_composite_keeps_every_bit_where_nothing_is_painted(size):
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (12, 18, 3), np.uint8)
    before = photo.copy()
    painted = rng.integers(0, 256, (size, size, 3), np.uint8)
    weight = np.zeros((12, 12), np.float32)
    weight[4:7, 2:9], weight[8, 3] = 1.0, 0.5
    result = editing.composite(photo, painted, weight)
    np.testing.assert_array_equal(photo, before)
    touched = np.zeros((12, 18), bool)
    touched[:, 3:15] = weight > 0
    np.testing.assert_array_equal(result[~touched], photo[~touched])
    if size == 12:
        np.testing.assert_array_equal(result[4:7, 5:12], painted[4:7, 2:9])
        np.testing.assert_allclose(result[8, 6], (painted[8, 3] + photo[8, 6].astype(float)) / 2, atol=0.5)


def test_a_region_is_where_an_array_is_not_zero():
    expected = np.eye(3, dtype=bool)
    for value in (expected, np.eye(3), (200 * np.eye(3)).astype(np.uint16), np.eye(3).tolist()):
        np.testing.assert_array_equal(editing.as_region(value), expected)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((0, 4)), r"region must be an array \(H, W\), got float64 \(0, 4\)"),
        (np.zeros((4, 4, 3)), r"region must be an array \(H, W\), got float64 \(4, 4, 3\)"),
        (None, r"region must be an array \(H, W\), got object"),
        (np.full((4, 4), np.nan), "region has values that are not finite"),
    ],
)
def test_other_regions_are_refused_by_name(value, message):
    with pytest.raises(InputError, match=message):
        editing.as_region(value)


def test_the_central_square_of_a_region_is_taken_and_what_is_left_out_is_said(caplog):
    region = np.zeros((4, 8), bool)
    region[:, 3:5] = True
    np.testing.assert_array_equal(editing.central_region(region, (40, 80)), region[:, 2:6])
    np.testing.assert_array_equal(editing.central_region(region[:, 2:6], (40, 80)), region[:, 2:6])
    assert not caplog.text
    region[:, :2] = True
    editing.central_region(region, (40, 80))
    assert "50 % of the region lie outside of the central square" in caplog.text


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (np.zeros((4, 8), bool), "there is nothing to generate"),
        (np.arange(8)[None] * np.ones((4, 1)) < 2, "region lies outside of the photograph's central square"),
        (np.ones((8, 4), bool), r"region is 4x8 pixels and the photograph 80x40"),
    ],
)
def test_regions_that_an_edit_cannot_generate_are_refused(region, message):
    with pytest.raises(InputError, match=message):
        editing.central_region(region, (40, 80))


def test_masks_of_different_sizes_are_not_compared():
    mask = np.zeros((4, 4), np.uint8)
    with pytest.raises(InputError, match=r"mask is \(4, 4\) and image_mask \(5, 4\)"):
        editing.changed_regions([mask], [np.zeros((5, 4), np.uint8)])
    with pytest.raises(InputError, match="image_mask has 2 masks for 3 edited ones"):
        editing.changed_regions([mask] * 3, [mask] * 2)
