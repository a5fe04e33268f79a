"""Options of XLA for the programs that take most of the time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sisma_jax.config import MeshConfig
from sisma_jax.parallel import compiler, sharding
from tests.tpu import tpu_devices


@pytest.mark.optimized
def test_programs_for_cpus_are_compiled_for_wide_vectors():
    mesh = sharding.make_mesh(MeshConfig())
    x = jnp.linspace(-3, 3, 4096)
    lowered = jax.jit(jnp.tanh, compiler_options=compiler.options(mesh)).lower(x)
    np.testing.assert_allclose(lowered.compile()(x), np.tanh(np.asarray(x)), rtol=1e-6, atol=1e-6)
    assert compiler.options(mesh) == {"xla_cpu_prefer_vector_width": 512}


def test_programs_for_other_devices_have_the_defaults():
    assert compiler.options(sharding.make_mesh(MeshConfig(), tpu_devices("v5e:2x2"))) is None
