"""The scan kernels of traced programs, and their least time."""

import collections
import functools
import types

import jax
import jax.numpy as jnp
import pytest

from sisma_jax.config import PRESETS
from sisma_jax.kernels import selective_scan
from sisma_jax.parallel.topology import CLOCK_HZ
from sisma_jax.planning.scans import Kernel, kernel_steps, least_secs

BATCH, LENGTH, D_INNER, D_STATE = 2, 64, 256, 5
LAYERS = 3
FORWARD, BACKWARD = (Kernel(direction, "bfloat16", 8, D_INNER) for direction in ("forward", "backward"))
V5E = types.SimpleNamespace(device_kind="TPU v5 lite", num_cores=1)
V5P = types.SimpleNamespace(device_kind="TPU v5", num_cores=2)


def _layers(inputs, policy=None):
    def layer(u, _):
        return selective_scan(**{**inputs, "u": u}, implementation="pallas_tpu"), None

    layer = layer if policy is None else jax.checkpoint(layer, policy=policy, prevent_cse=False)
    return jax.lax.scan(layer, inputs["u"], length=LAYERS)[0].astype(jnp.float32).sum()


def _inputs():
    sequence = jax.ShapeDtypeStruct((BATCH, LENGTH, D_INNER), jnp.bfloat16)
    projection = jax.ShapeDtypeStruct((BATCH, LENGTH, D_STATE), jnp.bfloat16)
    A = jax.ShapeDtypeStruct((D_INNER, D_STATE), jnp.float32)
    return {"u": sequence, "delta": sequence, "A": A, "B": projection, "C": projection}


def _steps(function):
    return kernel_steps(jax.jit(function).trace(_inputs()).jaxpr)


@pytest.mark.parametrize(("policy", "forwards"), [(None, 1), (jax.checkpoint_policies.nothing_saveable, 2)])
def test_kernels_count_in_all_layers_and_again_where_they_are_repeated(policy, forwards):
    steps = LAYERS * BATCH * LENGTH
    assert _steps(functools.partial(_layers, policy=policy)) == {FORWARD: steps}
    assert _steps(jax.grad(functools.partial(_layers, policy=policy))) == {FORWARD: forwards * steps, BACKWARD: steps}


def test_of_a_conditional_the_branch_with_most_steps_counts():
    def either(inputs):
        return jax.lax.cond(inputs["A"][0, 0] > 0, _layers, lambda x: x["u"].sum().astype(jnp.float32), inputs)

    assert _steps(either) == {FORWARD: LAYERS * BATCH * LENGTH}


def test_a_device_counts_its_part_alone():
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        assert _steps(_layers) == {FORWARD: LAYERS * BATCH // 2 * LENGTH}


def test_the_least_time_is_that_of_the_bundles_on_all_cores():
    """With the bundles that docs/speed.md has, which are rounded."""
    forward, backward = (Kernel(direction, "bfloat16", 16, 1536) for direction in ("forward", "backward"))
    steps = collections.Counter({forward: 1000, backward: 500})
    assert least_secs(steps, V5E) == pytest.approx((1000 * 61.7 + 500 * 173.6) / 1.5e9, rel=2e-3)
    assert least_secs(steps, V5P) == pytest.approx((1000 * 62.1 + 500 * 177.5) / 2 / 1.75e9, rel=2e-3)
    assert least_secs(collections.Counter(), V5E) == 0


def test_sizes_that_were_not_compiled_have_no_least_time():
    assert least_secs(collections.Counter({FORWARD: 1}), V5E) is None
    cpu = types.SimpleNamespace(device_kind="cpu")
    assert least_secs(collections.Counter({FORWARD: 1}), cpu) is None
    assert least_secs(collections.Counter(), cpu) == 0


def test_the_presets_are_known_on_all_chips():
    for device_kind in CLOCK_HZ:
        for sizes in PRESETS.values():
            steps = collections.Counter(
                {Kernel(direction, "bfloat16", 16, 2 * sizes["d_model"]): 1 for direction in ("forward", "backward")}
            )
            assert least_secs(steps, types.SimpleNamespace(device_kind=device_kind, num_cores=1)) > 0
