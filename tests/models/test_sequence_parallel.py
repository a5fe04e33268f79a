"""The denoiser with the rows of each image on several devices: paths, mixers, whole models, sampling."""

import dataclasses
import functools
import math
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from sisma_jax.config import FlowConfig, MeshConfig, ModelConfig, Sampling
from sisma_jax.diffusion.sampling import sample
from sisma_jax.models.autoencoder import IdentityAutoencoder
from sisma_jax.models.mamba import SelfMamba
from sisma_jax.models.scan_orders import ORDERS, paths_of_layers
from sisma_jax.parallel import sharding
from tests.models.test_denoiser import TINY, make_inputs, make_model, random_params
from tests.tpu import tpu_devices

# Two layers have an order along rows and one along columns.
SMALL = dataclasses.replace(TINY, d_model=32, d_state=2, mlp_ratio=1.0)


def make_mesh(**sizes: int) -> jax.sharding.Mesh:
    sizes = {"data": 1} | sizes
    return sharding.make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])


def assert_close(computed, expected, tolerance: float = 1e-5) -> None:
    """Within what is asked of the parts, relative to each array's largest entry."""
    for (path, got), wanted in zip(jax.tree.leaves_with_path(computed), jax.tree.leaves(expected), strict=True):
        error, scale = np.abs(got - wanted).max(), np.abs(wanted).max()
        assert error <= tolerance * scale, f"{jax.tree_util.keystr(path)}: {error} of {scale}"


@pytest.fixture
def compile_soon():
    """These programs run for milliseconds and compile for seconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("order", ORDERS["interleaved"], ids=str)
@hypothesis.given(parts=st.integers(1, 4), height=st.integers(1, 4), width=st.integers(1, 4))
@hypothesis.settings(max_examples=10)
def test_the_parts_of_a_path_are_the_path(order, parts, height, width):
    height, width = parts * height, parts * width
    path = order.split_path(height, width, parts)
    lines = np.split(np.arange(height * width).reshape(height, width), parts, axis=int(path.along_columns))
    read = [on_device.reshape(-1)[tokens] for on_device, tokens in zip(lines, path.tokens, strict=True)]
    read = read[::-1] if path.parts_reversed else read
    np.testing.assert_array_equal(np.concatenate(read), order.path(height, width).tokens)
    np.testing.assert_array_equal(
        np.take_along_axis(path.tokens, path.places, axis=1), np.arange(height * width // parts)[None].repeat(parts, 0)
    )


@pytest.mark.usefixtures("compile_soon")
def test_mixers_of_all_orders_are_those_of_one_device():
    """Each device has one row of four, or three columns of twelve. One program for all orders, as layers are."""

    def make() -> SelfMamba:
        return SelfMamba(16, d_state=4, expand=2, d_conv=3, num_orders=1, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))

    graph, abstract = nnx.split(nnx.eval_shape(make))
    params = random_params(abstract)
    x, cotangent = jax.random.normal(jax.random.key(0), (2, 2, 4, 12, 16))

    @jax.jit
    def results(params, x, paths):
        y, vjp = jax.vjp(lambda params, x: nnx.merge(graph, params)(x, None, paths), params, x)
        return y, vjp(cotangent)

    for layer in range(8):
        whole, split = (
            jax.tree.map(lambda x: x[0], paths_of_layers([layer], 1, 4, 12, parts=parts)) for parts in (1, 4)
        )
        with jax.set_mesh(make_mesh(seq=4)):
            computed = results(params, x, split)
        assert_close(computed, results(params, x, whole))


def gradient_of(graph: nnx.GraphDef):
    """Returns (params, xt, t, mask) -> a loss and its gradient."""

    def loss(params, xt, t, mask):
        model = nnx.merge(graph, params)
        # Weights that differ, since a mean would not tell rows apart.
        weights = jnp.cos(jnp.arange(xt.size)).reshape(xt.shape)
        return (weights * model(xt, t, model.encode({"mask": mask}))).mean()

    def gradient(params, xt, t, mask):
        value, grads = jax.value_and_grad(loss)(params, xt, t, mask)
        return value, sharding.constrain_state(grads)

    return jax.jit(gradient)


def place(mesh: jax.sharding.Mesh, params, xt, t, mask):
    rows, examples = sharding.over_batch(mesh), NamedSharding(mesh, jax.P(sharding.BATCH_AXES))
    return sharding.of_state(params, mesh), rows, examples, rows


def make_problem(config: ModelConfig):
    """Returns the denoiser's graph, and its parameters and inputs: 4 x 4 tokens for each of four images."""
    graph, params = nnx.split(make_model(config))
    return graph, (nnx.to_pure_dict(params), *make_inputs(batch=4, side=8))


@functools.cache
def on_one_device(config: ModelConfig):
    graph, arguments = make_problem(config)
    return gradient_of(graph)(*arguments)


