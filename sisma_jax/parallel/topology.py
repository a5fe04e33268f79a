"""Devices that need not be present: `libtpu` brings the real compiler for TPUs, and JAX describes the chips to it."""

import os
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from sisma_jax.errors import InputError

# One host of four chips, named here because there is no host to ask. libtpu's lock is for those who run on a chip.
_ABSENT_HOST = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# By default each of a v4's two cores is a device, and of these `jax.make_mesh` makes no mesh.
_CHIP_CONFIGS = {"v4": {"chip_config_name": "megacore"}}

# Dense bfloat16 operations a second of a chip, by JAX's name of its kind, from https://cloud.google.com/tpu/docs.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}

# Where `make tpu-compiler` puts it. Were it importable, JAX would look for a TPU in every run.
_LIBTPU = Path(sys.prefix, "tpu-compiler", "libtpu", "libtpu.so")


def devices(topology: str) -> list[jax.Device]:
    """Returns the chips of a TPU topology such as "v5e:2x2", or of "cpu:8" eight virtual devices of this machine.

    Raises:
      InputError: see `tpu_devices`; or JAX has started with fewer CPU devices.
    """
    match = re.fullmatch(r"cpu:(\d+)", topology)
    return tpu_devices(topology) if match is None else _cpu_devices(int(match[1]))


def _cpu_devices(count: int) -> list[jax.Device]:
    if count < 1:
        raise InputError(f"the topology cpu:{count} has no device; write cpu:8, for example.")
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # the backends have started
        if len(jax.devices("cpu")) < count:
            raise InputError(
                f"cpu:{count} needs {count} virtual devices, but JAX has started with {len(jax.devices('cpu'))}; "
                f"set XLA_FLAGS=--xla_force_host_platform_device_count={count}."
            ) from None
    return jax.devices("cpu")[:count]


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
    options = _CHIP_CONFIGS.get(topology.split(":")[0], {})
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except Exception as error:  # whatever the plugin raises, by version
        raise InputError(
            f"cannot describe the TPU topology {topology!r}: {error}\n"
            "This needs the compiler (make tpu-compiler) and a topology such as v5e:2x2, v5p:2x2x1 or v6e:4x4."
        ) from error


def memory_limit(device: jax.Device) -> int | None:
    """Returns the bytes of main memory that the compiler has for programs on this device; None for a CPU.

    It says so when it refuses a program that no device could hold.
    """
    if device.platform != "tpu":
        return None
    argument = jax.ShapeDtypeStruct((2**10, 2**40), jnp.int8, sharding=jax.sharding.SingleDeviceSharding(device))
    try:
        jax.jit(jnp.copy).lower(argument).compile()
    except jax.errors.JaxRuntimeError as error:
        return read_shortage(str(error))[1]
    return None


def read_shortage(message: str) -> tuple[int | None, int | None]:
    """Returns the bytes that a program needs and those there are, each if the compiler's message tells.

    What is needed is at least so much: the compiler may give up before it has placed all.
    """
    needed = re.search(r"temporaries \(([\d.]+)([KMGTP]?)\)|[Uu]sed ([\d.]+)([KMGTP]?) of", message)
    limit = re.search(r"available HBM \(([\d.]+)([KMGTP]?)\)|of ([\d.]+)([KMGTP]?) hbm", message)

    def read(match: re.Match | None) -> int | None:
        number, unit = (None, "") if match is None else [x for x in match.groups() if x is not None]
        return None if number is None else int(float(number) * _UNITS[unit])

    return read(needed), read(limit)
