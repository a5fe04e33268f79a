"""Joins the processes of a job: one a host on a TPU pod, one a GPU or a machine elsewhere."""

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

import jax

from sisma_jax.errors import InputError

_COORDINATOR, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Launchers that tell every process of a job how many there are; JAX finds out the rest by itself.
_LAUNCHERS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
# Where the driver of a TPU VM shows its chips: v2 to v4, and v5e and later.
_CHIPS = ("accel*", "vfio/[0-9]*")


@dataclasses.dataclass(frozen=True)
class DistributedOptions:
    """Processes of one job. Not needed on a TPU pod, nor under Slurm or Open MPI, where JAX finds them."""

    coordinator: str = ""
    """HOST:PORT of process 0, which all processes reach; or the environment's JAX_COORDINATOR_ADDRESS."""
    num_processes: int | None = None
    """Number of processes; or JAX_NUM_PROCESSES."""
    process_id: int | None = None
    """Number of this process, from 0; or JAX_PROCESS_ID."""


def initialize(options: DistributedOptions, *, devices: Path = Path("/dev")) -> int:
    """Joins this process to its job, if there is one; to be called before JAX is asked for anything.

    By the options or the environment if they name a coordinator; by JAX's own detection on a TPU VM and under a
    launcher of several tasks; if that finds none, this process is a job of its own.

    Args:
      devices: folder of device files, where a TPU VM shows its chips.

    Returns:
      Number of processes.

    Raises:
      InputError: options and environment are contradictory or not complete, or the other processes do not come.
    """
    given = _given(options, os.environ)
    if given is None and not (_has_chips(devices) or _is_launched(os.environ)):
        return 1
    try:
        if given is not None:
            jax.distributed.initialize(*given, cluster_detection_method="deactivate")
            return given[1]
        with contextlib.suppress(ValueError):  # chips, but none of the services by which JAX finds other hosts
            jax.distributed.initialize()
        return jax.process_count()
    except RuntimeError as error:
        where = f" with `coordinator` {given[0]}" if given else ""
        raise InputError(
            f"This process could not join the others{where} ({str(error).splitlines()[0]}); start the same command on "
            "all hosts, and let the coordinator's port be open."
        ) from error


def _given(options: DistributedOptions, environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """Returns coordinator, number of processes and number of this one, or None if none of them is given."""
    coordinator = options.coordinator or environment.get(_COORDINATOR, "")
    count = _integer(options.num_processes, _COUNT, environment)
    index = _integer(options.process_id, _INDEX, environment)
    named = {f"`coordinator` ({_COORDINATOR})": coordinator or None}
    named |= {f"`num_processes` ({_COUNT})": count, f"`process_id` ({_INDEX})": index}
    missing = [name for name, value in named.items() if value is None]
    if len(missing) == len(named):
        return None
    if missing:
        raise InputError(f"A job of several processes also needs {' and '.join(missing)}.")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"`coordinator` {coordinator} is not of the form HOST:PORT, such as 10.0.0.1:8476.")
    if count < 1:
        raise InputError(f"`num_processes` must be positive, got {count}.")
    if not 0 <= index < count:
        raise InputError(f"`process_id` must be in 0..{count - 1} for {count} processes, got {index}.")
    return coordinator, count, index


def _integer(value: int | None, name: str, environment: Mapping[str, str]) -> int | None:
    if value is not None or not environment.get(name):
        return value
    try:
        return int(environment[name])
    except ValueError:
        raise InputError(f"The environment's {name} is {environment[name]!r}, want a number.") from None


def _has_chips(devices: Path) -> bool:
    """Whether this is a TPU VM and JAX can use its chips."""
    if os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] not in ("", "tpu"):
        return False
    return importlib.util.find_spec("libtpu") is not None and any(any(devices.glob(chips)) for chips in _CHIPS)


def _is_launched(environment: Mapping[str, str]) -> bool:
    return any(environment.get(name, "1").isdigit() and int(environment.get(name, "1")) > 1 for name in _LAUNCHERS)
