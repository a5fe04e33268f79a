"""What the layers do so that XLA compiles them to fast programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sisma_jax.models.layers import in_memory


@pytest.mark.parametrize("first", [0.5, np.inf, -np.inf, np.nan])
def test_what_is_kept_in_memory_is_the_same_and_so_are_its_derivatives(first):
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5)).at[0, 0, 0, 0].set(first)
    y, change = jax.jvp(jax.jit(in_memory), (x,), (2 * x,))
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(change, 2 * x)
    weights = jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape)
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda x: (weights * in_memory(x)).sum()))(x), weights)


@pytest.mark.optimized
def test_only_programs_for_cpus_keep_it_in_memory():
    """XLA:CPU leaves the conditional of the value and of the gradient; other programs have none."""
    x = jnp.ones((2, 4, 4, 8))
    gradient = jax.jit(jax.grad(lambda x: jnp.sin(in_memory(jnp.cos(x))).sum()))
    compiled = gradient.lower(x).compile().as_text()
    assert compiled.count(" conditional(") == 2
    for platform in ("tpu", "cuda"):
        assert "compare" not in gradient.trace(x).lower(lowering_platforms=(platform,)).as_text()
