"""What conditions the denoiser: the mask's features, dropped or not, on their way to the layers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sisma_jax.config import ModelConfig
from sisma_jax.models.condition import Condition, ConditionEncoder
from sisma_jax.models.mask_encoder import MaskEncoder
from tests.models.test_denoiser import NUM_CLASSES, make_inputs


def make_encoder() -> ConditionEncoder:
    config = ModelConfig(d_label=8, d_model=16)
    return ConditionEncoder(config, NUM_CLASSES, 2, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))


def test_dropped_conditions_become_the_null():
    encoder, mask = make_encoder(), make_inputs()[2]
    given = encoder({"mask": mask})
    mixed = encoder({"mask": mask}, jnp.array([True, False]))
    np.testing.assert_array_equal(mixed.mask[0], encoder.null(given).mask[0])
    np.testing.assert_array_equal(mixed.mask[1], given.mask[1])
    np.testing.assert_array_equal(encoder.null(given).mask, encoder.mask_encoder.null_features((2, 4, 4, 16)))


def test_a_condition_is_a_pytree():
    encoder, mask = make_encoder(), make_inputs()[2]
    condition = jax.jit(lambda mask: encoder({"mask": mask}))(mask)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x, condition), condition)
    assert jax.tree.map(jnp.shape, condition) == Condition(mask=(2, 4, 4, 16))


def test_labels_that_are_no_class_have_the_features_of_none():
    encoder = make_encoder()
    ignored, also_ignored = (encoder({"mask": jnp.full((1, 4, 4), label, jnp.uint8)}) for label in (NUM_CLASSES, 255))
    chex.assert_trees_all_equal(ignored, also_ignored)


def test_a_single_pixel_of_a_mask_reaches_its_token():
    """A part thinner than a token is seen: the token of an 8x8 square differs when one of its 64 labels does."""
    encoder = MaskEncoder(8, NUM_CLASSES, 8, 32, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    mask = jnp.zeros((1, 32, 32), jnp.uint8)
    difference = np.abs(encoder(mask.at[0, 11, 20].set(12)) - encoder(mask)).max(axis=-1)[0]
    assert np.unravel_index(difference.argmax(), difference.shape) == (1, 2)
    assert difference[1, 2] > 0.05


def test_the_mask_encoder_wants_a_power_of_two():
    with pytest.raises(ValueError, match="downsampling 6 is not a power of two"):
        MaskEncoder(6, NUM_CLASSES, 8, 16, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
