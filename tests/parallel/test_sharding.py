"""The mesh: one training on it as on one device, its shardings, and what it refuses."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sisma_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from sisma_jax.errors import InputError
from sisma_jax.parallel import sharding
from sisma_jax.training.state import init_state
from sisma_jax.training.step import jit_update, make_update
from tests.tiny import tiny_config

NUM_STEPS = 2


def wide_config(mesh: MeshConfig) -> Config:
    """A model wide enough that its matrices are split."""
    config = tiny_config(".")
    model = dataclasses.replace(config.model, depth=2, d_model=128, d_state=16)
    return dataclasses.replace(config, model=model, mesh=mesh)


def batches() -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        {
            "image": rng.integers(0, 256, (8, 16, 16, 3), np.uint8),
            "mask": rng.integers(0, 19, (8, 16, 16), np.uint8),
        }
        for _ in range(NUM_STEPS)
    ]


@functools.cache
def trained(**axes: int):
    """State and losses after some steps on a mesh."""
    config = wide_config(MeshConfig(**axes))
    count = np.prod([max(size, 1) for size in axes.values()])
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:count])
    abstract = jax.eval_shape(functools.partial(init_state, config))
    shardings = sharding.of_state(abstract, mesh)
    with jax.set_mesh(mesh):
        state = jax.jit(functools.partial(init_state, config), out_shardings=shardings)()
        update = jit_update(make_update(config), state, mesh)
        metrics = []
        for batch in batches():
            state, values = update(state, sharding.to_devices(batch, mesh, 8))
            metrics.append(values)
    return state, jax.device_get(metrics)


@pytest.mark.parametrize("axes", [{"data": 1, "fsdp": 8}, {"data": 4, "fsdp": 2}], ids=str)
def test_fsdp_trains_as_one_device_does(axes):
    state, metrics = trained(**axes)
    alone, metrics_alone = trained(data=1)
    chex.assert_trees_all_close(metrics, metrics_alone, rtol=1e-5)
    # Adam divides by the gradient's own size, so what rounding changes it magnifies, to a learning rate at most.
    chex.assert_trees_all_close(*(jax.device_get((s.params, s.ema)) for s in (state, alone)), atol=2e-4)
    moments = [jax.device_get(s.opt_state[1][0].mu) for s in (state, alone)]
    chex.assert_trees_all_close(*moments, rtol=1e-4, atol=1e-6)


def test_fsdp_leaves_each_device_its_part_of_the_state():
    state, _ = trained(data=1, fsdp=8)
    large = [x for x in jax.tree.leaves((state.params, state.ema, state.opt_state)) if x.size >= 1 << 16]
    assert large
    assert all(shard.data.size * 8 == x.size for x in large for shard in x.addressable_shards)
    kernel = state.params["layers"]["stacked"]["mixer"]["in_proj"]["kernel"]
    moment = state.opt_state[1][0].mu["layers"]["stacked"]["mixer"]["in_proj"]["kernel"]
    assert kernel.sharding.spec == moment.sharding.spec
    assert kernel.sharding.spec[0] is None  # the axis of layers is whole: the loop cuts it


@given(data=st.sampled_from([1, 2, 4]), fsdp=st.sampled_from([1, 2]), rows=st.integers(1, 3), whole=st.booleans())
def test_rows_reach_their_devices(data, fsdp, rows, whole):
    mesh = sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp), jax.devices()[: data * fsdp])
    batch_size = rows * data * fsdp
    x = np.arange(batch_size * 4).reshape(batch_size, 4)
    assert sharding.batch_shards(mesh, 0) == list(range(data * fsdp))
    placed = sharding.to_devices({"x": x}, mesh, batch_size)["x"]
    np.testing.assert_array_equal(placed, x)
    assert all(shard.data.shape == (rows, 4) for shard in placed.addressable_shards)


def test_arrays_of_every_rank_reach_the_devices_that_share_the_batch():
    mesh = sharding.make_mesh(MeshConfig(data=2, seq=4))
    batch = {"mask": (8, 8, 8), "image": (8, 8, 8, 3), "style": (8, 8), "weight": (8,)}
    batch = {name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for name, shape in batch.items()}
    placed = sharding.to_devices(batch, mesh, 8)
    for name, x in batch.items():
        np.testing.assert_array_equal(placed[name], x)
        rows = (2,) if x.ndim > 2 else x.shape[1:2]  # of an image; a vector has none
        assert {shard.data.shape for shard in placed[name].addressable_shards} == {(4, *rows, *x.shape[2:])}


def test_arrays_come_back_whole():
    mesh = sharding.make_mesh(MeshConfig(fsdp=8))
    x = np.arange(1 << 17, dtype=np.float32).reshape(-1, 8)
    shardings = sharding.of_state({"x": x}, mesh)
    split = sharding.distribute({"x": x}, shardings)
    assert split["x"].addressable_shards[0].data.size * 8 == x.size
    whole = sharding.fetch(split, mesh)["x"]
    np.testing.assert_array_equal(whole, x)
    assert len(whole.devices()) == 1


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"fsdp": 3}, "^mesh.fsdp 3 times mesh.seq 1 does not divide the 8 devices"),
        ({"fsdp": 16}, "^mesh.fsdp 16 times mesh.seq 1 does not divide the 8 devices"),
        ({"data": 3, "seq": 2}, "^mesh.data 3 x mesh.fsdp 1 x mesh.seq 2 are 6 devices, but there are 8"),
    ],
)
def test_a_mesh_that_is_not_of_all_devices_is_refused(axes, message):
    with pytest.raises(InputError, match=message):
        sharding.make_mesh(MeshConfig(**axes))


def test_what_the_devices_cannot_share_is_refused():
    config = Config(data=DataConfig(image_size=64), model=ModelConfig(patch_size=4))
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, seq=2))
    sharding.require_fit(config, mesh, 8, accumulate_steps=2)
    with pytest.raises(InputError, match=r"^train.batch_size 6 is not a multiple of the 4 devices"):
        sharding.require_fit(config, mesh, 6)
    with pytest.raises(InputError, match=r"4 devices .* that share it times train.accumulate_steps 4"):
        sharding.require_fit(config, mesh, 8, accumulate_steps=4)
    tall = dataclasses.replace(config, data=DataConfig(image_size=60))
    with pytest.raises(InputError, match=r"^mesh.seq 2 does not divide the 15 rows"):
        sharding.require_fit(tall, mesh, 8)


def test_activations_are_left_alone_without_a_mesh():
    x = jnp.ones((2, 4, 4, 3))
    assert sharding.constrain(x) is x
