"""The training step of a sharded batch, compiled by the TPU compiler for chips that are not there."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest

from sisma_jax.config import AutoencoderConfig, DataConfig, MeshConfig, ModelConfig, TrainConfig
from sisma_jax.parallel import sharding
from sisma_jax.training.state import init_state
from sisma_jax.training.step import make_update
from tests.tiny import tiny_config
from tests.tpu import entries_of_buffers, tpu_devices


@pytest.mark.slow
@pytest.mark.optimized
def test_the_step_runs_the_kernels_on_every_chips_part_of_the_batch(tmp_path):
    """A small U of preset S on latents, 256 tokens and 64, in bfloat16, batch 8 on the four chips of a v5e host."""
    config = dataclasses.replace(
        tiny_config(tmp_path),
        data=DataConfig(image_size=128),
        autoencoder=AutoencoderConfig(kind="kl"),
        model=ModelConfig(depth=1, level_depths=(1,), d_model=384, patch_size=1, scan_implementation="pallas_tpu"),
        train=TrainConfig(batch_size=8, compute_dtype="bfloat16"),
    )
    mesh = sharding.make_mesh(MeshConfig(), tpu_devices("v5e:2x2"))
    abstract = jax.eval_shape(functools.partial(init_state, config))
    state = sharding.place(abstract, sharding.of_state(abstract, mesh))
    batch = {
        "moments": jax.ShapeDtypeStruct((8, 16, 16, 8), jnp.float16, sharding=sharding.over_batch(mesh)),
        "mask": jax.ShapeDtypeStruct((8, 128, 128), jnp.uint8, sharding=sharding.over_batch(mesh)),
    }
    with jax.set_mesh(mesh):
        compiled = jax.jit(make_update(config), donate_argnums=0).lower(state, batch).compile()
    text = compiled.as_text()
    assert "selective_scan_forward" in text
    assert "selective_scan_backward" in text
    # The batch stays where it is: only gradients of parameters travel.
    assert not re.search(r"(all-gather|all-to-all|collective-permute)\(", text)
    assert compiled.cost_analysis()["flops"] > 0
    # No array has the states of a chip's two examples at every step of a scan.
    assert max(entries_of_buffers(compiled)) < 2 * 256 * 768 * 16
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes > 0.9 * memory.output_size_in_bytes  # the state is updated in place
