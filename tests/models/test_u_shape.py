"""The U of SISMA blocks: resolutions, skip connections, and the flat denoiser's interface."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sisma_jax.config import PRESETS, Config, DataConfig, preset
from sisma_jax.errors import InputError
from sisma_jax.models.condition import Condition
from sisma_jax.models.factory import init_params
from sisma_jax.models.scan_orders import orders_of_layer
from sisma_jax.models.u_shape import Level
from tests.models.test_denoiser import NUM_CLASSES, TINY, make_inputs, make_model, predict

U = dataclasses.replace(TINY, depth=1, level_depths=(1, 2))


def make_level() -> Level:
    return make_model(U).layers.levels[0]


def test_down_is_a_strided_convolution_and_up_a_transposed_one():
    level = make_level()
    x = jax.random.normal(jax.random.key(0), (2, 6, 4, 16))
    dimensions = ("NHWC", "HWIO", "NHWC")
    kernel = level.down.kernel[...].reshape(2, 2, 16, 16)
    down = jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=dimensions)
    np.testing.assert_allclose(level.to_coarser(x), down + level.down.bias[...][None, None, None], atol=1e-5)
    kernel = level.up.kernel[...].reshape(16, 2, 2, 16)
    up = np.einsum("bhwi,ipqo->bhpwqo", x, kernel).reshape(2, 12, 8, 16)
    bias = np.tile(np.asarray(level.up.bias[...]).reshape(1, 2, 1, 2, 16), (6, 1, 4, 1, 1)).reshape(12, 8, 16)
    np.testing.assert_allclose(level.to_finer(x), up + bias, atol=1e-5)


@pytest.mark.parametrize("conditioning", ["cross", "concat"])
def test_a_u_is_the_composition_of_its_blocks(conditioning):
    """Against blocks called one by one: which meets which, in which order of scanning, at which resolution."""
    model = make_model(dataclasses.replace(U, mask_conditioning=conditioning))
    layer = 0

    def run(block, x, condition, *skip):
        nonlocal layer
        paths = tuple(order.path(*x.shape[1:3]) for order in orders_of_layer(layer, 1))
        layer += 1
        return block(x, embedding, block.read(condition, paths), paths, *skip)

    def layers(stack):
        graph, params = nnx.split(stack.stacked)
        depth = jax.tree.leaves(params)[0].shape[0]
        return [nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], params)) for i in range(depth)]

    keys = jax.random.split(jax.random.key(3), 3)
    x, features = jax.random.normal(keys[0], (2, 1, 8, 4, 16))
    embedding = jax.random.normal(keys[1], (1, 16))
    got = jax.jit(lambda x: model.layers(x, embedding, Condition(features)))(x)

    skips, conditions = [], [Condition(features)]
    for level in model.layers.levels:
        for block in layers(level.encoder):
            x = run(block, x, conditions[-1])
            skips.append(x)
        x = level.to_coarser(x)
        conditions.append(level.coarsen(conditions[-1]))
    for block in layers(model.layers.bottom):
        x = run(block, x, conditions.pop())
    for level in reversed(model.layers.levels):
        x = level.to_finer(x)
        for block in layers(level.decoder):
            x = run(block, x, conditions[-1], skips.pop())
        conditions.pop()
    assert layer == 7
    assert x.shape == got.shape
    # Sums of tens of terms in another order, through seven layers.
    np.testing.assert_allclose(got, x, rtol=1e-3, atol=1e-4)


def test_the_mask_is_read_at_every_resolution():
    def make():
        model = make_model(U)
        readers = [model.layers.bottom.stacked.reader]
        for level in model.layers.levels:
            readers += [level.encoder.stacked.reader, level.decoder.stacked.block.reader]
        return model, readers

    xt, t, mask = make_inputs(side=16)
    other = (mask + 1) % NUM_CLASSES
    for kept in range(len(make()[1])):
        model, readers = make()
        for i, reader in enumerate(readers):
            if i != kept:
                reader.out_proj.kernel[...] = jnp.zeros_like(reader.out_proj.kernel[...])
        assert np.abs(predict(model, xt, t, mask) - predict(model, xt, t, other)).max() > 1e-4


def test_gradients_reach_every_parameter_and_remat_changes_none():
    xt, t, mask = make_inputs(side=8)  # 2x2 tokens at the bottom: A means nothing to a sequence of one
    config = dataclasses.replace(TINY, depth=1, level_depths=(1,))

    def gradients(remat):
        graph, params = nnx.split(make_model(dataclasses.replace(config, remat=remat)))

        def loss(params):
            model = nnx.merge(graph, params)
            return (model(xt, t, model.encode({"mask": mask})) ** 2).mean()

        return nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))

    plain, recomputed = gradients("none"), gradients("full")
    # The learned null stands for a mask that is not given; here it is.
    for grads in (plain, recomputed):
        grads["condition_encoder"]["mask_encoder"].pop("null")
    largest = jax.tree.map(lambda x: float(np.abs(x).max()), plain)
    assert min(jax.tree.leaves(largest)) > 0, largest
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), plain, recomputed)


def test_sizes_that_cannot_be_halved_are_refused():
    model = make_model(U)
    with pytest.raises(ValueError, match=r"want multiples of 8 \(the patch size 2, halved 2 times\)"):
        model(jnp.ones((1, 12, 8, 3)), jnp.ones((1,)), Condition(jnp.ones((1, 6, 4, 16))))
    with pytest.raises(InputError, match=r"data.image_size 60 is not a multiple of 8.*halved 2 times"):
        Config(data=DataConfig(image_size=60), model=U)
    with pytest.raises(InputError, match=r"model.level_depths must be numbers that are each positive"):
        dataclasses.replace(U, level_depths=(1, 0))
    with pytest.raises(InputError, match=r"model.level_depths must be a tuple of int"):
        dataclasses.replace(U, level_depths=(1.5,))


def test_presets_of_the_u_are_a_block_deeper():
    for name in ("S", "B", "L", "XL"):
        flat, u = preset(name), preset(f"U-{name}")
        assert u.depth + 2 * sum(u.level_depths) == flat.depth + 1
        assert (len(u.level_depths), u.d_model) == (3, flat.d_model)
    assert len(PRESETS) == 8


def test_learned_positions_belong_to_one_grid():
    config = dataclasses.replace(TINY, learned_positions=4)
    model = make_model(config)
    xt, t, mask = make_inputs()
    base = predict(model, xt, t, mask)
    model.positions.grid[...] = model.positions.grid[...] + jnp.eye(16)[None, :4]
    assert np.abs(predict(model, xt, t, mask) - base).max() > 1e-3
    with pytest.raises(ValueError, match="want that of positions"):
        predict(model, *make_inputs(side=16))


def test_without_feed_forward_a_block_is_its_mixers():
    params = jax.eval_shape(
        lambda: init_params(Config(model=dataclasses.replace(TINY, mlp_ratio=0)), jax.random.key(0))
    )
    layers = params["layers"]["stacked"]
    assert set(layers) == {"mixer", "reader", "modulation"}
    assert layers["modulation"]["kernel"].shape == (2, 16, 6 * 16)


def test_a_new_mixer_with_a_skip_adds_its_input():
    plain, skipping = (
        make_model(dataclasses.replace(TINY, depth=1, mixer_skip=skip), trained=False) for skip in (False, True)
    )
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 16))
    paths = tuple(order.path(4, 4) for order in orders_of_layer(0, 1))

    def mix(model):
        graph, params = nnx.split(model.layers.stacked)
        return nnx.merge(graph, jax.tree.map(lambda x: x[0], params)).mixer(x, None, paths)

    np.testing.assert_allclose(mix(skipping), mix(plain) + x, atol=1e-6)
