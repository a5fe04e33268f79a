"""The depthwise convolution against XLA's own, in values and in gradients."""

import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sisma_jax.kernels import depthwise_conv2d


def xla_convolution(x, kernel):
    return jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        window_strides=(1, 1),
        padding="SAME",
        feature_group_count=x.shape[-1],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )


def values_and_gradients(convolution, x, kernel, cotangent):
    y, vjp = jax.vjp(convolution, x, kernel)
    return y, *vjp(cotangent)


def make_arrays(batch, height, width, channels, sides=(3, 3)):
    rng = np.random.default_rng(0)
    x, cotangent = rng.normal(size=(2, batch, height, width, channels))
    kernel = rng.normal(size=(*sides, channels))
    return tuple(jnp.asarray(a, "float32") for a in (x, kernel, cotangent))


@hypothesis.settings(max_examples=15)
@hypothesis.given(
    batch=st.integers(1, 3),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    channels=st.integers(1, 5),
    sides=st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 5])),
)
def test_values_and_gradients_are_those_of_xlas_convolution(batch, height, width, channels, sides):
    arrays = make_arrays(batch, height, width, channels, sides)
    expected = values_and_gradients(xla_convolution, *arrays)
    for got, wanted in zip(values_and_gradients(depthwise_conv2d, *arrays), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)  # float32 sums of a hundred terms


def test_bfloat16_is_summed_in_float32():
    arrays = tuple(a.astype(jnp.bfloat16) for a in make_arrays(2, 16, 16, 8))
    computed = jax.jit(lambda *a: values_and_gradients(depthwise_conv2d, *a))(*arrays)
    expected = values_and_gradients(xla_convolution, *(a.astype(jnp.float32) for a in arrays))
    for got, wanted in zip(computed, expected, strict=True):
        assert got.dtype == jnp.bfloat16
        # One rounding, to 2^-8 of the entry.
        np.testing.assert_allclose(got.astype(jnp.float32), wanted, rtol=2**-8, atol=1e-4)


def test_a_sharded_batch_stays_where_it_is():
    arrays = make_arrays(8, 6, 5, 16)
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    by_batch, whole = (jax.NamedSharding(mesh, spec) for spec in (jax.P("data"), jax.P()))
    placed = [jax.device_put(a, s) for a, s in zip(arrays, (by_batch, whole, by_batch), strict=True)]
    compiled = jax.jit(lambda *a: values_and_gradients(depthwise_conv2d, *a)).lower(*placed).compile()
    # Only the kernel's gradient is summed over devices.
    assert not re.search(r"(all-gather|all-to-all|collective-permute)\(", compiled.as_text())
    expected = values_and_gradients(depthwise_conv2d, *arrays)
    for got, wanted in zip(compiled(*placed), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "message"), [((3, 3, 4), "x has 5 channels, kernel has 4"), ((2, 3, 5), "2x3; both sides must be odd")]
)
def test_a_wrong_kernel_is_named(shape, message):
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d.__wrapped__(jnp.zeros((1, 4, 4, 5)), jnp.zeros(shape))
