"""The scan's Mosaic GPU kernels: interpreted on CPU with their barriers and copies, and lowered for CUDA."""

import collections
import functools
import itertools
import math
import types
import warnings

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sisma_jax.kernels import selective_scan
from sisma_jax.kernels.selective_scan import mosaic_gpu, mosaic_gpu_layout, pallas_gpu
from sisma_jax.kernels.selective_scan.mosaic_gpu import BlockSizes, selective_scan_mosaic_gpu
from sisma_jax.kernels.selective_scan.mosaic_gpu_layout import Problem, operands, parameter_shapes
from sisma_jax.kernels.selective_scan.mosaic_gpu_program import softplus
from tests.kernels.scan_cases import ARGUMENTS, BFLOAT16, CASES, FLOAT32, Case, assert_close, expected_results
from tests.kernels.test_pallas_gpu import SPECS, h100_mesh, largest_array, lowered_gradient, sharded_results

if jax.__version_info__ >= (0, 11):
    InterpretGPUParams = plgpu.InterpretGPUParams
else:
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

# JAX's interpreter of Mosaic GPU kernels emulates barriers and asynchronous copies. It calls Python for each access to
# memory, and Pallas's plain interpreter, in test_transforms.py, is for what cannot contain calls of Python.
interpreted = functools.partial(selective_scan_mosaic_gpu, interpret=InterpretGPUParams())


