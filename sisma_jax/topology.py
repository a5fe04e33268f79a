"""TPUs that need not be present: `libtpu` brings the real compiler, and JAX describes the chips to it."""

import os
import sys
from pathlib import Path

import jax
from jax.experimental import topologies

from sisma_jax.errors import InputError

# One host of four chips, named here because there is no host to ask. The lock is for those who run on a chip.
_ABSENT_HOST = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


# Where `make tpu-compiler` puts it. Were it importable, JAX would look for a TPU in every run.
_LIBTPU = Path(sys.prefix, "tpu-compiler", "libtpu", "libtpu.so")


def tpu_devices(topology: str) -> list[jax.Device]:
    """Returns the chips of a topology such as "v5e:2x2", for shardings of programs that are compiled and not run.

    `jax.jit(f).lower(jax.ShapeDtypeStruct(shape, dtype, sharding=...)).compile()` then is what these chips would run,
    and its `memory_analysis()` what they would need.

    Raises:
      InputError: there is no libtpu, or it does not know the topology.
    """
    if jax.default_backend() != "tpu":
        os.environ.update(_ABSENT_HOST)
        if _LIBTPU.exists():
            os.environ.setdefault("TPU_LIBRARY_PATH", str(_LIBTPU))
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # whatever the plugin raises, by version
        raise InputError(
            f"cannot describe the TPU topology {topology!r}: {error}\n"
            "This needs the compiler (make tpu-compiler) and a topology such as v5e:2x2, v5p:2x2x1 or v6e:4x4."
        ) from error
