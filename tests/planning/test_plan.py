"""Whole plans of a tiny model, on virtual CPU devices and on TPUs that are not there."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from sisma_jax.config import MeshConfig, ModelConfig, TrainConfig
from sisma_jax.errors import InputError
from sisma_jax.parallel import sharding, topology
from sisma_jax.planning import format_plan, plan, programs, to_json
from sisma_jax.planning.plan import search_batch, train_program
from tests.tiny import tiny_config, tiny_latent_config
from tests.tpu import tpu_devices


def _wide(config, **mesh):
    """With arrays large enough to be split."""
    model = dataclasses.replace(config.model, d_model=256)
    return dataclasses.replace(config, model=model, mesh=MeshConfig(**mesh))


def test_a_plan_for_eight_cpus(tmp_path):
    config = _wide(tiny_config(tmp_path, batch_size=16), fsdp=4)
    made = plan(config, "cpu:8")
    assert (made.num_devices, made.mesh) == (8, {"data": 2, "fsdp": 4, "seq": 1})
    state = programs.abstract_state(config, sharding.make_mesh(config.mesh))
    assert made.num_parameters == sum(x.size for x in jax.tree.leaves(state.params))
    assert 4 * made.state.parameters < 4 * made.num_parameters * 1.2
    # The arguments are the state and each device's part of the batch: two images and masks of 16 px.
    of_batch = 2 * 16 * 16 * (3 + 1)
    assert made.train.memory.arguments == pytest.approx(made.state.total + of_batch, abs=64)
    assert made.train.memory.outputs < 4096  # the state takes its own place
    assert made.train.memory.temporaries > 0
    kinds = {each.kind: each for each in made.train.traffic.collectives}
    # Gathered at least once: what the other three of four devices hold.
    assert kinds["all-gather"].sent_bytes > 0
    assert "all-reduce" in kinds
    assert made.sampler.batch_size == 8  # asked for 4
    assert made.train.flops.matmul > made.train.flops.elementwise > 0
    assert (made.memory_limit, made.train.fits, made.largest_batch) == (None, None, None)
    text = format_plan(made)
    assert "no limit known" in text
    assert "all-gather" in text
    assert json.loads(to_json(made))["train"]["memory"]["arguments"] == made.train.memory.arguments


def test_the_batch_is_that_of_the_loop(tmp_path):
    config = tiny_latent_config(tmp_path, mesh=MeshConfig(fsdp=2))
    mesh = sharding.make_mesh(config.mesh)
    latents = {"mask": np.zeros((8, 16, 16), np.uint8), "moments": np.zeros((8, 8, 8, 8), np.float16)}
    given, planned = sharding.to_devices(latents, mesh, 8), programs.abstract_batch(config, mesh, 8)
    assert given.keys() == planned.keys()
    for name, x in given.items():
        assert (planned[name].shape, planned[name].dtype, planned[name].sharding) == (x.shape, x.dtype, x.sharding)


def test_the_largest_batch_of_a_compiled_program_is_found(tmp_path, monkeypatch):
    """Of one that compiles sooner than the model's: in the memory that 48 rows need, 56 do not fit."""

    def trace(config, mesh, batch_size):
        x = jax.ShapeDtypeStruct((batch_size, 64), "float32", sharding=sharding.over_batch(mesh))
        return jax.jit(lambda x: jax.numpy.sort(jax.numpy.sin(x) @ jax.numpy.ones((64, 64)), axis=-1)).trace(x)

    monkeypatch.setattr(programs, "trace_update", trace)
    config = tiny_config(tmp_path)
    mesh = sharding.make_mesh(config.mesh)
    limit = train_program(config, mesh, 48, None).memory.total
    first = train_program(config, mesh, 8, limit)
    found = search_batch(config, mesh, limit, first, fixed=0, max_trials=5)
    assert (found.batch_size, found.too_large) == (48, 56)