@pytest.fixture(autouse=True)
def compile_soon():
    """Interpreted kernels run for milliseconds and compile for seconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def blocks(monkeypatch):
    """Sets the block sizes: small ones give short problems several of everything, and compile sooner."""

    def use(d_inner=8, steps=2):
        monkeypatch.setattr(mosaic_gpu, "block_sizes", lambda d_state: BlockSizes(d_inner, d_state, steps))

    use()
    return use


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("name", ["bare, reversed", "all options", "one step", "whole chunks", "z only"])
def test_values_and_gradients_in_float32(name):
    case = CASES[name]
    assert_close(case.computed(interpreted), expected_results(case), **FLOAT32)


@pytest.mark.slow
def test_values_and_gradients_in_the_blocks_of_a_gpu():
    case = Case(1, 71, 40, 16, reverse=True)
    assert_close(case.computed(interpreted), expected_results(case), **FLOAT32)


@pytest.mark.usefixtures("blocks")
def test_values_and_gradients_in_bfloat16():
    case = Case(1, 21, 12, 5, reverse=True, dtype="bfloat16")
    computed = case.computed(interpreted)
    assert computed["y"].dtype == jnp.bfloat16
    assert computed["final_state"].dtype == jnp.float32
    assert {name: computed[f"d {name}"].dtype.name for name in ARGUMENTS} == {n: case.dtype_of(n) for n in ARGUMENTS}
    assert_close(computed, expected_results(case), **BFLOAT16)


@hypothesis.settings(max_examples=3, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 30), st.integers(1, 20), st.integers(1, 6)),
    reverse=st.booleans(),
    sizes=st.tuples(st.sampled_from([4, 8]), st.integers(1, 3)),
)
def test_values_and_gradients_at_any_shape_in_any_blocks(blocks, shape, reverse, sizes):
    blocks(*sizes)
    case = Case(*shape, reverse=reverse)
    assert_close(case.computed(interpreted), expected_results(case), **FLOAT32)


@pytest.mark.usefixtures("blocks")
def test_programs_that_go_through_several_blocks_of_channels(monkeypatch):
    monkeypatch.setattr(mosaic_gpu_layout, "PROGRAMS", 4)
    # Five blocks in three rounds: the second program's last block is outside the arrays.
    case = Case(2, 19, 39, 3)
    assert_close(case.computed(interpreted), expected_results(case), **FLOAT32)


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
            NotImplementedError, match=f"^{name}: got dtype float64, mosaic_gpu supports float32 and bfloat16"
        ):
            interpreted(**inputs)


def test_more_than_64_states_are_refused():
    inputs = {name: jnp.asarray(x, "float32") for name, x in Case(1, 2, 2, 65).inputs().items()}
    with pytest.raises(NotImplementedError, match=r"^A: got 65 states per channel, mosaic_gpu supports at most 64"):
        interpreted(**inputs)


# Step sizes and softplus


# Below -125 log 2 = -86.6, half of softplus is less than the smallest normal number of float32 and becomes zero.
@hypothesis.given(st.floats(-86.5, 100, width=32))
def test_softplus_is_accurate_where_it_is_small(x):
    # Some roundings of float32.
    np.testing.assert_allclose(softplus(jnp.float32(x)), np.logaddexp(0.0, np.float64(x)), rtol=1e-6)


# What is compiled


@pytest.mark.parametrize(("batch", "d_inner", "d_state", "dtype"), [(8, 768, 16, "float32"), (2, 2304, 64, "bfloat16")])
def test_lowering_for_cuda_without_an_array_of_all_states(batch, d_inner, d_state, dtype):
    text = lowered_gradient(selective_scan_mosaic_gpu, Case(batch, 1024, d_inner, d_state, dtype=dtype))
    assert text.count("custom_call @mosaic_gpu") == 2  # one kernel each way
    everything, partial_sums = batch * 1024 * d_inner * d_state, mosaic_gpu_layout.PROGRAMS * 1024 * d_state
    # The states at the starts of tiles are a 32nd, or a 16th with 64 states.
    assert largest_array(text) <= max(everything // 16, partial_sums)


@pytest.mark.parametrize("case", [Case(1, 1, 1, 1), Case(3, 37, 20, 40, reverse=True, optional=("z",))])
def test_lowering_for_cuda_at_ragged_sizes(case):
    assert lowered_gradient(selective_scan_mosaic_gpu, case).count("custom_call @mosaic_gpu") == 2


def test_lowering_for_cuda_where_64_bit_types_are_enabled():
    with jax.enable_x64(True):
        assert "mosaic_gpu" in lowered_gradient(selective_scan_mosaic_gpu, Case(2, 50, 40, 3, reverse=True))


def test_lowering_for_cuda_under_vmap():
    case = Case(3, 40, 24, 5)
    inputs = {name: jax.ShapeDtypeStruct((2, *x.shape), "float32") for name, x in case.inputs().items()}

    def gradient(inputs):
        return jax.grad(lambda x: jnp.sum(case.scan(selective_scan_mosaic_gpu, x)[0]))(inputs)

    text = jax.jit(jax.vmap(gradient)).trace(inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 2


def test_shard_map_knows_what_varies_over_devices():
    case = Case(4, 64, 48, 3)
    mesh = h100_mesh(2)

    def shape(x, spec):
        return jax.ShapeDtypeStruct(x.shape, "float32", sharding=jax.NamedSharding(mesh, spec))

    inputs = {name: shape(x, SPECS[name]) for name, x in case.inputs().items()}
    cotangents = tuple(shape(x, jax.P("data")) for x in case.cotangents())
    results = jax.jit(functools.partial(sharded_results, case, selective_scan_mosaic_gpu, mesh))
    with jax.sharding.use_abstract_mesh(mesh):
        text = results.trace(inputs, cotangents).lower(lowering_platforms=("cuda",)).as_text()
    # Each device has a part of three gradients: those of A, D and delta_bias.
    assert text.count("stablehlo.all_reduce") == 3


def exponentials(jaxpr, counts):
    """Adds the number of exp2 operations by the size of their arrays, each operation of a loop's body once."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "exp2":
            counts[equation.outvars[0].aval.size] += 1
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                exponentials(inner, counts)
    return counts


def test_one_exponential_per_state_and_step_in_each_pass():
    case = Case(1, 64, 32, 16)
    inputs = {name: jnp.asarray(x, "float32") for name, x in case.inputs().items()}
    scan = functools.partial(case.scan, selective_scan_mosaic_gpu)
    states = mosaic_gpu_layout.WARPS * 16 * mosaic_gpu.block_sizes(16).d_inner
    steps = mosaic_gpu.block_sizes(16).steps

    def count(function):
        return exponentials(jax.make_jaxpr(function)(inputs).jaxpr, collections.Counter())

    assert count(scan) == {states: steps}
    assert count(lambda inputs: jax.vjp(scan, inputs)[1](scan(inputs))) == {states: 3 * steps}  # `scan` runs twice


# Sizes


@pytest.mark.parametrize("d_state", [16, 64])
@pytest.mark.parametrize("batch", [1, 8, 300])
def test_partial_sums_do_not_grow_with_the_channels(batch, d_state):
    def partial_sums(d_inner):
        problem = Problem(batch, 1024, d_inner, d_state, mosaic_gpu.block_sizes(d_state), True, False, False)
        return math.prod(operands(problem)["dB"].shape)

    for d_inner in (768, 2304, 2**16, 2**20):
        assert partial_sums(d_inner) <= max(264, batch) * 1024 * d_state


