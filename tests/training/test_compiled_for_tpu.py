"""The training step of a sharded batch, compiled by the TPU compiler for chips that are not there."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sisma_jax.config import ModelConfig, TrainConfig
from sisma_jax.training.sharding import over_batch, replicated
from sisma_jax.training.state import init_state
from sisma_jax.training.step import make_update
from tests.tiny import tiny_config
from tests.tpu import tpu_devices


def compile_update(tmp_path, implementation, compute_dtype):
    """A model of two blocks of preset S at 64 px, batch 8 on the four chips of a v5e host."""
    config = dataclasses.replace(
        tiny_config(tmp_path),
        model=ModelConfig(depth=2, d_model=384, patch_size=2, scan_implementation=implementation),
        train=TrainConfig(batch_size=8, compute_dtype=compute_dtype),
    )
    devices = np.array(tpu_devices("v5e:2x2"))
    mesh = jax.sharding.Mesh(devices, ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    abstract = jax.eval_shape(functools.partial(init_state, config))
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), abstract)
    batch = {
        "image": jax.ShapeDtypeStruct((8, 64, 64, 3), jnp.uint8, sharding=over_batch(mesh)),
        "mask": jax.ShapeDtypeStruct((8, 64, 64), jnp.uint8, sharding=over_batch(mesh)),
    }
    with jax.set_mesh(mesh):
        return jax.jit(make_update(config), donate_argnums=0).lower(state, batch).compile()


@pytest.mark.slow
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_the_step_runs_the_kernels_on_every_chips_part_of_the_batch(tmp_path, compute_dtype):
    kernel = compile_update(tmp_path, "pallas_tpu", compute_dtype)
    text = kernel.as_text()
    assert "selective_scan_forward" in text
    assert "selective_scan_backward" in text
    # The batch stays where it is: only gradients of parameters travel.
    assert not re.search(r"(all-gather|all-to-all|collective-permute)\(", text)
    cost, memory = kernel.cost_analysis(), kernel.memory_analysis()
    assert cost["flops"] > 0
    xla = compile_update(tmp_path, "xla", compute_dtype).memory_analysis()
    assert memory.argument_size_in_bytes == xla.argument_size_in_bytes
    assert memory.temp_size_in_bytes < xla.temp_size_in_bytes
