"""Descriptions of devices that are not present, for ahead-of-time compilation with the TPU compiler in `libtpu`."""

import os
import re
import sys
from pathlib import Path
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from sisma_jax.errors import InputError

Device: TypeAlias = jax.Device  # pyright: ignore[reportInvalidTypeForm] jaxlib, which defines it, has no type stubs

# libtpu asks the host for these values; as there is no TPU host, they describe one host of four chips. The last one
# disables libtpu's lock, which is needed only for running on a chip.
_ABSENT_HOST = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# By default, each of a v4 chip's two cores is a device, and `jax.make_mesh` does not support these.
_CHIP_CONFIGS = {"v4": {"chip_config_name": "megacore"}}

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}
"""Dense bfloat16 FLOP per second and chip, by `jax.Device.device_kind`, from https://cloud.google.com/tpu/docs."""

CLOCK_HZ = {"TPU v5 lite": 1.5e9, "TPU v5": 1.75e9, "TPU v6 lite": 1.75e9}
"""Cycles per second, by `jax.Device.device_kind`, from the peak rates above and the FLOP per cycle.

Of these, Google states that of v5e (https://jax-ml.github.io/scaling-book/tpus). A matrix unit multiplies a row of 128
entries with 128 x 128 weights per cycle, two FLOP per weight. A v5e has one core of four such units (197e12 / 131,072 =
1.503 GHz), and a v5p has two (459e12 / 262,144 = 1.751 GHz). A v6e has units of 256 x 256. Google's documentation says
that there are two, which would need 3.5 GHz. But libtpu's estimate for a product of 4,096 x 4,096 bfloat16 matrices is
301,616 cycles, which are 455,676 FLOP per cycle, and two units have 262,144. Four have 524,288 (1.751 GHz).
"""

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}

# `make tpu-compiler` installs it here, outside of the import path: JAX looks for a TPU if it can import libtpu.
_LIBTPU = Path(sys.prefix, "tpu-compiler", "libtpu", "libtpu.so")


def devices(topology: str) -> list[Device]:
    """Returns the devices of a topology, for ahead-of-time compilation.

    Args:
      topology: a TPU topology such as "v5e:2x2", or "cpu:8" for eight virtual devices of this machine's CPU.

    Raises:
      InputError: libtpu is not installed or does not know the topology, or JAX has started with fewer CPU devices.
    """
    match = re.fullmatch(r"cpu:(\d+)", topology)
    return tpu_devices(topology) if match is None else _cpu_devices(int(match[1]))


def _cpu_devices(count: int) -> list[Device]:
    if count < 1:
        raise InputError(f"topology cpu:{count} has no device; name at least one, such as cpu:8.")
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # the backends have started
        if len(jax.devices("cpu")) < count:
            raise InputError(
                f"cpu:{count} needs {count} virtual devices, but JAX has started with {len(jax.devices('cpu'))}; "
                f"set XLA_FLAGS=--xla_force_host_platform_device_count={count}."
            ) from None
    return jax.devices("cpu")[:count]


def tpu_devices(topology: str) -> list[Device]:
    """Returns the chips of a TPU topology, for the shardings of programs that are compiled but not run.

    With such shardings, `jax.jit(f).lower(jax.ShapeDtypeStruct(shape, dtype, sharding=...)).compile()` returns the
    program that the chips would run, and its `memory_analysis()` returns the memory that it would need.

    Args:
      topology: as libtpu names it, such as "v5e:2x2".

    Raises:
      InputError: libtpu is not installed, or does not know the topology.
    """
    if jax.default_backend() != "tpu":
        os.environ.update(_ABSENT_HOST)
        if _LIBTPU.exists():
            os.environ.setdefault("TPU_LIBRARY_PATH", str(_LIBTPU))
    options = _CHIP_CONFIGS.get(topology.split(":")[0], {})
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except Exception as error:  # the type depends on the version of the plugin
        raise InputError(
            f"cannot describe the TPU topology {topology!r}: {error}\n"
            "Install the compiler (make tpu-compiler), and name a topology such as v5e:2x2, v5p:2x2x1 or v6e:4x4."
        ) from error


def memory_limit(device: Device) -> int | None:
    """Returns the bytes of HBM that the compiler may use on a TPU; None for other devices.

    The limit is read from the compiler's error message for a program that no device could hold.

    Args:
      device: of `devices`, or a device that is present.
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
    """Returns (bytes needed, bytes available), as the TPU compiler's out-of-memory message states them.

    The bytes needed are a lower bound, because the compiler may stop before it has allocated everything.

    Args:
      message: of the compiler's error.

    Returns:
      Each number, or None if the message does not state it.
    """
    needed = re.search(r"temporaries \(([\d.]+)([KMGTP]?)\)|[Uu]sed ([\d.]+)([KMGTP]?) of", message)
    limit = re.search(r"available HBM \(([\d.]+)([KMGTP]?)\)|of ([\d.]+)([KMGTP]?) hbm", message)

    def read(match: re.Match[str] | None) -> int | None:
        if match is None:
            return None
        number, unit = [x for x in match.groups() if x is not None]
        return int(float(number) * _UNITS[unit])

    return read(needed), read(limit)