@pytest.mark.parametrize(
    ("batch", "length", "d_inner", "d_state"),
    [(1, 2**20 + 5, 4104, 16), (2**16, 1024, 1536, 16), (1, 2**24, 256, 64), (3, 1000, 2**21, 8)],
)
def test_indices_of_arrays_with_more_than_2_to_the_31_entries(batch, length, d_inner, d_state):
    """No index is a product of several axes: each stays in its axis, and the hardware's addresses have 64 bits."""
    problem = Problem(batch, length, d_inner, d_state, mosaic_gpu.block_sizes(d_state), True, False, False)
    layouts = operands(problem)
    assert math.prod(layouts["u"].shape) > 2**31
    last = dict(tile=problem.tiles - 1, block=problem.blocks - 1, example=batch - 1, group=problem.groups - 1)
    for name, operand in layouts.items():
        # The kernel computes in int32; a wrapped index would be negative.
        int32 = {key: jnp.int32(value) for key, value in last.items()}
        for size, index, axis in zip(operand.shape, operand.window(problem.sizes, **int32), operand.axes, strict=True):
            start = index.start if axis in "qd" else 0 if axis == "-" else index
            assert 0 <= int(start) < 2**31 - 2**10, name
            # A window begins inside the array; only blocks of channels may be outside, which the TMA clips.
            assert int(start) < size or axis == "d", name
    assert all(size < 2**31 for shape in parameter_shapes(problem).values() for size in shape)


def test_lowering_for_cuda_with_more_than_2_to_the_31_entries():
    case = types.SimpleNamespace(batch=1, length=2**20, d_inner=4096, d_state=16)
    shapes = {"u": (1, 2**20, 4096), "delta": (1, 2**20, 4096), "A": (4096, 16)}
    shapes |= {"B": (1, 2**20, 16), "C": (1, 2**20, 16)}
    inputs = {name: jax.ShapeDtypeStruct(shape, "bfloat16") for name, shape in shapes.items()}
    scan = jax.jit(lambda inputs: selective_scan_mosaic_gpu(**inputs)[0])
    text = scan.trace(inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert "custom_call @mosaic_gpu" in text
    assert math.prod((case.length, case.d_inner)) > 2**31


# Selection


@pytest.mark.parametrize(
    ("capability", "chosen"),
    [("7.5", "triton"), ("8.0", "triton"), ("9.0", "mosaic"), ("10.0", "mosaic"), ("12.0", "triton")],
)
def test_the_kernel_is_chosen_for_the_device(capability, chosen, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    inputs = {key: jnp.asarray(x, "float32") for key, x in CASES["bare"].inputs().items()}
    text = str(jax.make_jaxpr(lambda inputs: selective_scan(**inputs))(inputs))
    assert ("selective_scan_mosaic_forward" in text) == (chosen == "mosaic")
    assert ("selective_scan_forward" in text) == (chosen == "triton")


@pytest.mark.parametrize("implementation", [selective_scan_mosaic_gpu, pallas_gpu.selective_scan_pallas_gpu])
@pytest.mark.parametrize("differentiated", [False, True])
def test_no_warning_is_given(implementation, differentiated):
    case = Case(1, 40, 24, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if differentiated:
            lowered_gradient(implementation, case)
        else:
            inputs = {name: jax.ShapeDtypeStruct(x.shape, "float32") for name, x in case.inputs().items()}
            mesh = h100_mesh(1)
            with jax.sharding.use_abstract_mesh(mesh):
                trace = jax.jit(functools.partial(case.scan, implementation)).trace(inputs)
                trace.lower(lowering_platforms=("cuda",))


def test_next_power_of_two_blocks():
    for d_state, dtype in itertools.product(range(1, 65), (4, 2)):
        sizes = mosaic_gpu.block_sizes(d_state)
        assert sizes.d_state >= d_state
        assert sizes.d_state == max(8, pl.next_power_of_2(d_state))
        # The TMA copies rows of 16 bytes; the lanes are 8 runs of channels and 4 rows of states or steps.
        assert sizes.d_state * dtype % 16 == sizes.d_inner * dtype % 16 == 0
        assert sizes.d_inner % 8 == sizes.d_state % 4 == sizes.steps % 4 == 0
