"""Connects the processes of a job: one process per host on a TPU pod, one per GPU or per machine elsewhere."""

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

import jax

from sisma_jax.errors import InputError

_COORDINATOR, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Launchers that give every process the number of processes; JAX detects the rest.
_LAUNCHERS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
# Device files of a TPU VM's chips: v2 to v4, and v5e and later.
_CHIPS = ("accel*", "vfio/[0-9]*")


@dataclasses.dataclass(frozen=True)
class DistributedOptions:
    """Processes of a job. Not needed on a TPU pod, or under Slurm or Open MPI, where JAX detects them."""

    coordinator: str = ""
    """HOST:PORT of process 0, which all processes can reach. If empty: JAX_COORDINATOR_ADDRESS of the environment."""
    num_processes: int | None = None
    """Number of processes of the job. None: JAX_NUM_PROCESSES of the environment."""
    process_id: int | None = None
    """Index of this process, from 0. None: JAX_PROCESS_ID of the environment."""


def initialize(options: DistributedOptions, *, devices: Path = Path("/dev")) -> int:
    """Connects this process to the other processes of its job; must be called before any other use of JAX.

    If the options or the environment name a coordinator, the process connects to it. On a TPU VM, and under a launcher
    of several tasks, JAX detects the other processes. Otherwise, this process is the whole job.

    Args:
      options: coordinator, number of processes, and index of this process; the environment gives what they leave out.
      devices: folder of device files, in which a TPU VM lists its chips.

    Returns:
      The number of processes.

    Raises:
      InputError: the options and the environment are contradictory or incomplete, or the connection fails.
    """
    given = _given(options, os.environ)
    if given is None and not (_has_chips(devices) or _is_launched(os.environ)):
        return 1
    try:
        if given is not None:
            jax.distributed.initialize(*given, cluster_detection_method="deactivate")
            return given[1]
        with contextlib.suppress(ValueError):  # there are chips, but no service that lists other hosts
            jax.distributed.initialize()
        return jax.process_count()
    except RuntimeError as error:
        where = f" with `coordinator` {given[0]}" if given else ""
        raise InputError(
            f"This process could not join the others{where} ({str(error).splitlines()[0]}); start the same command on "
            "all hosts, and open the coordinator's port."
        ) from error


def _given(options: DistributedOptions, environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """Returns coordinator, number of processes and index of this process, or None if none of them is given."""
    coordinator = options.coordinator or environment.get(_COORDINATOR) or None
    count = _integer(options.num_processes, _COUNT, environment)
    index = _integer(options.process_id, _INDEX, environment)
    if coordinator is None and count is None and index is None:
        return None
    if coordinator is None or count is None or index is None:
        named = {"coordinator": coordinator, "num_processes": count, "process_id": index}
        variables = (_COORDINATOR, _COUNT, _INDEX)
        missing = [
            f"`{name}` ({variable})"
            for (name, value), variable in zip(named.items(), variables, strict=True)
            if value is None
        ]
        raise InputError(f"A job of several processes also needs {' and '.join(missing)}.")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"`coordinator` {coordinator} does not have the form HOST:PORT, such as 10.0.0.1:8476.")
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
        raise InputError(f"The environment's {name} is {environment[name]!r}, want an integer.") from None


def _has_chips(devices: Path) -> bool:
    """Returns whether this is a TPU VM whose chips JAX can use."""
    if os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] not in ("", "tpu"):
        return False
    return importlib.util.find_spec("libtpu") is not None and any(any(devices.glob(chips)) for chips in _CHIPS)


def _is_launched(environment: Mapping[str, str]) -> bool:
    return any(environment.get(name, "1").isdigit() and int(environment.get(name, "1")) > 1 for name in _LAUNCHERS)
