"""How batches and state lie on the devices."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sisma_jax.errors import InputError


def make_mesh() -> Mesh:
    """Returns all devices of all processes in a row, along the axis "data"."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of the state: every device holds all of it."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: every device holds an equal part of the examples."""
    return NamedSharding(mesh, PartitionSpec("data"))


def require_divisible(batch_size: int, mesh: Mesh) -> None:
    """Raises InputError unless the devices can share a batch equally."""
    if batch_size % mesh.size:
        raise InputError(f"--train.batch_size {batch_size} is not a multiple of the {mesh.size} devices that share it.")


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns the global batch of which this process holds `batch`."""
    sharding = over_batch(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}