def test_a_plan_for_a_tpu(tmp_path):
    tpu_devices("v5e:2x2")
    config = _wide(tiny_config(tmp_path, batch_size=8, compute_dtype="bfloat16"), fsdp=4)
    made = plan(config, "v5e:2x2", search=False)
    assert made.device_kind == "TPU v5 lite"
    assert made.settings["model.scan_implementation"] == "pallas_tpu"
    assert made.train.fits
    assert made.train.flops.kernels > 0
    assert made.train.memory.code > 0
    assert made.train.traffic.collectives
    assert made.train.traffic.num_unknown_loops == 0
    assert made.least_secs == made.matmul_secs == made.train.flops.matmul / (4 * 197e12)
    assert made.train.scan_secs is None  # no preset is as narrow
    assert "the scans are left out" in format_plan(made)
    assert "15.75 GiB: fits" in format_plan(made)
    timed = dataclasses.replace(made, train=dataclasses.replace(made.train, scan_secs=0.25))
    assert timed.least_secs == made.matmul_secs + 0.25
    assert "250.0 ms of scans" in format_plan(timed)
    refused = dataclasses.replace(made.train, fits=False, memory=None, needed=2**35, traffic=None)
    assert "the compiler refuses it: it needs 32.00 GiB or more" in format_plan(
        dataclasses.replace(made, train=refused)
    )


def test_the_plan_of_a_model_with_ssd_counts_its_products(tmp_path):
    scan = tiny_config(tmp_path, batch_size=8)
    ssd = dataclasses.replace(scan, model=dataclasses.replace(scan.model, mixer="ssd", d_head=8))
    made, of_scan = (plan(config, "cpu:8", search=False) for config in (ssd, scan))
    assert (made.settings["model.mixer"], made.settings["model.scan_implementation"]) == ("ssd", "auto")
    # 16 tokens in two mixers, whose products within the chunk alone are more than those of the scan's gradient.
    assert made.train.flops.matmul > of_scan.train.flops.matmul
    assert made.train.memory.temporaries > 0
    assert "model.mixer" in format_plan(made)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("v99:2x2", {}, "cannot describe the TPU topology 'v99:2x2'"),
        ("cpu:0", {}, "has no device"),
        ("cpu:4096", {}, "xla_force_host_platform_device_count=4096"),
        ("cpu:8", {"mesh": MeshConfig(fsdp=3)}, "does not divide the 8 devices"),
        ("cpu:8", {"mesh": MeshConfig(data=2, fsdp=2)}, "are 4 devices, but there are 8"),
        ("cpu:8", {"train": TrainConfig(batch_size=12)}, "12 is not a multiple of the 8 devices"),
        ("cpu:8", {"model": ModelConfig(patch_size=4, scan_implementation="pallas_tpu")}, "leave it at auto"),
    ],
)
def test_what_cannot_be_planned_is_said_at_once(tmp_path, name, values, message):
    if name.startswith("v"):
        tpu_devices("v5e:2x2")
    with pytest.raises(InputError, match=message):
        plan(dataclasses.replace(tiny_config(tmp_path), **values), name)


@pytest.mark.parametrize("memory_gib", [0.0, float("nan"), float("inf")])
def test_memory_that_is_none_is_refused(tmp_path, memory_gib):
    with pytest.raises(InputError, match="`memory_gib` must be positive"):
        plan(tiny_config(tmp_path), "cpu:8", memory_gib=memory_gib)


def test_a_fresh_process_makes_the_cpus_that_are_asked_for():
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    code = "from sisma_jax.parallel import topology; print(len(topology.devices('cpu:6')))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "6"


def test_every_generation_of_chips_is_known():
    tpu_devices("v5e:2x2")
    for name, count in {"v4:2x2x1": 4, "v5e:4x4": 16, "v5p:2x2x1": 4, "v6e:2x2": 4, "v5e:16x16": 256}.items():
        devices = topology.devices(name)
        assert len(devices) == count
        assert sharding.make_mesh(MeshConfig(fsdp=4), devices).size == count
        assert devices[0].device_kind in topology.PEAK_FLOPS
