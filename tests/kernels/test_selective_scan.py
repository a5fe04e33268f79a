"""The selective scan: every implementation against a loop in float64 NumPy, in values and in gradients."""

import functools
import inspect
import math
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from sisma_jax.kernels import selective_scan
from sisma_jax.kernels.selective_scan import api, xla
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

# Those that any platform runs; the kernels have test files of their own.
IMPLEMENTATIONS = tuple(name for name in api.IMPLEMENTATIONS if name not in api.SUPPORT_CHECKS)
# Where sequences are long: the associative scan's many levels compile for seconds.
ASSOCIATIVE_IS_SLOW = tuple(
    pytest.param(name, marks=pytest.mark.slow) if name == "associative" else name for name in IMPLEMENTATIONS
)


def numpy_scan(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The formula of `selective_scan`'s docstring, a step at a time."""
    x = case.inputs()
    delta = x["delta"] + x.get("delta_bias", 0.0)
    if case.delta_softplus:
        delta = np.logaddexp(delta, 0.0)
    h = x.get("initial_state", np.zeros((case.batch, case.d_inner, case.d_state)))
    y = np.zeros_like(x["u"])
    for t in range(case.length)[:: -1 if case.reverse else 1]:
        drive = (delta[:, t] * x["u"][:, t])[:, :, None] * x["B"][:, t, None, :]
        h = np.exp(delta[:, t, :, None] * x["A"]) * h + drive
        y[:, t] = np.sum(h * x["C"][:, t, None, :], axis=-1)
    y = y + x.get("D", 0.0) * x["u"]
    if "z" in x:
        y = y * x["z"] / (1 + np.exp(-x["z"]))
    return y, h


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_reference_is_the_formula(case):
    y, final_state = numpy_scan(case)
    # Both sum in float64, in another order.
    np.testing.assert_allclose(expected_results(case)["y"], y, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(expected_results(case)["final_state"], final_state, rtol=1e-12, atol=1e-12)


def test_the_references_gradients_are_those_of_finite_differences():
    case = Case(1, 4, 3, 2)
    with jax.enable_x64(True):
        inputs = jax.tree.map(lambda x: jnp.asarray(x, "float64"), case.inputs())
        check_grads(jax.jit(functools.partial(case.scan, "reference")), (inputs,), order=1, modes=["fwd", "rev"])


@hypothesis.settings(max_examples=4)
@hypothesis.given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 9), st.integers(1, 5)),
    optional=st.lists(st.sampled_from(ARGUMENTS[5:]), unique=True).map(tuple),
    reverse=st.booleans(),
)
def test_xlas_reverse_mode_is_the_transpose_of_its_forward_mode(sizes, optional, reverse):
    case = Case(*sizes, optional=optional, reverse=reverse)
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        inputs, cotangents = jax.tree.map(lambda x: jnp.asarray(x, "float64"), (case.inputs(), case.cotangents()))
        tangents = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), inputs)

        @jax.jit
        def products(inputs, tangents, cotangents):
            outputs, pushed = jax.jvp(functools.partial(case.scan, "xla"), (inputs,), (tangents,))
            _, pullback = jax.vjp(functools.partial(case.scan, "xla"), inputs)
            dot = functools.partial(jax.tree.map, jnp.vdot)
            return outputs, sum(dot(pushed, cotangents)), sum(dot(pullback(cotangents)[0], tangents).values())

        _, forward, backward = products(inputs, tangents, cotangents)
    # Both are sums of some thousand products; the scale is that of their terms.
    np.testing.assert_allclose(forward, backward, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_xlas_values_and_gradients_in_float32(case):
    assert_close(case.computed("xla"), expected_results(case), **FLOAT32)


@pytest.mark.parametrize("implementation", ["associative", "reference"])
@pytest.mark.parametrize("name", ["all options, reversed", "one step", "one example, one channel, one state"])
def test_the_other_implementations_values_and_gradients_in_float32(name, implementation):
    assert_close(CASES[name].computed(implementation), expected_results(CASES[name]), **FLOAT32)


@pytest.mark.parametrize(
    ("implementation", "length", "reverse"),
    [("xla", 37, False), ("xla", 37, True), ("associative", 7, True), ("reference", 7, False)],
)
def test_values_and_gradients_in_bfloat16(implementation, length, reverse):
    case = Case(2, length, 24, 5, reverse=reverse, dtype="bfloat16")
    computed = case.computed(implementation)
    assert computed["y"].dtype == jnp.bfloat16
    assert computed["final_state"].dtype == jnp.float32
    assert {name: computed[f"d {name}"].dtype.name for name in ARGUMENTS} == {n: case.dtype_of(n) for n in ARGUMENTS}
    assert_close(computed, expected_results(case), **BFLOAT16)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float64_stays_float64(implementation):
    case = Case(2, 11, 6, 3)
    with jax.enable_x64(True):
        inputs, cotangents = jax.tree.map(lambda x: jnp.asarray(x, "float64"), (case.inputs(), case.cotangents()))
        computed = jax.jit(functools.partial(case.results, implementation))(inputs, cotangents)
        assert {x.dtype.name for x in computed.values()} == {"float64"}
        # Twelve digits: a thousand roundings of 1e-16 and then some.
        assert_close(computed, expected_results(case), value_tolerance=1e-12, gradient_tolerance=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_jit(implementation):
    case = Case(2, 5, 6, 3)
    assert_close(case.computed(implementation, jit=False), expected_results(case), **FLOAT32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_twice_gives_the_same_bits(implementation):
    case = Case(2, 100, 256, 16) if implementation == "xla" else Case(2, 11, 6, 3)
    function = jax.jit(functools.partial(case.results, implementation))
    inputs, cotangents = jax.tree.map(lambda x: jnp.asarray(x, "float32"), (case.inputs(), case.cotangents()))
    for first, second in zip(*(jax.tree.leaves(function(inputs, cotangents)) for _ in range(2)), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reverse", [False, True])
def test_an_empty_sequence_returns_the_initial_state(implementation, reverse):
    case = Case(2, 0, 6, 3, reverse=reverse)
    computed = case.computed(implementation)
    assert computed["y"].shape == (2, 0, 6)
    np.testing.assert_array_equal(computed["final_state"], case.inputs()["initial_state"])
    np.testing.assert_array_equal(computed["d initial_state"], case.cotangents()[1])
    np.testing.assert_array_equal(computed["d A"], 0.0)


@pytest.mark.parametrize(
    ("sizes", "reverse"),
    [
        (xla.BlockSizes(d_inner=8, steps=5), False),
        (xla.BlockSizes(d_inner=4, steps=7), True),
        (xla.BlockSizes(d_inner=24, steps=1), True),
        (xla.BlockSizes(d_inner=12, steps=23), False),
    ],
)
def test_xla_in_any_blocks(sizes, reverse, monkeypatch):
    monkeypatch.setattr(xla, "block_sizes", lambda *_: sizes)
    case = Case(4, 23, 24, 5, reverse=reverse)
    assert_close(case.computed("xla"), expected_results(case), **FLOAT32)


@hypothesis.given(*(st.integers(1, limit) for limit in (64, 5000, 4096, 256)))
def test_block_sizes_cut_evenly_and_pad_little(batch, length, d_inner, d_state):
    sizes = xla.block_sizes(batch, length, d_inner, d_state)
    assert d_inner % sizes.d_inner == 0
    assert sizes.d_inner >= min(d_inner, 64)
    assert 1 <= sizes.steps <= 32
    chunks = math.ceil(length / sizes.steps)
    assert chunks * sizes.steps - length < chunks


@pytest.mark.parametrize(
    ("batch", "length", "d_inner", "d_state"),
    [(16, 256, 256, 8), (1, 1024, 768, 16), (2, 1024, 768, 16), (1, 4096, 1536, 16), (8, 1024, 2304, 16)],
)
def test_the_models_block_sizes_stay_in_cache_and_need_no_padding(batch, length, d_inner, d_state):
    sizes = xla.block_sizes(batch, length, d_inner, d_state)
    state_bytes = 4 * batch * sizes.d_inner * d_state
    assert 2**15 <= state_bytes <= 2**17
    assert sizes.steps * state_bytes <= 2**21
    assert length % sizes.steps == 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_is_a_loop_over_examples(implementation):
    case = Case(3, 5, 8, 4)
    inputs = {name: jnp.asarray(x, "float32") for name, x in case.inputs().items()}
    shared = ("A", "D", "delta_bias")

    def one_example(example):
        example = {name: x if name in shared else x[None] for name, x in example.items()}
        y, final_state = case.scan(implementation, example)
        return y[0], final_state[0]

    axes = {name: None if name in shared else 0 for name in inputs}
    vmapped = jax.jit(jax.vmap(one_example, in_axes=(axes,)))(inputs)
    for got, wanted in zip(vmapped, case.scan(implementation, inputs), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)  # float32, another order of sums


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_checkpointed_gradients_under_vmap(implementation):
    case = Case(2, 5, 8, 4)
    inputs = {name: jnp.asarray(x, "float32") for name, x in case.inputs().items()}

    def loss(inputs, scale):
        y, final_state = case.scan(implementation, inputs)
        return scale * (jnp.sum(jnp.sin(y)) + jnp.sum(final_state))

    plain = jax.jit(jax.grad(loss))(inputs, 1.0)
    checkpointed = jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss)), in_axes=(None, 0)))(inputs, jnp.arange(2.0))
    for name in inputs:
        np.testing.assert_array_equal(checkpointed[name][0], 0.0)
        np.testing.assert_allclose(checkpointed[name][1], plain[name], rtol=1e-4, atol=1e-5)  # float32, twice compiled


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_final_state_needs_no_gradient_of_y(implementation):
    case = Case(1, 20, 6, 3)
    inputs = {name: jnp.asarray(x, "float32") for name, x in case.inputs().items()}
    gradients = jax.jit(jax.grad(lambda inputs: jnp.sum(case.scan(implementation, inputs)[1])))(inputs)
    for name in ("C", "D", "z"):
        np.testing.assert_array_equal(gradients[name], 0.0)
    assert all(np.any(gradients[name]) for name in ("u", "delta", "A", "B", "delta_bias", "initial_state"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@hypothesis.settings(max_examples=5)
@hypothesis.given(cut=st.integers(0, 40), seed=st.integers(0, 2**32 - 1))
def test_a_sequence_may_be_scanned_in_two_parts(implementation, cut, seed):
    # Both parts have the length of the whole: steps of size zero do nothing, and one compilation serves all cuts.
    length = 40
    rng = np.random.default_rng(seed)
    u, delta = rng.normal(size=(2, 2, length, 6))
    B, C = rng.normal(size=(2, 2, length, 3))
    A = -np.exp(rng.normal(size=(6, 3)))
    u, delta, A, B, C = (jnp.asarray(x, "float32") for x in (u, np.exp(delta), A, B, C))
    scan = _jitted_scan(implementation)
    before = (jnp.arange(length) < cut)[None, :, None]
    state = jnp.zeros((2, 6, 3))
    whole, whole_state = scan(u, delta, A, B, C, initial_state=state)
    first, state = scan(u, jnp.where(before, delta, 0.0), A, B, C, initial_state=state)
    second, state = scan(u, jnp.where(before, 0.0, delta), A, B, C, initial_state=state)
    # A few roundings of values that are a few hundred at most.
    np.testing.assert_allclose(jnp.where(before, first, second), whole, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(state, whole_state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@hypothesis.settings(max_examples=5)
@hypothesis.given(seed=st.integers(0, 2**32 - 1))
def test_reversed_is_the_scan_of_the_flipped_sequence(implementation, seed):
    rng = np.random.default_rng(seed)
    u, delta = rng.normal(size=(2, 2, 41, 6))
    B, C = rng.normal(size=(2, 2, 41, 3))
    A = jnp.asarray(-np.exp(rng.normal(size=(6, 3))), "float32")
    state = jnp.asarray(rng.normal(size=(2, 6, 3)), "float32")
    u, delta, B, C = (jnp.asarray(x, "float32") for x in (u, np.exp(delta), B, C))
    y, final_state = _jitted_scan(implementation, reverse=True)(u, delta, A, B, C, initial_state=state)
    flipped = (jnp.flip(x, axis=1) for x in (u, delta))
    flipped_projections = (jnp.flip(x, axis=1) for x in (B, C))
    y_flipped, flipped_state = _jitted_scan(implementation)(*flipped, A, *flipped_projections, initial_state=state)
    np.testing.assert_allclose(y, jnp.flip(y_flipped, axis=1), rtol=1e-4, atol=1e-4)  # as above
    np.testing.assert_allclose(final_state, flipped_state, rtol=1e-4, atol=1e-4)


@functools.cache
def _jitted_scan(implementation, reverse=False):
    return jax.jit(
        functools.partial(selective_scan, reverse=reverse, return_final_state=True, implementation=implementation)
    )


@pytest.mark.parametrize("implementation", ASSOCIATIVE_IS_SLOW)
def test_four_thousand_steps_are_accurate(implementation):
    case = Case(1, 4096, 32, 16)
    # The goal set for the kernels: 1e-5 in values, 1e-4 in gradients, which sum over all of the sequence.
    assert_close(case.computed(implementation), expected_results(case), value_tolerance=1e-5, gradient_tolerance=1e-4)


@pytest.mark.parametrize("implementation", ASSOCIATIVE_IS_SLOW)
@pytest.mark.parametrize("decay", EXTREME_DECAYS.values(), ids=EXTREME_DECAYS)
def test_long_sequences_of_extreme_decays_stay_finite_and_right(implementation, decay):
    assert_right_at_extreme_decays(functools.partial(selective_scan, implementation=implementation), decay)


@pytest.mark.parametrize(("implementation", "fits"), [("xla", True), ("reference", False)])
def test_memory_of_the_gradient(implementation, fits):
    """xla has no array with an entry for each example, step, channel and state; the reference's, for one, is found."""
    case = Case(2, 512, 64, 16)
    inputs, cotangents = jax.tree.map(lambda x: jnp.asarray(x, "float32"), (case.inputs(), case.cotangents()))
    compiled = jax.jit(functools.partial(case.results, implementation)).lower(inputs, cotangents).compile()
    shapes = re.findall(r"\bf\d+\[([\d,]+)\]", compiled.as_text())
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    everything = case.batch * case.length * case.d_inner * case.d_state
    # The states of 32 steps are a sixteenth of all; so is an array with an entry for each example, step and channel.
    assert (largest <= everything // 16) == fits
    assert (compiled.memory_analysis().temp_size_in_bytes < 4 * everything) == fits


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
@pytest.mark.parametrize("mapped", [False, True], ids=["jit", "shard_map"])
def test_a_sharded_batch_stays_where_it_is(mapped, axis_type):
    case = Case(8, 20, 16, 4)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(axis_type, axis_type))
    whole, by_batch = jax.P(), jax.P(("data", "fsdp"))
    specs = {name: whole if name in ("A", "D", "delta_bias") else by_batch for name in ARGUMENTS}
    scan = functools.partial(case.scan, "xla")
    if mapped:
        scan = jax.shard_map(scan, mesh=mesh, in_specs=(specs,), out_specs=(by_batch, by_batch))

    def results(inputs, cotangents):
        (y, final_state), vjp = jax.vjp(scan, inputs)
        gradients = {f"d {name}": gradient for name, gradient in vjp(cotangents)[0].items()}
        return {"y": y, "final_state": final_state} | gradients

    def put(x, spec):
        return jax.device_put(jnp.asarray(x, "float32"), jax.NamedSharding(mesh, spec))

    inputs = {name: put(x, specs[name]) for name, x in case.inputs().items()}
    cotangents = tuple(put(x, by_batch) for x in case.cotangents())
    with jax.set_mesh(mesh):  # the types of new arrays have explicit axes only with the mesh in context
        compiled = jax.jit(results).lower(inputs, cotangents).compile()
    # Gradients of parameters are summed over devices; nothing else has to travel.
    assert not re.search(r"(all-gather|all-to-all|collective-permute)\(", compiled.as_text())
    computed = compiled(inputs, cotangents)
    assert all(len(computed[name].sharding.device_set) == 8 for name in ("y", "d u"))
    assert not computed["y"].is_fully_replicated
    assert_close(computed, expected_results(case), **FLOAT32)


GOOD = Case(2, 5, 6, 3)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("u", (5, 6), r"u: got shape \(5, 6\), want \(batch, length, d_inner\)"),
        ("delta", (2, 4, 6), r"delta: got shape \(2, 4, 6\), want \(2, 5, 6\)"),
        ("A", (3, 6), r"A: got shape \(3, 6\), want \(d_inner, d_state\) with d_inner = 6"),
        ("B", (2, 5, 4), r"B: got shape \(2, 5, 4\), want \(2, 5, 3\)"),
        ("C", (2, 5, 6), r"C: got shape \(2, 5, 6\), want \(2, 5, 3\)"),
        ("D", (3,), r"D: got shape \(3,\), want \(6,\)"),
        ("z", (2, 5), r"z: got shape \(2, 5\), want \(2, 5, 6\)"),
        ("delta_bias", (1,), r"delta_bias: got shape \(1,\), want \(6,\)"),
        ("initial_state", (2, 3, 6), r"initial_state: got shape \(2, 3, 6\), want \(2, 6, 3\)"),
    ],
)
def test_a_wrong_shape_is_named(name, shape, message):
    inputs = {key: jnp.asarray(x, "float32") for key, x in GOOD.inputs().items()} | {name: jnp.zeros(shape)}
    with pytest.raises(ValueError, match=message):
        _as_users_call_it(**inputs)


def test_integers_are_refused_by_name():
    inputs = {key: jnp.asarray(x, "float32") for key, x in GOOD.inputs().items()} | {"u": jnp.ones((2, 5, 6), int)}
    with pytest.raises(ValueError, match="u: got dtype int32, want a real floating-point type"):
        _as_users_call_it(**inputs)


def test_an_unknown_implementation_is_refused_with_the_valid_names():
    inputs = {key: jnp.asarray(x, "float32") for key, x in GOOD.inputs().items()}
    with pytest.raises(
        ValueError, match=r"'cuda'.*'pallas_tpu', 'mosaic_gpu', 'pallas_gpu', 'xla', 'associative', 'ref"
    ):
        selective_scan(**inputs, implementation="cuda")


def _as_users_call_it(**arguments):
    """Without the annotation checks of test time, which would speak first."""
    return inspect.unwrap(selective_scan)(**arguments)


def test_the_default_is_the_platforms_first_preference():
    case = CASES["bare"]
    inputs = {key: jnp.asarray(x, "float32") for key, x in case.inputs().items()}
    default = jax.jit(functools.partial(selective_scan, implementation=None)).lower(**inputs).as_text()
    assert default == jax.jit(functools.partial(selective_scan, implementation="xla")).lower(**inputs).as_text()


@pytest.mark.parametrize("platform", api.PREFERENCE)
def test_preferences_name_implementations(platform):
    *kernels, portable = api.PREFERENCE[platform]
    assert set(kernels) <= set(api.SUPPORT_CHECKS)
    assert portable in IMPLEMENTATIONS


def test_what_a_kernel_does_not_support_another_implementation_takes(monkeypatch, caplog):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    api._log_once.cache_clear()
    with jax.enable_x64(True):
        inputs = {key: jnp.asarray(x, "float64") for key, x in CASES["bare"].inputs().items()}
        for _ in range(2):
            y = selective_scan(**inputs)
        assert y.dtype == jnp.float64
    messages = [record.message for record in caplog.records if "selective_scan" in record.message]
    assert messages == [
        "selective_scan uses 'xla' instead of 'pallas_tpu': "
        "u: got dtype float64, pallas_tpu supports float32 and bfloat16"
    ]


def test_a_kernel_is_preferred_where_it_supports_the_arguments(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    inputs = {key: jnp.asarray(x, "float32") for key, x in CASES["bare"].inputs().items()}
    assert "pallas_call" in str(jax.make_jaxpr(lambda inputs: selective_scan(**inputs))(inputs))


@pytest.mark.parametrize("implementation", api.IMPLEMENTATIONS)
def test_implementations_share_a_signature(implementation):
    parameters, wanted = (
        [(p.name, p.kind, p.default) for p in inspect.signature(api.IMPLEMENTATIONS[name]).parameters.values()]
        for name in (implementation, "reference")
    )
    # Kernels can be interpreted too.
    assert [p for p in parameters if p[0] != "interpret"] == wanted
