"""The scan's CUDA kernels, interpreted on CPU against the reference, and lowered for CUDA at the presets' shapes."""

import functools
import math
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from sisma_jax.kernels.selective_scan import pallas_gpu
from sisma_jax.kernels.selective_scan.pallas_gpu import BlockSizes, selective_scan_pallas_gpu
from sisma_jax.kernels.selective_scan.pallas_gpu_layout import Problem, operands
from tests.kernels.scan_cases import (
    ARGUMENTS,
    BFLOAT16,
    CASES,
    EXTREME_DECAYS,
    FLOAT32,
    Case,
    assert_close,
    assert_right_at_extreme_decays,
    expected_results,
)

interpreted = functools.partial(selective_scan_pallas_gpu, interpret=True)


@pytest.fixture(autouse=True)
def compile_soon():
    """Interpreted kernels run for milliseconds and compile for seconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def blocks(monkeypatch):
    """Sets the block sizes: small ones give short problems several of everything, and compile sooner."""

    def use(d_inner=16, steps=2, chunk=16):
        def block_sizes(batch, length, _, d_state):
            return BlockSizes(d_inner, pl.next_power_of_2(d_state), steps, chunk)

        monkeypatch.setattr(pallas_gpu, "block_sizes", block_sizes)

    use()
    return use


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients_in_float32(case):
    assert_close(case.computed(interpreted), expected_results(case), **FLOAT32)


@pytest.mark.slow
def test_values_and_gradients_in_the_blocks_of_a_gpu():
    case = CASES["all options, reversed"]
    assert_close(case.computed(interpreted), expected_results(case), **FLOAT32)


@pytest.mark.slow
def test_four_thousand_steps_are_accurate():
    case = Case(1, 4096, 8, 2)
    assert_close(case.computed(interpreted), expected_results(case), value_tolerance=1e-5, gradient_tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("decay", EXTREME_DECAYS.values(), ids=EXTREME_DECAYS)
def test_long_sequences_of_extreme_decays_stay_finite_and_right(decay):
    assert_right_at_extreme_decays(lambda *inputs: interpreted(*inputs)[0], decay)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("reverse", [False, True])
def test_values_and_gradients_in_bfloat16(reverse):
    case = Case(2, 37, 24, 5, reverse=reverse, dtype="bfloat16")
    computed = case.computed(interpreted)
    assert computed["y"].dtype == jnp.bfloat16
    assert computed["final_state"].dtype == jnp.float32
    assert {name: computed[f"d {name}"].dtype.name for name in ARGUMENTS} == {n: case.dtype_of(n) for n in ARGUMENTS}
    assert_close(computed, expected_results(case), **BFLOAT16)


@hypothesis.settings(max_examples=3, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 30), st.integers(1, 20), st.integers(1, 6)),
    reverse=st.booleans(),
    sizes=st.tuples(st.sampled_from([4, 8]), st.sampled_from([1, 3, 4]), st.integers(1, 4)),
)
def test_values_and_gradients_at_any_shape_in_any_blocks(blocks, shape, reverse, sizes):
    d_inner, steps, groups = sizes
    blocks(d_inner, steps, steps * groups)
    case = Case(*shape, reverse=reverse)
    assert_close(case.computed(interpreted), expected_results(case), **FLOAT32)


@hypothesis.given(*(st.integers(1, limit) for limit in (64, 5000, 4096, 256)))
def test_block_sizes_suit_triton_and_fill_the_gpu(batch, length, d_inner, d_state):
    sizes = pallas_gpu.block_sizes(batch, length, d_inner, d_state)
    assert sizes.d_state.bit_count() == sizes.d_inner.bit_count() == 1
    assert d_state <= sizes.d_state < 2 * d_state
    assert sizes.chunk % sizes.steps == 0
    programs = batch * math.ceil(d_inner / sizes.d_inner) * math.ceil(length / sizes.chunk)
    assert programs >= 2048 or sizes.chunk <= 32


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("reverse", [False, True])
def test_an_empty_sequence_returns_the_initial_state(reverse):
    case = Case(2, 0, 6, 3, reverse=reverse)
    computed = case.computed(interpreted)
    assert computed["y"].shape == (2, 0, 6)
    np.testing.assert_array_equal(computed["final_state"], case.inputs()["initial_state"])
    np.testing.assert_array_equal(computed["d initial_state"], case.cotangents()[1])
    np.testing.assert_array_equal(computed["d A"], 0.0)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_float64_is_refused_by_name(name):
    case = Case(1, 2, 2, 2)
    with jax.enable_x64(True):
        inputs = {key: jnp.asarray(x, "float64" if key == name else "float32") for key, x in case.inputs().items()}
        with pytest.raises(
            NotImplementedError, match=f"^{name}: got dtype float64, pallas_gpu supports float32 and bfloat16"
        ):
            interpreted(**inputs)


def test_checkpointed_gradients_under_vmap(blocks):
    blocks(d_inner=4, chunk=4)
    case = Case(2, 7, 6, 3)
    inputs = {name: jnp.asarray(x, "float32") for name, x in case.inputs().items()}
    cotangents = tuple(jnp.asarray(x, "float32") for x in case.cotangents())

    def loss(inputs, scale):
        outputs = case.scan(interpreted, inputs)
        return scale * sum(jnp.vdot(x, weights) for x, weights in zip(outputs, cotangents, strict=True))

    gradients = jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss)), in_axes=(None, 0)))(inputs, jnp.arange(2.0))
    expected = {name: x for name, x in expected_results(case).items() if name.startswith("d ")}
    assert_close({f"d {name}": x[1] for name, x in gradients.items()}, expected, **FLOAT32)
    assert not any(np.any(x[0]) for x in gradients.values())


def test_vmap_is_a_loop_over_examples(blocks):
    blocks(d_inner=4, chunk=4)
    case = Case(3, 7, 6, 3)
    shared = ("A", "D", "delta_bias")

    def one_example(**example):
        options = {name: example.pop(name) for name in ("delta_softplus", "reverse")}
        example = {name: x if name in shared else x[None] for name, x in example.items()}
        return tuple(x[0] for x in interpreted(**example, **options))

    def vmapped(delta_softplus, reverse, **inputs):
        axes = {name: None if name in shared else 0 for name in inputs}
        function = functools.partial(one_example, delta_softplus=delta_softplus, reverse=reverse)
        return jax.vmap(lambda example: function(**example), in_axes=(axes,))(inputs)

    assert_close(case.computed(vmapped), expected_results(case), **FLOAT32)


def h100_mesh(size):
    """A mesh of H100s that need not be there. JAX asks for the device of a Triton kernel when it lowers it."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    return jax.sharding.AbstractMesh((size,), ("data",), (jax.sharding.AxisType.Explicit,), abstract_device=device)