def on_mesh(config: ModelConfig, **sizes: int):
    """Returns loss and gradient, and the compiled program's text."""
    mesh = make_mesh(**sizes)
    graph, arguments = make_problem(config)
    arguments = jax.device_put(arguments, place(mesh, *arguments))
    with jax.set_mesh(mesh):
        compiled = gradient_of(graph).lower(*arguments).compile()
        return compiled(*arguments), compiled.as_text()


@pytest.mark.usefixtures("compile_soon")
def test_the_denoiser_on_three_axes_is_that_of_one_device(monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SPLIT_ENTRIES", 0)  # so that `fsdp` splits parameters as small as these
    computed, _ = on_mesh(dataclasses.replace(SMALL, remat="full"), data=2, fsdp=2, seq=2)
    assert_close(computed, on_one_device(SMALL))


@pytest.mark.usefixtures("compile_soon")
def test_on_four_devices_an_image_each_has_a_part_of_no_sequence_is_gathered():
    computed, text = on_mesh(SMALL, seq=4)
    assert_close(computed, on_one_device(SMALL))
    gathered = [
        math.prod(map(int, shape.split(",")))
        for shape in re.findall(r"\w+\[([\d,]+)\]\S* all-gather(?:-start)?\(", text)
    ]
    # Last states, and sums of step sizes, of four images in four parts. A sequence would be twice as large.
    d_inner = 2 * SMALL.d_model
    assert set(gathered) == {4 * 4 * d_inner * SMALL.d_state, 4 * 4 * d_inner}
    assert re.search(r"all-to-all(-start)?\(", text)
    assert re.search(r"collective-permute(-start)?\(", text)


U = dataclasses.replace(SMALL, depth=1, level_depths=(1,), mask_conditioning="spade", mlp_ratio=0.0)
DIT = dataclasses.replace(SMALL, backbone="dit")


@pytest.mark.usefixtures("compile_soon")
@pytest.mark.parametrize("config", [U, DIT], ids=["U with SPADE", "DiT"])
def test_the_other_denoisers_are_those_of_one_device(config):
    assert_close(on_mesh(config, data=2, seq=2)[0], on_one_device(config))


@pytest.mark.usefixtures("compile_soon")
def test_samples_are_those_of_one_device():
    config = dataclasses.replace(SMALL, mlp_ratio=0.0)
    graph, params = nnx.split(make_model(config))
    mask = make_inputs(batch=4, side=8)[2]
    settings = Sampling(steps=2, guidance=2.0)
    options = dict(autoencoder=IdentityAutoencoder(), flow=FlowConfig())

    @jax.jit
    def paint(params, keys, mask):
        return sample(nnx.merge(graph, params), keys, {"mask": mask}, settings, **options)

    keys = jax.random.split(jax.random.key(3), 4)
    expected = paint(params, keys, mask)
    mesh = make_mesh(data=2, seq=2)
    with jax.set_mesh(mesh):
        images = paint(params, keys, jax.device_put(mask, sharding.over_batch(mesh)))
    assert np.std(expected) > 10
    # Another order of sums may round to the next of 256 values.
    assert np.abs(images.astype(int) - expected.astype(int)).max() <= 1


def test_only_full_rematerialisation_repeats_the_scans_of_parts():
    def count(remat: str) -> tuple[list[str], int]:
        """The kernels, and the number of loops, in the gradient's program."""
        config = dataclasses.replace(SMALL, remat=remat, scan_implementation="pallas_tpu", mlp_ratio=0.0)
        graph, arguments = make_problem(config)
        mesh = make_mesh(seq=4)
        with jax.set_mesh(mesh):
            arguments = jax.device_put(arguments, place(mesh, *arguments))
            text = gradient_of(graph).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
        return sorted(re.findall(r'kernel_name = "selective_scan_(\w+)"', text)), text.count("stablehlo.while")

    (none, loops), (dots, loops_of_dots), (full, loops_of_full) = map(count, ("none", "dots", "full"))
    # All layers are one loop, whose body has two scans.
    assert none == dots == ["backward"] * 2 + ["forward"] * 2
    assert full == ["backward"] * 2 + ["forward"] * 4
    # To find the state from which a part starts, a scan has two loops: over the part's steps, and over the parts.
    assert loops == loops_of_dots == loops_of_full - 2 * 2


def test_the_gradient_compiles_for_chips_that_share_images():
    mesh = sharding.make_mesh(MeshConfig(data=2, seq=2), tpu_devices("v5e:2x2"))
    config = dataclasses.replace(SMALL, d_model=64, scan_implementation="pallas_tpu", remat="full", mlp_ratio=0.0)
    graph, arguments = make_problem(config)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    with jax.set_mesh(mesh):
        arguments = sharding.place(abstract, place(mesh, *abstract))
        text = gradient_of(graph).lower(*arguments).compile().as_text()
    assert "selective_scan_forward" in text
    assert "selective_scan_backward" in text
    assert re.search(r"all-to-all(-start)?\(", text)
