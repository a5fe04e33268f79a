"""Denoisers of configurations: every backbone has its parts, and stacked parameters are known by their path."""

import dataclasses
from typing import get_args, get_type_hints

import jax
import pytest
from flax import nnx

from sisma_jax.config import Config, ModelConfig
from sisma_jax.models.autoencoder import KlAutoencoder, KlConfig
from sisma_jax.models.factory import init_params, layer_parts
from sisma_jax.models.layers import LayerParts
from sisma_jax.parallel.sharding import has_layer_axis
from tests.models.test_denoiser import NUM_CLASSES, TINY


@pytest.mark.parametrize("backbone", get_args(get_type_hints(ModelConfig)["backbone"]))
def test_every_backbone_of_the_configuration_has_parts(backbone):
    assert isinstance(layer_parts(backbone), LayerParts)


@pytest.mark.parametrize("level_depths", [(), (5, 7)])
def test_exactly_the_parameters_of_layers_have_their_axis(level_depths):
    config = Config(model=dataclasses.replace(TINY, depth=11, level_depths=level_depths))
    other = dataclasses.replace(config, model=dataclasses.replace(TINY, depth=13, level_depths=level_depths))
    params, deeper = (jax.eval_shape(lambda c=c: init_params(c, jax.random.key(0))) for c in (config, other))
    depths = set()
    for (path, x), y in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(deeper), strict=True):
        if has_layer_axis(path):
            depths.add(x.shape[0])
            assert x.shape[1:] == y.shape[1:]
            assert x.shape[0] in (11, *level_depths)
        else:
            assert x.shape == y.shape
    assert depths == {11, *level_depths}


def test_an_autoencoder_has_no_axis_of_layers():
    config = KlConfig(block_channels=(8, 8), layers_per_block=1, norm_groups=4)
    params = nnx.to_pure_dict(nnx.split(nnx.eval_shape(lambda: KlAutoencoder(config, rngs=nnx.Rngs(0))))[1])
    assert not any(has_layer_axis(path) for path, _ in jax.tree.leaves_with_path(params))


def test_the_mask_encoder_has_the_classes_of_the_data():
    params = jax.eval_shape(lambda: init_params(Config(model=TINY), jax.random.key(0)))
    assert params["condition_encoder"]["mask_encoder"]["embedding"]["kernel"].shape == (NUM_CLASSES, 8)
