"""The TPU kernels: interpreted against float64, and compiled by the TPU compiler for chips that are not there."""

import dataclasses
import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter  # what a race detector found
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sisma_jax.config import PRESETS
from sisma_jax.kernels import selective_scan
from sisma_jax.kernels.selective_scan import pallas_tpu
from sisma_jax.kernels.selective_scan.pallas_tpu import selective_scan_pallas_tpu
from sisma_jax.kernels.selective_scan.pallas_tpu_layout import Config, Layout
from tests.kernels.scan_cases import (
    ARGUMENTS,
    BFLOAT16,
    EXTREME_DECAYS,
    FLOAT32,
    Case,
    assert_close,
    assert_right_at_extreme_decays,
    expected_results,
)
from tests.tpu import entries_of_buffers, tpu_devices

PARAMETERS = ("A", "D", "delta_bias")
interpreted = functools.partial(selective_scan_pallas_tpu, interpret=True)


@pytest.fixture
def compile_soon():
    """Interpreted kernels run for milliseconds and compile for seconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def short_chunks(monkeypatch, compile_soon):
    """Chunks of 16 steps, so that short sequences have several."""
    block_sizes = pallas_tpu.block_sizes
    monkeypatch.setattr(pallas_tpu, "block_sizes", lambda *shape: dataclasses.replace(block_sizes(*shape), steps=16))


@pytest.mark.slow
@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 37, 24, 3),
        Case(2, 37, 24, 3, reverse=True),
        Case(1, 32, 130, 2, optional=(), delta_softplus=False, reverse=True),
        Case(1, 17, 1400, 1, optional=("z", "initial_state")),
        Case(1, 1, 6, 9, optional=("D",), delta_softplus=False),
    ],
    ids=[
        "ragged",
        "ragged, reversed",
        "bare, two tiles",
        "two blocks of two strips",
        "one step, many states",
    ],
)
def test_values_and_gradients_in_float32(case):
    assert_close(case.computed(interpreted), expected_results(case), **FLOAT32)


@pytest.mark.slow
@pytest.mark.usefixtures("short_chunks")
def test_values_and_gradients_in_bfloat16():
    case = Case(2, 37, 24, 3, dtype="bfloat16")
    computed = case.computed(interpreted)
    assert computed["y"].dtype == jnp.bfloat16
    assert {name: computed[f"d {name}"].dtype.name for name in ARGUMENTS} == {n: case.dtype_of(n) for n in ARGUMENTS}
    assert_close(computed, expected_results(case), **BFLOAT16)


@pytest.mark.slow
@pytest.mark.usefixtures("compile_soon")
def test_four_thousand_steps_are_accurate():
    case = Case(1, 4096, 8, 2)
    assert_close(case.computed(interpreted), expected_results(case), value_tolerance=1e-5, gradient_tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("compile_soon")
@pytest.mark.parametrize("decay", EXTREME_DECAYS.values(), ids=EXTREME_DECAYS)
def test_long_sequences_of_extreme_decays_stay_finite_and_right(decay):
    assert_right_at_extreme_decays(lambda *inputs: interpreted(*inputs)[0], decay)


def test_an_empty_sequence_returns_the_initial_state():
    case = Case(2, 0, 6, 3)
    computed = case.computed(interpreted)
    assert computed["y"].shape == (2, 0, 6)
    np.testing.assert_array_equal(computed["final_state"], case.inputs()["initial_state"])


@pytest.mark.slow
@pytest.mark.usefixtures("short_chunks")
@hypothesis.settings(max_examples=4, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    case=st.builds(
        Case,
        batch=st.integers(1, 3),
        length=st.integers(1, 50),
        d_inner=st.integers(1, 300),
        d_state=st.integers(1, 3),
        optional=st.lists(st.sampled_from(ARGUMENTS[5:]), unique=True).map(tuple),
        delta_softplus=st.just(True),
        reverse=st.booleans(),
    )
)
def test_values_and_gradients_at_odd_shapes(case):
    assert_close(case.computed(interpreted), expected_results(case), **FLOAT32)


RACES = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)


@pytest.mark.slow
@pytest.mark.usefixtures("short_chunks")
def test_no_races_between_cores_or_copies():
    case = Case(2, 32, 8, 1, reverse=True)
    scan = functools.partial(selective_scan_pallas_tpu, interpret=RACES)
    assert_close(case.computed(scan), expected_results(case), **FLOAT32)
    assert not interpreter.races.races_found


def test_the_search_for_races_finds_one():
    def add(x, total):
        total[...] += x[...]

    x = jnp.ones((16, 128))
    # Two cores add to the same block.
    racing = pl.pallas_call(
        add,
        grid=(2,),
        in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((8, 128), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=RACES,
    )
    try:
        jax.block_until_ready(racing(x))
    except jax.errors.JaxRuntimeError as error:  # from JAX 0.12 on
        assert "RACE DETECTED" in str(error)  # noqa: PT017
    else:
        assert interpreter.races.races_found


@pytest.mark.slow
def test_a_sharded_batch_stays_where_it_is():
    case = Case(4, 5, 8, 2)
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), auto, devices=jax.devices()[:4])
    scan = functools.partial(selective_scan_pallas_tpu, interpret=pltpu.InterpretParams(), delta_softplus=True)
    specs = {name: jax.P() if name in PARAMETERS else jax.P(("data", "fsdp")) for name in ARGUMENTS}
    mapped = jax.shard_map(lambda x: scan(**x), mesh=mesh, in_specs=(specs,), out_specs=(jax.P(("data", "fsdp")),) * 2)
    computed = case.computed(lambda delta_softplus, reverse, **inputs: mapped(inputs))
    assert_close(computed, expected_results(case), **FLOAT32)


@hypothesis.given(
    batch=st.integers(1, 9),
    length=st.integers(1, 100_000),
    d_inner=st.integers(1, 5000),
    d_state=st.integers(1, 128),
    itemsize=st.sampled_from([2, 4]),
)
def test_block_sizes_cover_the_channels_and_fit_in_vmem(batch, length, d_inner, d_state, itemsize):
    sizes = pallas_tpu.block_sizes(batch, length, d_inner, d_state, itemsize)
    blocks = -(-d_inner // sizes.channels)
    # Less than a tile too many in each block; one block if it is not too wide, but two for one example.
    assert 0 <= blocks * sizes.channels - d_inner < 128 * blocks
    assert blocks == max(-(-d_inner // 2304), 2 if batch == 1 and d_inner > 128 else 1)
    assert 1 <= sizes.tiles <= 4
    # The registers of A, dh and dA.
    assert sizes.tiles == 1 or 3 * sizes.tiles * -(-d_state // 8) <= 24
    assert sizes.steps in (16, 32, 64, 128)
    assert sizes.steps == 16 or sizes.steps < 2 * length
    assert pallas_tpu._vmem_bytes(sizes, d_state, itemsize) <= pallas_tpu.VMEM_BUDGET_BYTES


@pytest.mark.parametrize("d_model", sorted({sizes["d_model"] for sizes in PRESETS.values()}))
def test_no_preset_is_padded(d_model):
    assert 2 * d_model % pallas_tpu.block_sizes(8, 1024, 2 * d_model, 16, 2).channels == 0


def test_states_too_large_for_vmem_are_refused():
    with pytest.raises(NotImplementedError, match="4096 states per channel, which do not fit in VMEM"):
        pallas_tpu.block_sizes(2, 1024, 1024, 4096, 4)


@pytest.mark.parametrize("d_state", [1, 16, 43])
def test_projections_reach_the_matrix_unit_without_rounding(d_state):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(2, 37, d_state)) * 10.0 ** rng.integers(-20, 20, size=(2, 37, d_state))).astype(np.float32)
    config = Config(pallas_tpu.BlockSizes(tiles=1, strips=1, steps=16), False, False, False)
    layout = Layout.of(config, jnp.zeros((2, 37, 128)), jnp.zeros((128, d_state)), backward=False)
    # Under jit, where XLA may replace a cast to bfloat16 and back by nothing.
    lanes = np.asarray(jax.jit(layout.to_projection)(x)).reshape(2, 48, layout.projection_lanes)
    np.testing.assert_array_equal(lanes, lanes.astype(jnp.bfloat16).astype(np.float32))
    parts = lanes[:, :, : 3 * layout.padded_state].reshape(2, 48, 3, layout.padded_state)
    total = parts[:, :, 2] + (parts[:, :, 1] + parts[:, :, 0])
    np.testing.assert_array_equal(total[:, :37, :d_state], x)
    assert not np.any(total[:, 37:])
    assert not np.any(total[:, :, d_state:])
    assert layout.projection_lanes % 128 == 0


def test_float64_is_refused_by_name():
    with jax.enable_x64(True):
        inputs = {name: jnp.asarray(x, "float64") for name, x in Case(1, 3, 4, 2, optional=()).inputs().items()}
        with pytest.raises(NotImplementedError, match="u: got dtype float64, pallas_tpu supports float32 and bfloat16"):
            selective_scan(**inputs, implementation="pallas_tpu")


def shapes(batch, length, d_inner, d_state, dtype, place):
    """Arguments as a denoiser passes them, and z; `place` gives each its sharding by name."""
    sizes = {
        "u": (batch, length, d_inner),
        "delta": (batch, length, d_inner),
        "A": (d_inner, d_state),
        "B": (batch, length, d_state),
        "C": (batch, length, d_state),
        "D": (d_inner,),
        "z": (batch, length, d_inner),
        "delta_bias": (d_inner,),
    }
    return {
        name: jax.ShapeDtypeStruct(shape, "float32", sharding=place("whole"))
        if name in PARAMETERS
        else jax.ShapeDtypeStruct(shape, dtype, sharding=place("batch"))
        for name, shape in sizes.items()
    }


def value_and_gradients(inputs, cotangent, implementation="pallas_tpu"):
    y, vjp = jax.vjp(
        lambda inputs: selective_scan(**inputs, delta_softplus=True, implementation=implementation), inputs
    )
    return y, vjp(cotangent)[0]


def on_one(devices):
    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    return lambda _: sharding


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_preset_compiles_and_keeps_to_its_memory(topology, dtype, direction):
    batch, length, d_state = 8, 1024, 16
    place = on_one(tpu_devices(topology))
    widths = sorted({2 * sizes["d_model"] for sizes in PRESETS.values()})
    inputs = [shapes(batch, length, width, d_state, dtype, place) for width in widths]
    if direction == "forward":
        lowered = jax.jit(
            lambda inputs: [selective_scan(**x, delta_softplus=True, implementation="pallas_tpu") for x in inputs]
        ).lower(inputs)
    else:
        cotangents = [x["u"] for x in inputs]
        lowered = jax.jit(
            lambda inputs, cotangents: [value_and_gradients(x, dy) for x, dy in zip(inputs, cotangents, strict=True)]
        ).lower(inputs, cotangents)
    compiled = lowered.compile()
    assert compiled.as_text().count("tpu_custom_call") >= len(widths) * (1 if direction == "forward" else 2)
    assert max(entries_of_buffers(compiled)) < batch * length * min(widths) * d_state
    memory = compiled.memory_analysis()
    # A state per chunk of 128 steps.
    states = sum(4 * batch * (length // 128) * d_state * width for width in widths)
    assert memory.temp_size_in_bytes <= 1.25 * states + 0.1 * memory.argument_size_in_bytes


def test_the_search_for_large_buffers_finds_one():
    place = on_one(tpu_devices("v5e:2x2"))
    inputs = shapes(1, 256, 256, 16, "float32", place)
    function = functools.partial(value_and_gradients, implementation="associative")
    compiled = jax.jit(function).lower(inputs, inputs["u"]).compile()
    assert max(entries_of_buffers(compiled)) >= 256 * 256 * 16


def loss(inputs):
    return jnp.sum(selective_scan(**inputs, delta_softplus=True, implementation="pallas_tpu").astype(jnp.float32) ** 2)


@pytest.mark.parametrize("transformed", [jax.grad(loss), jax.grad(jax.checkpoint(loss))], ids=["grad", "checkpoint"])
def test_gradients_compile(transformed):
    inputs = shapes(2, 256, 256, 4, "float32", on_one(tpu_devices("v5e:2x2")))
    assert "tpu_custom_call" in jax.jit(transformed).lower(inputs).compile().as_text()


def test_vmap_compiles():
    inputs = shapes(2, 256, 256, 4, "float32", on_one(tpu_devices("v5e:2x2")))
    stacked = {
        name: x if name in PARAMETERS else jax.ShapeDtypeStruct((3, *x.shape), x.dtype, sharding=x.sharding)
        for name, x in inputs.items()
    }
    axes = {name: None if name in PARAMETERS else 0 for name in inputs}
    mapped = jax.jit(jax.vmap(jax.grad(loss), in_axes=(axes,)))
    assert "tpu_custom_call" in mapped.lower(stacked).compile().as_text()


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_a_sharded_batch_compiles_without_moving(axis_type):
    devices = np.array(tpu_devices("v5e:2x2")).reshape(2, 2)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp"), axis_types=(axis_type, axis_type))
    specs = {"whole": jax.P(), "batch": jax.P(("data", "fsdp"))}
    with jax.set_mesh(mesh):
        inputs = shapes(8, 256, 256, 4, "bfloat16", lambda kind: jax.NamedSharding(mesh, specs[kind]))
        text = jax.jit(value_and_gradients).lower(inputs, inputs["u"]).compile().as_text()
    assert "tpu_custom_call" in text
    assert not re.search(r"(all-gather|all-to-all|collective-permute)\(", text)
    assert re.search(r"all-reduce(-start)?\(", text)  # the gradients of parameters


def test_chips_without_an_example_of_their_own_take_channels():
    mesh = jax.sharding.Mesh(np.array(tpu_devices("v5e:2x2")).reshape(2, 2), ("data", "fsdp"))
    with jax.set_mesh(mesh):
        inputs = shapes(2, 256, 256, 4, "float32", lambda _: jax.NamedSharding(mesh, jax.P()))
        text = jax.jit(value_and_gradients).lower(inputs, inputs["u"]).compile().as_text()
    kernels = [line for line in text.splitlines() if "tpu_custom_call" in line]
    assert len(kernels) == 2
    assert all("f32[1,256,128]" in line and "f32[2,256,256]" not in line for line in kernels)


def test_shard_map_compiles():
    mesh = jax.sharding.Mesh(np.array(tpu_devices("v5e:2x2")), ("data",))
    specs = {"whole": jax.P(), "batch": jax.P("data")}
    inputs = shapes(8, 256, 256, 4, "float32", lambda kind: jax.NamedSharding(mesh, specs[kind]))
    in_specs = {name: jax.P() if name in PARAMETERS else jax.P("data") for name in inputs}
    mapped = jax.shard_map(
        jax.value_and_grad(lambda inputs: jax.lax.psum(loss(inputs), "data")),
        mesh=mesh,
        in_specs=(in_specs,),
        out_specs=(jax.P(), in_specs),
    )
    assert "tpu_custom_call" in jax.jit(mapped).lower(inputs).compile().as_text()
