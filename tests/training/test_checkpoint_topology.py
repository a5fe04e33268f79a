"""Checkpoints: saved on some devices and processes, restored on others."""

import jax
import jax.numpy as jnp
import numpy as np

from sisma_jax import sharding
from sisma_jax.config import MeshConfig
from sisma_jax.training.checkpoints import Checkpoints
from tests.training.checkpoint_cases import assert_same, bits

P = jax.sharding.PartitionSpec


def test_shardings_of_the_abstract_tree_are_honoured(tmp_path):
    devices = jax.devices()
    mesh = jax.sharding.Mesh(np.array(devices), ("fsdp",))
    sharded, whole = jax.sharding.NamedSharding(mesh, P("fsdp")), jax.sharding.NamedSharding(mesh, P())
    state = {"w": jnp.arange(16.0 * len(devices)).reshape(-1, 4), "key": jax.random.key(3), "step": jnp.int32(1)}
    ema = {"w": jnp.ones((8 * len(devices), 2))}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        on_mesh = {"w": jax.device_put(state["w"], sharded), "key": state["key"], "step": state["step"]}
        checkpoints.save(1, state=on_mesh, ema=ema, iterator=None)
        target = {
            "w": jax.ShapeDtypeStruct(state["w"].shape, state["w"].dtype, sharding=sharded),
            "key": jax.ShapeDtypeStruct((), state["key"].dtype, sharding=whole),
            "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        }
        restored = checkpoints.restore(target, jax.eval_shape(lambda: ema), None)
        # The same checkpoint on another topology: one device.
        on_one = checkpoints.restore(jax.eval_shape(lambda: state), jax.eval_shape(lambda: ema), None)
    assert restored is not None
    assert on_one is not None
    assert restored.state["w"].sharding == sharded
    assert restored.state["key"].sharding.is_equivalent_to(whole, 0)
    assert restored.ema["w"].devices() == {devices[0]}
    assert on_one.state["w"].devices() == {devices[0]}
    assert_same(restored.state, state)
    assert_same(on_one.state, state)


def make_large_state() -> dict:
    """Has arrays large enough to be split over `fsdp`, and small ones."""
    kernel = jax.random.normal(jax.random.key(0), (sharding.MIN_SPLIT_ENTRIES // 64, 64))
    return {"params": {"kernel": kernel, "bias": kernel[0]}, "step": jnp.int32(7), "key": jax.random.key(1)}


def on_mesh(tree: dict, devices: int) -> dict:
    mesh = sharding.make_mesh(MeshConfig(fsdp=devices), jax.devices()[:devices])
    return sharding.place(jax.eval_shape(lambda: tree), sharding.of_state(tree, mesh))


def test_state_split_over_eight_devices_goes_on_with_four_then_one_then_eight(tmp_path):
    expected = make_large_state()
    placed = on_mesh(expected, 8)
    state = jax.tree.map(lambda x, target: jax.device_put(x, target.sharding), expected, placed)
    assert len(state["params"]["kernel"].addressable_shards[0].data) * 8 == len(expected["params"]["kernel"])
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step, devices in enumerate((4, 1, 8), start=1):
            checkpoints.save(step, state=state, ema=state["params"], iterator=None)
            target = on_mesh(expected, devices)
            restored = checkpoints.restore(target, target["params"], None)
            assert restored is not None
            assert restored.step == step
            state = restored.state
            for tree in (state["params"], restored.ema):
                kernel = tree["kernel"]
                assert kernel.sharding == target["params"]["kernel"].sharding
                assert len(kernel.addressable_shards[0].data) * devices == len(kernel)
                assert len(kernel.devices()) == devices
            for a, b in zip(bits(state), bits(expected), strict=True):
                np.testing.assert_array_equal(a, b)
