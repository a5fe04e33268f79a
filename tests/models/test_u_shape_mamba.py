"""Against outputs of U-Shape Mamba's public PyTorch code.

golden/u_shape_mamba.npz holds a state dictionary of random float16 values, and in float32 what that code (commit
431af0f) makes of it on a CPU: USM(input_size=16, patch_size=1, in_channels=4, hidden_size=16, depth=13, num_classes=0,
learn_sigma=False, learn_pos_emb=True, skip_conn=True, use_convtranspose=True), with timm's PatchEmbed as the
convolution that it is and mamba_ssm's scan, which needs a GPU, as a loop over time in float64. Depth 13 has all eight
scan orders and two blocks a level; a random change to any one of the weights moves the output by more than the test's
tolerance.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sisma_jax.config import ModelConfig
from sisma_jax.errors import InputError
from sisma_jax.models.condition import Condition
from sisma_jax.models.denoiser import Denoiser
from sisma_jax.models.factory import layer_parts
from sisma_jax.models.u_shape_mamba import convert, model_config
from tests.models.test_denoiser import NUM_CLASSES

GOLDEN = Path(__file__).parent / "golden" / "u_shape_mamba.npz"


@functools.cache
def golden() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns weights by name, and the rest."""
    with np.load(GOLDEN) as file:
        content = dict(file)
    shapes = json.loads(str(content.pop("shapes")))
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
    values = np.split(content.pop("weights"), ends[:-1])
    weights = {name: x.reshape(shape) for (name, shape), x in zip(shapes.items(), values, strict=True)}
    return weights, content


def abstract_model(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    def make():
        options = {"dtype": jnp.dtype("float32"), "rngs": nnx.Rngs(0)}
        return Denoiser(config, layer_parts("sisma"), NUM_CLASSES, 4, 1, **options)

    return nnx.split(nnx.eval_shape(make))


def run_converted(config: ModelConfig) -> np.ndarray:
    """Returns the output for the golden input, NCHW as PyTorch has it."""
    weights, content = golden()

    graph, abstract = abstract_model(config)
    # As initialisation leaves what is not converted: no gate open.
    fresh = jax.tree.map(lambda x: jnp.zeros(x.shape), nnx.to_pure_dict(abstract))
    params = convert(weights, fresh)

    @jax.jit
    def run(params, x, t, features):
        return nnx.merge(graph, params)(x, t, Condition(features))

    features = jax.random.normal(jax.random.key(0), (2, 16, 16, config.d_model))
    x = content["x"].transpose(0, 2, 3, 1)
    return np.asarray(run(params, x, content["t"] / 1000, features)).transpose(0, 3, 1, 2)


def test_outputs_are_those_of_u_shape_mamba():
    weights, content = golden()
    config = model_config(weights)
    assert (config.level_depths, config.depth, config.d_model, config.learned_positions) == ((2, 2, 2), 1, 16, 16)
    np.testing.assert_allclose(run_converted(config), content["output"], rtol=1e-4, atol=1e-4)


def test_new_sub_layers_leave_the_outputs_until_they_are_trained():
    weights, content = golden()
    config = model_config(weights, mask_conditioning="cross", mlp_ratio=1.0)
    np.testing.assert_allclose(run_converted(config), content["output"], rtol=1e-4, atol=1e-4)


def test_a_wrong_detail_is_noticed():
    weights, content = golden()
    wrong = dataclasses.replace(model_config(weights), order_rotation="interleaved")
    assert np.abs(run_converted(wrong) - content["output"]).max() > 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enc_blocks.0.mca.to_q.weight": np.zeros((8, 8))}, "text conditioning"),
        ({"dec_blocks.0.0.weight": np.zeros((32, 8, 3, 3))}, "pixel shuffle"),
        ({"final_layer.linear.weight": np.zeros((8, 8))}, "learn_sigma"),
        ({"middle_block.attn.self_attention.in_proj.weight": np.zeros((32, 16))}, "skip_gate"),
        ({"enc_blocks.9.skip.weight": np.zeros((8, 16))}, "encoder and a decoder of different levels"),
        ({"pos_embed": None}, "no 'pos_embed'"),
    ],
)
def test_variants_that_do_not_match_are_refused(change, message):
    weights = {name: x for name, x in (golden()[0] | change).items() if x is not None}
    with pytest.raises(InputError, match=message):
        model_config(weights)


def test_a_model_of_another_size_is_refused():
    weights, _ = golden()
    config = model_config(weights, d_state=8)

    params = nnx.to_pure_dict(abstract_model(config)[1])
    with pytest.raises(InputError, match=r"the weights for layers\.bottom\.stacked\.mixer\..*the model's are"):
        convert(weights, params)
    without = {name: x for name, x in weights.items() if name != "dec_blocks.1.skip.weight"}
    with pytest.raises(InputError, match=r"no 'dec_blocks\.1\.skip\.weight'.*skip_conn"):
        convert(without, params)
