"""The denoiser of every backbone: what goes in changes what comes out, shapes, types, parameters."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sisma_jax.config import Config, ModelConfig, preset
from sisma_jax.data.classes import CELEBAMASK_HQ
from sisma_jax.models.condition import Condition
from sisma_jax.models.denoiser import Denoiser
from sisma_jax.models.factory import init_params, layer_parts, make_graph
from sisma_jax.models.layers import make_block
from sisma_jax.models.patches import depth_to_space, overlap_add, space_to_depth, windows
from sisma_jax.models.scan_orders import orders_of_layer

NUM_CLASSES = len(CELEBAMASK_HQ)
TINY = ModelConfig(depth=2, d_model=16, patch_size=2, d_state=4, mlp_ratio=2.0, d_label=8)


def random_params(abstract: nnx.State, seed: int = 1) -> nnx.State:
    """Values like those of a trained model, gates and heads included, so that every path carries signal.

    By NumPy: to compile the initialisation takes longer than most tests.
    """
    rng = np.random.default_rng(seed)

    def draw(path: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
        name = next(part.key for part in reversed(path) if getattr(part, "key", "value") != "value")
        fan_in = x.shape[-2] if name == "kernel" and len(x.shape) > 1 else 100
        noise = rng.standard_normal(x.shape, np.float32) * min(fan_in**-0.5, 0.5)
        centre = {"A_log": 1.0, "D": 1.0, "scale": 1.0, "skip_scale": 1.0, "dt_bias": -3.0}.get(name, 0.0)
        return jnp.asarray(centre + noise)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def make_model(config: ModelConfig = TINY, *, trained: bool = True, dtype: jnp.dtype = jnp.float32) -> Denoiser:
    def make() -> Denoiser:
        parts = layer_parts(config.backbone)
        return Denoiser(config, parts, NUM_CLASSES, 3, 1, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))

    if not trained:
        return make()
    graph, abstract = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, random_params(abstract))


def make_inputs(batch: int = 2, side: int = 8) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(2), 3)
    xt = jax.random.normal(keys[0], (batch, side, side, 3))
    t = jax.random.uniform(keys[1], (batch,))
    mask = jax.random.randint(keys[2], (batch, side, side), 0, NUM_CLASSES).astype(jnp.uint8)
    return xt, t, mask


@functools.partial(jax.jit, static_argnums=0)
def _apply(graph: nnx.GraphDef, params: nnx.State, xt: jax.Array, t: jax.Array, mask: jax.Array) -> jax.Array:
    model = nnx.merge(graph, params)
    return model(xt, t, model.encode({"mask": mask}))


def predict(model: Denoiser, xt: jax.Array, t: jax.Array, mask: jax.Array) -> np.ndarray:
    return np.asarray(_apply(*nnx.split(model), xt, t, mask))


def test_patches_invert():
    x = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))
    tokens = space_to_depth(x, 4)
    assert tokens.shape == (2, 2, 3, 48)
    np.testing.assert_array_equal(tokens[1, 1, 2].reshape(4, 4, 3), x[1, 4:8, 8:12])
    np.testing.assert_array_equal(depth_to_space(tokens, 4), x)


@pytest.mark.parametrize(("factor", "overlap"), [(1, 1), (2, 1), (4, 2), (2, 3)])
def test_windows_have_a_margin_and_overlap_add_is_their_transpose(factor, overlap):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 2 * factor, 3 * factor, 3), np.float32)
    seen = windows(jnp.asarray(x), factor, overlap)
    side = factor + 2 * overlap
    padded = np.pad(x, ((0, 0), (overlap, overlap), (overlap, overlap), (0, 0)))
    for i in range(2):
        for j in range(3):
            window = padded[:, i * factor : i * factor + side, j * factor : j * factor + side]
            np.testing.assert_allclose(seen[:, i, j], window.reshape(2, -1), rtol=1e-6)
    y = rng.standard_normal(seen.shape, np.float32)
    added = overlap_add(jnp.asarray(y), factor, overlap)
    assert added.shape == x.shape
    np.testing.assert_allclose((np.asarray(seen) * y).sum(), (np.asarray(added) * x).sum(), rtol=1e-4)


def test_patches_without_overlap_are_squares():
    x = jax.random.normal(jax.random.key(0), (1, 4, 8, 3))
    np.testing.assert_array_equal(windows(x, 2, 0), space_to_depth(x, 2))
    np.testing.assert_array_equal(overlap_add(space_to_depth(x, 2), 2, 0), x)


def test_overlapping_patches_see_their_neighbours():
    model = make_model(dataclasses.replace(TINY, depth=1, patch_overlap=1, mask_conditioning="concat"))
    xt, t, mask = make_inputs(batch=1)
    changed = xt.at[0, 2, 2].add(1.0)  # in the second patch of each axis, beside the first
    embedded = [model.embed(windows(x, 2, 1)) for x in (xt, changed)]
    assert (embedded[0] != embedded[1]).any(axis=-1)[0, :2, :2].all()
    assert predict(model, xt, t, mask).shape == xt.shape


READERS = {
    "state_from_mask": {},
    "readout_from_mask": {"cross_wiring": "readout_from_mask", "orders_per_layer": 2},
    "ssd": {"mixer": "ssd", "d_head": 16},
    "spade": {"mask_conditioning": "spade"},
    "concat": {"mask_conditioning": "concat"},
    "attention": {"backbone": "dit"},
    "pooling": {"region_pooling": True, "modulation": "shared"},
    "U": {"level_depths": (1,), "region_pooling": True},
}


@pytest.mark.parametrize("reader", READERS)
def test_what_is_read_once_gives_the_same_prediction(reader):
    model = make_model(dataclasses.replace(TINY, **READERS[reader]))
    xt, t, mask = make_inputs()
    graph, params = nnx.split(model)

    @functools.partial(jax.jit, static_argnames="is_read")
    def run(params, is_read):
        model = nnx.merge(graph, params)
        condition = model.encode({"mask": mask})
        return model(xt, t, model.read(condition) if is_read else condition)

    np.testing.assert_allclose(run(params, is_read=True), run(params, is_read=False), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("modulation", ["shared", "per_layer"])
def test_each_layer_is_modulated_by_the_time_in_its_own_way(modulation):
    model = make_model(dataclasses.replace(TINY, modulation=modulation))
    embedding = model.time(jnp.array([0.1, 0.9]))
    graph, params = nnx.split(model.layers.stacked)
    layers = [nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], params)) for i in range(2)]
    first, second = (layer.modulation(model.modulation(embedding)) for layer in layers)
    assert first.shape == (2, 9 * 16)
    assert (first != second).mean() > 0.9
    assert (first[0] != first[1]).mean() > 0.9
    # A modulation for all layers changes with the time alike in all layers.
    np.testing.assert_equal(np.allclose(first[0] - first[1], second[0] - second[1], atol=1e-5), modulation == "shared")


def test_a_new_block_is_the_identity():
    block = make_block(TINY, layer_parts("sisma"), dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    keys = jax.random.split(jax.random.key(0), 3)
    x, features = (jax.random.normal(key, (2, 4, 4, 16)) for key in keys[:2])
    embedding = jax.random.normal(keys[2], (2, 16))
    paths = (orders_of_layer(0, 1)[0].path(4, 4),)
    run = jax.jit(lambda *inputs: block(*inputs))
    read = block.read(Condition(features), paths)
    np.testing.assert_array_equal(run(x, embedding, read, paths), x)


def test_a_new_model_predicts_zero():
    model = make_model(trained=False)
    xt, t, mask = make_inputs()
    np.testing.assert_array_equal(predict(model, xt, t, mask), 0)


@pytest.mark.parametrize("wiring", ["state_from_mask", "readout_from_mask"])
@pytest.mark.parametrize("orders_per_layer", [1, 2, 4])
def test_the_mask_changes_the_output_and_only_through_cross_mamba(wiring, orders_per_layer):
    model = make_model(dataclasses.replace(TINY, cross_wiring=wiring, orders_per_layer=orders_per_layer))
    xt, t, mask = make_inputs()
    other = (mask + 1) % NUM_CLASSES
    assert np.abs(predict(model, xt, t, mask) - predict(model, xt, t, other)).max() > 1e-3
    kernel = model.layers.stacked.reader.out_proj.kernel
    kernel[...] = jnp.zeros_like(kernel[...])
    np.testing.assert_array_equal(predict(model, xt, t, mask), predict(model, xt, t, other))


def test_time_and_latent_change_the_output():
    model = make_model()
    xt, t, mask = make_inputs()
    base = predict(model, xt, t, mask)
    assert np.abs(base - predict(model, xt, t * 0.5, mask)).max() > 1e-3
    assert np.abs(base - predict(model, xt * 0.5, t, mask)).max() > 1e-3


def test_examples_of_a_batch_do_not_mix():
    model = make_model()
    xt, t, mask = make_inputs(batch=3)
    together = predict(model, xt, t, mask)
    alone = predict(model, xt[1:2], t[1:2], mask[1:2])
    # Float32 sums of ~30 terms in another order.
    np.testing.assert_allclose(together[1:2], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_any_latent_size_and_patch_size(patch_size):
    model = make_model(dataclasses.replace(TINY, patch_size=patch_size))
    mask = jnp.zeros((1, 8, 12), jnp.uint8)
    assert model.encode({"mask": mask}).mask.shape == (1, 8 // patch_size, 12 // patch_size, 16)
    assert predict(model, jnp.ones((1, 8, 12, 3)), jnp.ones((1,)), mask).shape == (1, 8, 12, 3)


def test_wrong_shapes_are_named():
    model = make_model()
    with pytest.raises(ValueError, match=r"multiples of 2 \(the patch size 2\)"):
        model(jnp.ones((1, 7, 8, 3)), jnp.ones((1,)), Condition(jnp.ones((1, 4, 4, 16))))
    with pytest.raises(ValueError, match="want the token grid"):
        model(jnp.ones((1, 8, 8, 3)), jnp.ones((1,)), Condition(jnp.ones((1, 2, 4, 16))))
    with pytest.raises(ValueError, match="want multiples of 2 pixels"):
        model.encode({"mask": jnp.zeros((1, 7, 8), jnp.uint8)})


def test_bfloat16_computes_close_to_float32_with_float32_parameters():
    xt, t, mask = make_inputs()
    exact = make_model()
    rough = make_model(dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(nnx.split(rough)[1])} == {jnp.dtype("float32")}
    want = predict(exact, xt, t, mask)
    got = predict(rough, xt, t, mask)
    assert got.dtype == jnp.float32
    # bfloat16 keeps 8 bits: each of some ten roundings in a row errs by up to 0.4 percent of its scale.
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()


@pytest.mark.slow
@pytest.mark.optimized
def test_rematerialisation_saves_memory_and_changes_no_gradient():
    config = dataclasses.replace(TINY, depth=6, mlp_ratio=4.0)
    xt, t, mask = make_inputs(side=64)

    def compiled(remat):
        graph, params = nnx.split(make_model(dataclasses.replace(config, remat=remat)))

        def loss(params):
            model = nnx.merge(graph, params)
            return (model(xt, t, model.encode({"mask": mask})) ** 2).mean()

        program = jax.jit(jax.grad(loss)).lower(params).compile()
        return program.memory_analysis().temp_size_in_bytes, nnx.to_pure_dict(program(params))

    none, dots, full = (compiled(remat) for remat in ("none", "dots", "full"))
    assert none[0] > 1.5 * dots[0] > 1.5 * full[0]
    for recomputed in (dots, full):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), none[1], recomputed[1])


@pytest.mark.parametrize(("remat", "forward_passes"), [("none", 1), ("dots", 1), ("full", 2)])
def test_only_full_rematerialisation_repeats_the_scans(remat, forward_passes):
    graph, params = nnx.split(make_model(dataclasses.replace(TINY, remat=remat, scan_implementation="pallas_tpu")))
    xt, t, mask = make_inputs()

    def loss(params):
        model = nnx.merge(graph, params)
        return (model(xt, t, model.encode({"mask": mask})) ** 2).mean()

    program = jax.jit(jax.grad(loss)).trace(params).lower(lowering_platforms=("tpu",)).as_text()
    # All layers are one loop, whose body has two scans.
    kernels = re.findall(r'kernel_name = "selective_scan_(\w+)"', program)
    assert sorted(kernels) == ["backward"] * 2 + ["forward"] * 2 * forward_passes


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_forward_mode_agrees_with_finite_differences(remat, monkeypatch):
    # Models compute in float32 at most, which is too coarse for differences.
    monkeypatch.setattr(jnp, "float32", jnp.float64)
    config = dataclasses.replace(TINY, orders_per_layer=2, remat=remat)
    with jax.enable_x64(True):
        graph, params = nnx.split(make_model(config, dtype=jnp.float64))
        params, xt, t, mask = jax.tree.map(
            lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, (params, *make_inputs())
        )
        keys = jax.random.split(jax.random.key(0), 2)
        # Times move by -1 per unit, as they do along a path of the flow.
        tangent = (jax.random.normal(keys[0], xt.shape, xt.dtype), -jnp.ones_like(t))

        def run(xt, t):
            return nnx.merge(graph, params)(xt, t, nnx.merge(graph, params).encode({"mask": mask}))

        _, computed = jax.jit(lambda: jax.jvp(run, (xt, t), tangent))()
        step = 1e-7
        above, below = (
            jax.jit(run)(*(x + sign * step * dx for x, dx in zip((xt, t), tangent, strict=True))) for sign in (1, -1)
        )
        expected = (above - below) / (2 * step)
        assert computed.dtype == jnp.float64
    # The differences lose seven of sixteen digits, and as many more to time features with frequencies up to 1,000.
    np.testing.assert_allclose(computed, expected, rtol=0, atol=1e-7 * np.abs(expected).max())


def test_graph_and_parameters_are_the_model():
    config = Config(model=TINY)
    graph = make_graph(config)
    assert graph == make_graph(config)
    assert hash(graph) == hash(make_graph(config))
    params = init_params(config, jax.random.key(0))
    layers = params["layers"]["stacked"]
    assert all(type(x) is dict for x in (params, layers, layers["mixer"]))
    xt, t, mask = make_inputs(side=64)
    assert predict(nnx.merge(graph, params), xt, t, mask).shape == xt.shape


@pytest.mark.parametrize("name", ["S", "XL"])
def test_presets_have_the_parameters_of_their_depth_and_width(name):
    config = Config(model=preset(name))
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(params["layers"]))
    depth, d_model = config.model.depth, config.model.d_model
    # Self-Mamba 6, Cross-Mamba 8, feed-forward 8, modulation 9 square matrices; the scan's projections are thin.
    assert count == pytest.approx(31 * depth * d_model**2, rel=0.05)


def test_a_tiny_model_overfits_one_batch():
    """Two images, told apart by their masks alone, are learned by heart."""
    model = make_model(dataclasses.replace(TINY, d_model=32), trained=False)
    graph, params = nnx.split(model)
    _, t, mask = make_inputs()
    x1 = jax.random.uniform(jax.random.key(5), (2, 8, 8, 3), minval=-1.0)
    optimizer = optax.adam(5e-3)

    @jax.jit
    def step(params, opt_state, key):
        def loss(params):
            model = nnx.merge(graph, params)
            x0 = jax.random.normal(key, x1.shape)
            xt = t[:, None, None, None] * x1 + (1 - t[:, None, None, None]) * x0
            return ((model(xt, t, model.encode({"mask": mask})) - x1) ** 2).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state = optimizer.init(params)
    losses = []
    for key in jax.random.split(jax.random.key(6), 150):
        params, opt_state, value = step(params, opt_state, key)
        losses.append(float(value))
    assert losses[0] > 0.25
    assert np.mean(losses[-10:]) < 0.02 * losses[0]