SPECS = {name: jax.P() if name in ("A", "D", "delta_bias") else jax.P("data") for name in ARGUMENTS}


def sharded_results(case, implementation, mesh, inputs, cotangents, **options):
    """As `case.results`, of a scan that each device computes for its part of the batch."""
    scan = functools.partial(case.scan, implementation)
    scan = jax.shard_map(scan, mesh=mesh, in_specs=(SPECS,), out_specs=(jax.P("data"), jax.P("data")), **options)
    (y, final_state), vjp = jax.vjp(scan, inputs)
    gradients = {f"d {name}": gradient for name, gradient in vjp(cotangents)[0].items()}
    return {"y": y, "final_state": final_state} | gradients


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_shard_map_over_the_batch(axis_type, blocks):
    blocks(d_inner=4, chunk=4)
    case = Case(4, 7, 6, 3, reverse=True)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,))

    def put(x, spec):
        return jax.device_put(jnp.asarray(x, "float32"), jax.NamedSharding(mesh, spec))

    inputs = {name: put(x, SPECS[name]) for name, x in case.inputs().items()}
    cotangents = tuple(put(x, jax.P("data")) for x in case.cotangents())
    # JAX's interpreter of kernels does not know what varies over devices: it asks for check_vma=False.
    results = functools.partial(sharded_results, case, interpreted, mesh, check_vma=False)
    computed = jax.jit(results)(inputs, cotangents)
    assert not computed["y"].is_fully_replicated
    assert_close(computed, expected_results(case), **FLOAT32)


