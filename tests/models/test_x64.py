"""Under jax_enable_x64 a model is the same: parameters and computations keep their types and values."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sisma_jax.config import Config, DataConfig, TrainConfig
from sisma_jax.models.autoencoder import KlAutoencoder, KlConfig
from sisma_jax.models.factory import init_params, make_graph
from tests.models.test_denoiser import TINY

VARIANTS = {
    "SISMA": TINY,
    "four orders, skips, learned positions": dataclasses.replace(
        TINY, orders_per_layer=4, mixer_skip=True, learned_positions=8
    ),
    "SSD": dataclasses.replace(TINY, mixer="ssd", d_head=8),
    "U with SPADE": dataclasses.replace(TINY, depth=1, level_depths=(1,), mask_conditioning="spade"),
    "DiT with concatenation": dataclasses.replace(TINY, backbone="dit", mask_conditioning="concat"),
}


def assert_same(make) -> None:
    """Calls a function of no arguments with and without x64."""
    plain = make()
    with jax.enable_x64(True):
        wide = make()
    assert jax.tree.map(lambda x: x.dtype, wide) == jax.tree.map(lambda x: x.dtype, plain)
    assert not {x.dtype for x in jax.tree.leaves(wide)} & {jnp.dtype("float64"), jnp.dtype("int64")}
    chex.assert_trees_all_equal(*(jax.device_get(tree) for tree in (wide, plain)))


@pytest.mark.parametrize(("variant", "dtype"), [*((variant, "float32") for variant in VARIANTS), ("SISMA", "bfloat16")])
def test_parameters_and_predictions_are_the_same(variant: str, dtype: str):
    config = Config(data=DataConfig(image_size=16), model=VARIANTS[variant], train=TrainConfig(compute_dtype=dtype))
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 19, (2, 16, 16), np.uint8)
    xt = rng.standard_normal((2, 16, 16, 3), np.float32)
    t = np.array([0.1, 0.8], np.float32)

    def run():
        params = jax.jit(lambda: init_params(config, jax.random.key(0)))()
        # Gates open.
        opened = jax.tree.map(lambda x: x + jnp.float32(0.01), params)

        @jax.jit
        def predict(params, xt, t, mask):
            model = nnx.merge(make_graph(config), params)
            condition = model.encode({"mask": mask}, jnp.array([True, False]))
            return model(xt, t, condition), model.null(condition)

        return params, predict(opened, xt, t, mask)

    assert_same(run)


def test_the_autoencoder_is_the_same():
    config = KlConfig(block_channels=(8, 8), layers_per_block=1, norm_groups=4)
    latent = np.random.default_rng(0).standard_normal((1, 8, 8, 4), np.float32)

    def run():
        autoencoder = jax.jit(lambda: KlAutoencoder(config, rngs=nnx.Rngs(0)))()

        @jax.jit
        def decode_and_encode(autoencoder, latent):
            image = autoencoder.decode_in_tiles(latent, 6, 2)
            return image, autoencoder.decode(latent), autoencoder.encode(image, jax.random.key(1))

        return nnx.to_pure_dict(nnx.split(autoencoder)[1]), decode_and_encode(autoencoder, latent)

    assert_same(run)
