"""The selective scan and the convolution of a sequence, or an image, whose parts lie on several devices."""

import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sisma_jax.kernels import depthwise_conv2d
from sisma_jax.kernels.depthwise_conv import depthwise_conv2d_of_rows
from sisma_jax.kernels.partition import split_scan
from sisma_jax.kernels.selective_scan import CHECKPOINT_NAME, api, sequence_parallel_scan
from sisma_jax.kernels.selective_scan.pallas_tpu import selective_scan_pallas_tpu
from sisma_jax.kernels.selective_scan.xla import selective_scan_xla
from tests.kernels.scan_cases import (
    ARGUMENTS,
    BFLOAT16,
    EXTREME_DECAYS,
    Case,
    assert_close,
    assert_right_at_extreme_decays,
    expected_results,
)
from tests.kernels.test_depthwise_conv import make_arrays, values_and_gradients, xla_convolution

# What is asked of the parts: that they are the whole within 1e-5 of its largest entry.
CLOSE = dict(value_tolerance=1e-5, gradient_tolerance=1e-5)
BY_TOKEN = ("u", "delta", "B", "C", "z")


AUTO = jax.sharding.AxisType.Auto


def mesh_of(parts):
    return jax.make_mesh((parts,), ("seq",), (AUTO,), devices=jax.devices()[:parts])


def specs(inputs):
    return {name: jax.P(None, "seq") if name in BY_TOKEN else jax.P() for name in inputs}


def in_parts(parts, implementation="xla", **options):
    """Returns the scan of whole arrays, whose inside is that of parts, and the state after the sequence's last one."""
    mesh = mesh_of(parts)

    def scan(*, delta_softplus, reverse, **inputs):
        part = functools.partial(
            sequence_parallel_scan, delta_softplus=delta_softplus, reverse=reverse, implementation=implementation
        )
        mapped = jax.shard_map(
            lambda inputs: part(**inputs),
            mesh=mesh,
            in_specs=(specs(inputs),),
            out_specs=(jax.P(None, "seq"), jax.P("seq")),
            **options,
        )
        y, final_states = mapped(inputs)
        batch = inputs["u"].shape[0]
        return y, final_states[:batch] if reverse else final_states[-batch:]

    return scan


@pytest.mark.parametrize(
    ("parts", "case"),
    [
        (2, Case(2, 70, 24, 5)),
        (4, Case(2, 28, 24, 5, reverse=True)),
        (8, Case(2, 24, 6, 3)),
        (8, Case(1, 8, 6, 3, optional=(), delta_softplus=False, reverse=True)),
    ],
    ids=["two", "four, reversed", "eight", "eight of one token, bare, reversed"],
)
def test_the_parts_values_and_gradients_are_the_wholes(parts, case):
    assert_close(case.computed(in_parts(parts)), expected_results(case), **CLOSE)


def test_parts_in_bfloat16():
    case = Case(2, 20, 24, 5, dtype="bfloat16")
    computed = case.computed(in_parts(4))
    assert {name: computed[f"d {name}"].dtype.name for name in ARGUMENTS} == {n: case.dtype_of(n) for n in ARGUMENTS}
    assert_close(computed, expected_results(case), **BFLOAT16)


@hypothesis.settings(max_examples=3)
@hypothesis.given(
    parts=st.integers(1, 8),
    part_length=st.integers(1, 40),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 6)),
    optional=st.lists(st.sampled_from(ARGUMENTS[5:]), unique=True).map(tuple),
    reverse=st.booleans(),
)
def test_parts_of_any_size_and_number(parts, part_length, sizes, optional, reverse):
    batch, d_inner, d_state = sizes
    case = Case(batch, parts * part_length, d_inner, d_state, optional=optional, reverse=reverse)
    assert_close(case.computed(in_parts(parts)), expected_results(case), **CLOSE)


@pytest.mark.parametrize("decay", EXTREME_DECAYS.values(), ids=EXTREME_DECAYS)
def test_parts_of_extreme_decays_stay_finite_and_right(decay):
    def scan(*sequences):
        names = ("u", "delta", "A", "B", "C")
        return in_parts(8)(**dict(zip(names, sequences, strict=True)), delta_softplus=False, reverse=False)[0]

    assert_right_at_extreme_decays(scan, decay, length=2048)


def test_the_last_part_may_come_first():
    """By a traced value, since layers of both directions are one program; here without JAX's check of what varies."""
    case = Case(2, 20, 6, 3)

    def flip_parts(x):
        return jnp.concatenate(jnp.split(x, 4, axis=1)[::-1], axis=1)

    def scan(*, delta_softplus, reverse, **inputs):
        def part(inputs, parts_reversed):
            return sequence_parallel_scan(**inputs, delta_softplus=delta_softplus, parts_reversed=parts_reversed)

        flipped = {name: flip_parts(x) if name in BY_TOKEN else x for name, x in inputs.items()}
        options = dict(mesh=mesh_of(4), out_specs=(jax.P(None, "seq"), jax.P("seq")), check_vma=False)
        y, final_states = jax.shard_map(part, in_specs=(specs(inputs), jax.P()), **options)(flipped, jnp.array(True))
        return flip_parts(y), final_states[:2]

    assert_close(case.computed(scan), expected_results(case), **CLOSE)