def test_shard_map_knows_what_varies_over_devices():
    case = Case(4, 64, 48, 3)
    mesh = h100_mesh(2)

    def shape(x, spec):
        return jax.ShapeDtypeStruct(x.shape, "float32", sharding=jax.NamedSharding(mesh, spec))

    inputs = {name: shape(x, SPECS[name]) for name, x in case.inputs().items()}
    cotangents = tuple(shape(x, jax.P("data")) for x in case.cotangents())
    results = jax.jit(functools.partial(sharded_results, case, selective_scan_pallas_gpu, mesh))
    with jax.sharding.use_abstract_mesh(mesh):
        text = results.trace(inputs, cotangents).lower(lowering_platforms=("cuda",)).as_text()
    # Each device has a part of three gradients: those of A, D and delta_bias.
    assert text.count("stablehlo.all_reduce") == 3


def lowered_gradient(implementation, case):
    """The text of a program for CUDA: values and gradients."""
    sequence, projection = (case.batch, case.length, case.d_inner), (case.batch, case.length, case.d_state)
    shapes = {"u": sequence, "delta": sequence, "A": (case.d_inner, case.d_state), "B": projection, "C": projection}
    shapes |= {"D": sequence[2:], "z": sequence, "delta_bias": sequence[2:]}
    shapes |= {"initial_state": (case.batch, case.d_inner, case.d_state)}
    mesh = h100_mesh(1)
    whole = jax.NamedSharding(mesh, jax.P())
    inputs = {name: jax.ShapeDtypeStruct(shape, case.dtype_of(name), sharding=whole) for name, shape in shapes.items()}
    function = jax.jit(functools.partial(case.results, implementation))
    with jax.sharding.use_abstract_mesh(mesh):
        trace = function.trace(inputs, (inputs["u"], inputs["initial_state"]))
        return trace.lower(lowering_platforms=("cuda",)).as_text()


def largest_array(text):
    shapes = re.findall(r"tensor<((?:\d+x)+)[a-z]+\d+>", text)
    return max(math.prod(map(int, shape.split("x")[:-1])) for shape in shapes)


@pytest.mark.parametrize(("batch", "dtype"), [(1, "float32"), (8, "bfloat16")])
@pytest.mark.parametrize("d_inner", [768, 1536, 2048, 2304])
def test_lowering_for_cuda_without_an_array_of_all_states(d_inner, batch, dtype):
    case = Case(batch, 1024, d_inner, 16, dtype=dtype)
    text = lowered_gradient(selective_scan_pallas_gpu, case)
    assert text.count("__gpu$xla.gpu.triton") == 6  # two passes over chunks and one over their states, both ways
    everything = batch * 1024 * d_inner * 16
    # An eighth: the states at the start of every eight steps, of which the backward pass recomputes the rest.
    assert largest_array(text) <= everything // 8


def test_lowering_for_cuda_where_64_bit_types_are_enabled():
    with jax.enable_x64(True):
        assert "__gpu$xla.gpu.triton" in lowered_gradient(selective_scan_pallas_gpu, Case(2, 50, 40, 3, reverse=True))


@pytest.mark.parametrize(("d_inner", "d_state"), [(768, 16), (1536, 64), (6144, 64)])
def test_partial_sums_of_a_call_are_bounded(d_inner, d_state):
    sizes = pallas_gpu.block_sizes(8, 1024, d_inner, d_state)
    problem = Problem(8, 1024, d_inner, d_state, sizes, True, False, False)
    parts = pallas_gpu._parts(problem)
    taken = [part.first_block + i for part in parts for i in range(part.call_blocks)]
    assert taken == list(range(problem.blocks))
    assert len(parts) <= 16
    all_sums = 4 * math.prod(operands(problem)["dB"][0])
    for part in parts:
        assert 4 * math.prod(operands(part)["dB"][0]) <= max(2**26, all_sums / 16)


@pytest.mark.parametrize("reverse", [False, True])
def test_programs_that_are_cut_into_several_calls(reverse, blocks, monkeypatch):
    blocks(d_inner=4, chunk=4)
    monkeypatch.setattr(pallas_gpu, "MAX_PARTIAL_BYTES", 1)
    monkeypatch.setattr(pallas_gpu, "MAX_PARTS", 3)
    # Five blocks in three calls, of which the last one has one block, which is ragged.
    case = Case(2, 7, 18, 3, reverse=reverse)
    assert_close(case.computed(interpreted), expected_results(case), **FLOAT32)


def test_an_array_of_all_states_would_be_found():
    case = Case(1, 1024, 768, 16)
    assert largest_array(lowered_gradient("reference", case)) >= 1024 * 768 * 16
