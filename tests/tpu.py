"""The TPU compiler, for tests that compile for chips that are not there."""

import functools

import jax
import pytest

from sisma_jax import topology
from sisma_jax.errors import InputError


@functools.cache
def tpu_devices(name: str) -> list[jax.Device]:
    """Returns the chips of the topology; skips the test where there is no compiler."""
    try:
        return topology.tpu_devices(name)
    except InputError as error:
        if "libtpu" in str(error):
            pytest.skip(f"no TPU compiler, which `make test` installs: {error}")
        raise