@pytest.mark.slow
def test_a_kernel_scans_the_parts(monkeypatch):
    kernel = functools.partial(selective_scan_pallas_tpu, interpret=True)
    monkeypatch.setattr(api, "IMPLEMENTATIONS", api.IMPLEMENTATIONS | {"pallas_tpu": kernel})
    case = Case(2, 10, 8, 2)
    jax.config.update("jax_disable_most_optimizations", True)  # Interpreted kernels compile for seconds.
    try:
        computed = case.computed(in_parts(2, "pallas_tpu", check_vma=False))
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    assert_close(computed, expected_results(case), **CLOSE)


@pytest.mark.parametrize(("implementation", "chunk_states"), [("xla", (4, 2, 5, 24)), ("pallas_tpu", (8, 1, 8, 128))])
def test_the_checkpoint_name_stands_for_outputs_and_states_alone(implementation, chunk_states):
    """Of two examples in four parts, one chunk each, whose axes lie on the batch axis of what is kept."""
    case = Case(2, 64, 24, 5, optional=("D", "delta_bias"))
    inputs = {name: jnp.asarray(x, "float32") for name, x in case.inputs().items()}
    policy = jax.checkpoint_policies.save_only_these_names(CHECKPOINT_NAME)

    @functools.partial(jax.checkpoint, policy=policy)
    def loss(inputs):
        y, final_states = case.scan(in_parts(4, implementation, check_vma=False), inputs)
        return (y**2).sum() + (final_states**2).sum()

    kept = jax.tree.leaves(jax.eval_shape(lambda inputs: jax.vjp(loss, inputs)[1], inputs))
    y, final_state, start_state, step_sums = (8, 16, 24), (8, 24, 5), (8, 24, 5), (4 * 4, 2, 24)
    expected = [y, final_state, start_state, step_sums, chunk_states, *(x.shape for x in inputs.values())]
    assert sorted(x.shape for x in kept) == sorted(expected)


@pytest.mark.parametrize(
    ("parts", "height", "sides"), [(2, 6, (3, 3)), (4, 4, (3, 5)), (8, 8, (5, 3)), (2, 2, (7, 1))], ids=str
)
def test_the_convolution_of_rows_is_that_of_the_image(parts, height, sides):
    """Also where the kernel reaches past the next device, and past all of them."""
    arrays = make_arrays(2, height, 5, 6, sides)
    expected = values_and_gradients(xla_convolution, *arrays)
    with jax.set_mesh(mesh_of(parts)):
        compiled = jax.jit(lambda *a: values_and_gradients(depthwise_conv2d, *a)).lower(*arrays).compile()
        computed = compiled(*arrays)
    assert re.search(r"collective-permute(-start)?\(", compiled.as_text())
    assert not re.search(r"(all-gather|all-to-all)(-start)?\(", compiled.as_text())
    for got, wanted in zip(computed, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_the_convolution_of_rows_in_a_map_of_ones_own():
    arrays = make_arrays(2, 6, 5, 6)
    by_row = jax.P(None, "seq")
    mapped = jax.shard_map(depthwise_conv2d_of_rows, mesh=mesh_of(2), in_specs=(by_row, jax.P()), out_specs=by_row)
    expected = values_and_gradients(xla_convolution, *arrays)
    for got, wanted in zip(jax.jit(lambda *a: values_and_gradients(mapped, *a))(*arrays), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_a_convolution_of_rows_in_bfloat16_adds_its_kernels_gradient_in_float32():
    arrays = tuple(x.astype(jnp.bfloat16) for x in make_arrays(2, 16, 8, 8))
    with jax.set_mesh(mesh_of(8)):
        computed = jax.jit(lambda *a: values_and_gradients(depthwise_conv2d, *a))(*arrays)
    expected = values_and_gradients(xla_convolution, *(x.astype(jnp.float32) for x in arrays))
    for got, wanted in zip(computed, expected, strict=True):
        assert got.dtype == jnp.bfloat16
        # The parts' roundings to 2^-9 of themselves, and that of their sum.
        np.testing.assert_allclose(got.astype(jnp.float32), wanted, rtol=2**-7, atol=0.1)


def test_rows_that_do_not_divide_stay_whole():
    arrays = make_arrays(2, 5, 4, 3)
    with jax.set_mesh(mesh_of(2)):
        y = jax.jit(depthwise_conv2d)(*arrays[:2])
    np.testing.assert_allclose(y, xla_convolution(*arrays[:2]), rtol=1e-5, atol=1e-5)


def test_devices_without_an_example_of_their_own_take_channels():
    """Two devices for two examples, and for each two for its channels, of whole sequences."""
    case = Case(2, 12, 256, 3)
    mesh = jax.make_mesh((2, 1, 2), ("data", "fsdp", "seq"), (AUTO,) * 3, devices=jax.devices()[:4])
    seen = []

    def scan(**inputs):
        seen.append(inputs["u"].shape)
        return selective_scan_xla(**inputs)

    with jax.set_mesh(mesh):
        computed = case.computed(
            lambda delta_softplus, reverse, **inputs: split_scan(
                functools.partial(scan, delta_softplus=delta_softplus, reverse=reverse), inputs
            )
        )
    assert seen[0] == (1, 12, 128)
    assert_close(computed, expected_results(case), **CLOSE)
