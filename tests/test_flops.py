"""Operation counts against what the shapes say, and against XLA's where it can count."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from sisma_jax.config import MeshConfig, preset
from sisma_jax.flops import Flops, count
from sisma_jax.kernels import ssd
from sisma_jax.kernels.selective_scan import selective_scan
from sisma_jax.kernels.ssd import CHUNK_STEPS
from sisma_jax.parallel import sharding
from sisma_jax.planning import programs
from tests.tiny import tiny_config
from tests.tpu import tpu_devices


def _count(function, *shapes) -> Flops:
    return count(jax.jit(function).trace(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).jaxpr)


def test_products_and_convolutions():
    assert _count(lambda x, y: x @ y, (5, 6), (6, 7)).matmul == 2 * 5 * 6 * 7
    assert _count(lambda x, y: jnp.einsum("bij,bjk->bik", x, y), (3, 5, 6), (3, 6, 7)).matmul == 2 * 3 * 5 * 6 * 7
    conv = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(2, 2),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    assert _count(conv, (2, 8, 8, 6), (3, 3, 6, 10)).matmul == 2 * (2 * 4 * 4 * 10) * (3 * 3 * 6)
    grouped = functools.partial(conv, feature_group_count=3)
    assert _count(grouped, (2, 8, 8, 6), (3, 3, 2, 9)).matmul == 2 * (2 * 4 * 4 * 9) * (3 * 3 * 2)


def test_a_loops_body_counts_for_every_iteration_where_xlas_own_count_takes_it_once():
    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, weights)[0]

    assert _count(layers, (8, 16), (12, 16, 16)) == Flops(matmul=12 * 2 * 8 * 16 * 16, elementwise=12 * 8 * 16)
    compiled = jax.jit(layers).lower(jnp.ones((8, 16)), jnp.ones((12, 16, 16))).compile()
    assert compiled.cost_analysis()["flops"] < 2 * (2 * 8 * 16 * 16)


def test_recomputation_counts():
    def loss(x, w):
        return jnp.tanh(x @ w).sum()

    shapes = [(8, 16), (16, 16)]
    plain = _count(jax.grad(loss, argnums=(0, 1)), *shapes).matmul
    recomputing = jax.checkpoint(loss, policy=jax.checkpoint_policies.nothing_saveable)
    assert plain == 3 * 2 * 8 * 16 * 16
    assert _count(jax.grad(recomputing, argnums=(0, 1)), *shapes).matmul >= plain


def test_each_device_does_its_part_of_a_shard_map():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    product = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(jax.P("data"), jax.P()), out_specs=jax.P("data"))
    assert _count(product, (16, 4), (4, 4)).matmul == 2 * 16 * 4 * 4


def test_kernels_count_what_they_estimate():
    def kernel(x, y):
        y[...] = x[...]

    estimate = pl.CostEstimate(flops=1000, transcendentals=10, bytes_accessed=0)
    call = pl.pallas_call(kernel, jax.ShapeDtypeStruct((8, 128), jnp.float32), cost_estimate=estimate, interpret=True)
    assert _count(call, (8, 128)) == Flops(kernels=1010)


def test_the_scans_estimate_is_about_that_of_its_recurrence():
    """Three multiplications, two additions and an exponential for each entry of the state, and what is around them."""
    batch, length, d_inner, d_state = 2, 128, 256, 16

    def scan(u, delta, A, B, C):
        return selective_scan(u, delta, A, B, C, implementation="pallas_tpu")

    sequence, projection = (batch, length, d_inner), (batch, length, d_state)
    shapes = (sequence, sequence, (d_inner, d_state), projection, projection)
    entries = batch * length * d_inner * d_state
    assert 6 * entries <= _count(scan, *shapes).kernels <= 8 * entries
    device = jax.sharding.SingleDeviceSharding(tpu_devices("v5e:2x2")[0])
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=device) for shape in shapes]
    compiled = jax.jit(scan).lower(*arguments).compile()
    # The compiler takes the estimate over: it does not see into kernels.
    assert 6 * entries <= compiled.cost_analysis()["flops"] <= 7 * entries


def test_the_products_of_ssd():
    """Per token: in a chunk, C · B once for all heads and a product with u; then reading and writing the state."""
    batch, length, heads, channels, d_state = 2, 4 * CHUNK_STEPS, 3, 8, 16
    sequence, projection = (batch, length, heads * channels), (batch, length, d_state)
    counted = _count(ssd, sequence, (batch, length, heads), (heads,), projection, projection)
    per_token = 2 * CHUNK_STEPS * (d_state + heads * channels) + 2 * 2 * heads * channels * d_state
    assert counted.matmul == batch * length * per_token
    # An exponential and two products per head and pair of steps, and what is around them.
    pairs = batch * length * CHUNK_STEPS * heads
    assert 4 * pairs <= counted.elementwise <= 8 * pairs


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_a_training_step_takes_six_operations_per_parameter_and_token(remat, tmp_path):
    """Two forward and four backward, of the weights that every token meets; those of the time meet one per face."""
    config = dataclasses.replace(tiny_config(tmp_path), model=preset("S", patch_size=2, remat=remat, d_label=8))
    mesh = sharding.make_mesh(MeshConfig())
    batch, tokens = 8, 8 * 8
    params = programs.abstract_state(config, mesh).params
    layers = params["layers"][sharding.STACKED]
    of_time = sum(x.size for x in jax.tree.leaves(layers["modulation"]))
    matrices = sum(
        x.size
        for path, x in jax.tree_util.tree_leaves_with_path(layers)
        if path[-1].key == "kernel" and len(x.shape) == 3 and path[0].key != "modulation"
    )
    expected = 6 * batch * (tokens * matrices + of_time)
    counted = count(programs.trace_update(config, mesh, batch).jaxpr)
    # The rest is the mask encoder, embedding and head.
    assert expected < counted.matmul < 1.1 * expected
