"""Region pooling against a loop over the classes in float64, and the shares of the classes in a token."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sisma_jax.models.condition import CoarserCondition, Condition
from sisma_jax.models.region_pooling import RegionPooling
from tests.models.test_denoiser import NUM_CLASSES, TINY, make_inputs, make_model, random_params

POOLING = dataclasses.replace(TINY, region_pooling=True)


def make_pooling(d_model=4):
    graph, abstract = nnx.split(
        nnx.eval_shape(lambda: RegionPooling(d_model, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)))
    )
    return nnx.merge(graph, random_params(abstract))


def by_hand(module, x, shares):
    """The formula of the docstring for one image, float64: a weighted mean per class, then a loop over the classes."""
    x, shares = np.float64(x), np.float64(shares)

    def perceptron(mean, last):
        hidden = mean @ np.float64(module.up.kernel[...]) + np.float64(module.up.bias[...])
        hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
        return hidden @ np.float64(last.kernel[...]) + np.float64(last.bias[...])

    y = np.zeros_like(x) + perceptron(x.mean(axis=(0, 1)), module.of_image)
    for k in range(shares.shape[-1]):
        share = shares[..., k, None]
        mean = (share * x).sum(axis=(0, 1)) / max(share.sum(), 1e-3)
        y += share * perceptron(mean, module.of_region)
    return y


@hypothesis.settings(max_examples=20)
@hypothesis.given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.booleans(), st.integers(0, 2**32 - 1))
def test_pooling_is_the_formula(height, width, classes, is_hard, seed):
    rng = np.random.default_rng(seed)
    module = make_pooling()
    x = rng.standard_normal((2, height, width, 4), np.float32)
    shares = rng.random((2, height, width, classes), np.float32)
    if is_hard:  # one class per token, so that some are absent
        shares = np.eye(classes, dtype=np.float32)[shares.argmax(-1)]
    got = module(jnp.asarray(x), module.read(Condition(jnp.asarray(x), regions=jnp.asarray(shares)), ()), ())
    for i in range(2):
        np.testing.assert_allclose(got[i], by_hand(module, x[i], shares[i]), rtol=1e-4, atol=1e-4)


def test_a_token_counts_the_pixels_of_each_class():
    encoder = make_model(POOLING).condition_encoder.mask_encoder
    mask = jnp.array([[[0, 3, 3, 3], [3, 255, 3, 3]]], jnp.uint8)
    shares = encoder.class_shares(mask)
    assert shares.shape == (1, 1, 2, NUM_CLASSES)
    assert (shares[0, 0, 0, 0], shares[0, 0, 0, 3], shares[0, 0, 0].sum()) == (0.25, 0.5, 0.75)
    np.testing.assert_array_equal(shares[0, 0, 1], jax.nn.one_hot(3, NUM_CLASSES))


def test_absent_masks_have_no_regions_and_coarser_levels_have_their_mean():
    model = make_model(POOLING)
    mask = make_inputs()[2]
    condition = model.encode({"mask": mask}, jnp.array([True, False]))
    assert not condition.regions[0].any()
    assert condition.regions[1].any()
    assert not model.null(condition).regions.any()
    coarser = CoarserCondition(16, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))(condition)
    np.testing.assert_allclose(coarser.regions[1, 0, 0], condition.regions[1, :2, :2].mean(axis=(0, 1)), atol=1e-6)


def test_a_change_of_one_token_reaches_all_tokens_of_its_class_in_one_layer():
    """Even before it in the order of the scan, which the Mamba mixers of a single layer cannot do."""
    module = make_pooling()
    x = np.zeros((1, 2, 3, 4), np.float32)
    changed = x.copy()
    changed[0, 1, 2] = 1  # the last token
    shares = jax.nn.one_hot(jnp.array([[[0, 1, 0], [1, 1, 0]]]), 2)
    difference = np.abs(module(jnp.asarray(changed), shares, ()) - module(jnp.asarray(x), shares, ())).max(axis=-1)[0]
    assert (difference > 1e-4).all()  # through the mean of the image
    np.testing.assert_allclose(difference[0, 0], difference[1, 2], rtol=1e-5)  # the same class
    assert abs(difference[0, 0] - difference[0, 1]) > 1e-4
