"""The TPU compiler, for tests that compile for chips that are not there."""

import functools
import math
import re

import jax
import pytest

from sisma_jax.errors import InputError
from sisma_jax.parallel import topology


@functools.cache
def tpu_devices(name: str) -> list[jax.Device]:
    """Returns the chips of the topology; skips the test where there is no compiler."""
    try:
        return topology.tpu_devices(name)
    except InputError as error:
        if "libtpu" in str(error):
            pytest.skip(f"no TPU compiler, which `make test` installs: {error}")
        raise


def entries_of_buffers(compiled: jax.stages.Compiled) -> list[int]:
    """Returns the number of entries of each floating-point array in a compiled program."""
    return [math.prod(map(int, x.split(","))) for x in re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]", compiled.as_text())]
