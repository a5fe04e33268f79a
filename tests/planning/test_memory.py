"""Bytes of the training state on each device, and what the compiler says when memory is short."""

import jax
import jax.numpy as jnp
import pytest

from sisma_jax.config import Config, DataConfig, preset
from sisma_jax.parallel import sharding, topology
from sisma_jax.planning import memory, programs
from tests.tpu import tpu_devices


def _state_bytes(name: str, parts: int) -> memory.StateBytes:
    config = Config(data=DataConfig(image_size=64), model=preset(name))
    mesh = jax.sharding.AbstractMesh((1, parts, 1), sharding.AXES)
    return memory.state_bytes(programs.abstract_state(config, mesh))


def test_the_state_is_sixteen_bytes_per_parameter():
    config = Config(data=DataConfig(image_size=64), model=preset("B"))
    mesh = jax.sharding.AbstractMesh((1, 1, 1), sharding.AXES)
    state = programs.abstract_state(config, mesh)
    parameters = 4 * sum(x.size for x in jax.tree.leaves(state.params))
    whole = memory.state_bytes(state)
    assert (whole.parameters, whole.ema) == (parameters, parameters)
    assert whole.optimizer == pytest.approx(2 * parameters, abs=8)  # and counts of steps


@pytest.mark.parametrize(
    ("name", "parts"), [*((name, parts) for name in ("B", "XL") for parts in (2, 4, 8, 16)), ("U-B", 16)]
)
def test_it_shrinks_as_the_number_of_devices_grows(name, parts):
    """But for arrays below `sharding.MIN_SPLIT_ENTRIES`, which each device has whole: 0.7% at most."""
    whole, part = _state_bytes(name, 1), _state_bytes(name, parts)
    for field in ("parameters", "ema", "optimizer"):
        split = getattr(part, field)
        exact = getattr(whole, field) / parts
        assert exact <= split <= exact + 0.007 * getattr(whole, field)


def test_a_shards_bytes_are_those_that_the_device_holds():
    mesh = jax.make_mesh((1, 8, 1), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    tree = {"large": jnp.zeros((512, 256)), "small": jnp.zeros((16,))}
    placed = sharding.distribute(tree, sharding.of_state(tree, mesh))
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(placed))
    assert memory.bytes_per_device(placed) == held == 4 * (512 * 256 // 8 + 16)


def test_the_chips_memory_is_what_the_compiler_says():
    assert topology.memory_limit(tpu_devices("v5e:2x2")[0]) == int(15.75 * 2**30)
    assert topology.memory_limit(tpu_devices("v5p:2x2x1")[0]) == pytest.approx(
        95.74 * 2**30, rel=1e-3
    )  # varies with the compiler
    assert topology.memory_limit(jax.devices("cpu")[0]) is None


def test_a_program_too_large_is_a_shortage():
    device = tpu_devices("v5e:2x2")[0]
    x = jax.ShapeDtypeStruct((2**33,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
    shortage = memory.compile_or_shortage(jax.jit(jnp.sin).trace(x), device)
    assert isinstance(shortage, memory.Shortage)
    assert shortage.needed >= 2**35


@pytest.mark.parametrize(
    ("message", "needed", "limit"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (17.19G) "
            "exceeds available HBM (15.75G).",
            17.19,
            15.75,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 26.00G "
            "of 15.75G hbm. Exceeded hbm capacity by 10.25G.",
            26.0,
            15.75,
        ),
        ("RESOURCE_EXHAUSTED: out of something", None, None),
    ],
)
def test_what_is_missing_is_read_from_the_message(message, needed, limit):
    read = topology.read_shortage(message)
    assert read == tuple(None if x is None else int(x * 2**30) for x in (needed, limit))
