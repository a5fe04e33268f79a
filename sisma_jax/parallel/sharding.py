"""The mesh, and how state, batches and activations are placed on it: the one place that says so.

Axes of the mesh, each of any size:

    data   data-parallel replicas of the state, which share the batch
    fsdp   parameters, EMA and optimizer state are sharded over it, and the batch too (ZeRO, arXiv 1910.02054)
    seq    the rows of an image and of its grid of tokens are sharded over it; see `kernels.partition`

Axes are of type auto: XLA places what is not named here, and adds the collectives.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from sisma_jax.config import Config, MeshConfig
from sisma_jax.errors import InputError
from sisma_jax.kernels.partition import SEQUENCE_AXIS, batch_axes

AXES = ("data", "fsdp", SEQUENCE_AXIS)
BATCH_AXES = ("data", "fsdp")

# Smaller arrays are replicated: they take next to no memory, and to gather one takes as long as ten times its bytes
# would.
MIN_SPLIT_ENTRIES = 1 << 16

STACKED = "stacked"
"""The key under which `models.layers.Stack` keeps the parameters of its layers, which have a leading axis of layers."""

PyTree = Any


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of these devices; by default all of all processes.

    Raises:
      InputError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.seq]
    named = " x ".join(f"mesh.{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    if config.data == 0:
        sizes[0], rest = divmod(len(devices), math.prod(sizes[1:]))
        if rest or not sizes[0]:
            raise InputError(
                f"mesh.fsdp {config.fsdp} times mesh.seq {config.seq} does not divide {len(devices)} devices."
            )
    elif math.prod(sizes) != len(devices):
        raise InputError(f"{named} are {math.prod(sizes)} devices, but there are {len(devices)}.")
    return jax.make_mesh(sizes, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES), devices=devices)


def require_fit(
    config: Config, mesh: Mesh, batch_size: int, accumulate_steps: int = 1, name: str = "train.batch_size"
) -> None:
    """Raises InputError unless the devices can share a batch, and the rows of an image, equally."""
    shards = num_batch_shards(mesh)
    if batch_size % (shards * accumulate_steps):
        parts = f" times train.accumulate_steps {accumulate_steps}" if accumulate_steps > 1 else ""
        raise InputError(
            f"{name} {batch_size} is not a multiple of the {shards} devices (mesh.data times mesh.fsdp) that "
            f"share it{parts}."
        )
    rows, parts = config.token_rows, mesh.shape[SEQUENCE_AXIS]
    if rows % parts:
        raise InputError(
            f"mesh.{SEQUENCE_AXIS} {parts} does not divide the {rows} rows of the (coarsest) grid of tokens."
        )


def num_batch_shards(mesh: Mesh) -> int:
    """Returns over how many devices a batch is sharded."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def round_up(batch_size: int, mesh: Mesh) -> int:
    """Returns the next batch size that the devices can share."""
    shards = num_batch_shards(mesh)
    return -(-batch_size // shards) * shards


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what is replicated."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh, ndim: int = 4) -> NamedSharding:
    """Returns the sharding of a batch's array: of its examples, and of rows where these are images (B, H, W, ...)."""
    if ndim < 3:
        return NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    rows = SEQUENCE_AXIS if mesh.shape[SEQUENCE_AXIS] > 1 else None
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, rows))


def of_state(abstract: PyTree, mesh: Mesh) -> PyTree:
    """Returns the sharding of each array of a training state, or of parameters alone.

    Every large array is sharded over `fsdp` along the longest axis that this divides, but not along the axis of layers,
    which the scan over the layers slices. Gradients and the optimizer's moments have the shapes of their parameters and
    so are placed like them.

    Args:
      abstract: arrays or `jax.ShapeDtypeStruct`s.
    """
    return jax.tree_util.tree_map_with_path(lambda path, x: NamedSharding(mesh, _state_spec(path, x, mesh)), abstract)


def _state_spec(
    path: tuple[Any, ...], x: Array | jax.ShapeDtypeStruct, mesh: Mesh | jax.sharding.AbstractMesh
) -> PartitionSpec:
    parts = mesh.shape["fsdp"]
    axes = [i for i in range(has_layer_axis(path), len(x.shape)) if x.shape[i] % parts == 0]
    if parts == 1 or not axes or math.prod(x.shape) < MIN_SPLIT_ENTRIES:
        return PartitionSpec()
    longest = max(axes, key=lambda i: (x.shape[i], i))
    return PartitionSpec(*[None] * longest, "fsdp")


def has_layer_axis(path: tuple[Any, ...]) -> bool:
    """Whether the leaf at this path of a tree of parameters has a leading axis of layers."""
    return any(getattr(part, "key", None) == STACKED for part in path)


def constrain_state(tree: PyTree) -> PyTree:
    """Returns gradients, inside of `jax.jit`, placed as the parameters are whose shapes they have.

    For the mesh in context; without one the tree itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.auto_axes:
        return tree
    specs = jax.tree_util.tree_map_with_path(lambda path, x: _state_spec(path, x, mesh), tree)
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, specs)


def gather(params: PyTree) -> PyTree:
    """Returns a layer's parameters replicated, inside of `jax.jit`; their gradient is summed over devices.

    For the mesh in context; without one the tree itself. Left alone, XLA may shard the layer's activations as the
    parameters are: SISMA-XL's step on 16 chips then sends twelve times as much (benchmarks/plan_table.py).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if "fsdp" not in mesh.auto_axes or mesh.shape["fsdp"] == 1:
        return params
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), params)


def place(abstract: PyTree, shardings: PyTree) -> PyTree:
    """Returns abstract arrays with their shardings, for `lower` and for restoring."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)


def distribute(tree: PyTree, shardings: PyTree) -> PyTree:
    """Returns arrays with these shardings; this process has each whole, or its own part already."""

    def one(x: Array | np.ndarray, sharding: NamedSharding) -> Array:
        is_whole = not isinstance(x, jax.Array) or x.is_fully_addressable
        return jax.device_put(np.asarray(x) if is_whole and jax.process_count() > 1 else x, sharding)

    return jax.tree.map(one, tree, shardings)


def fetch(tree: PyTree, mesh: Mesh) -> PyTree:
    """Returns the global arrays on this process's first device; every process has to call this."""
    whole = jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(jnp.asarray, jax.device_get(whole))


def constrain(x: Array) -> Array:
    """Returns activations (B, H, W, ...) sharded as batches are: examples, and rows over `seq`.

    For the mesh in context; without one, and inside a `jax.shard_map`, x itself. XLA otherwise may move activations to
    the shards of a parameter, instead of gathering the parameter.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.auto_axes:
        return x
    rows = SEQUENCE_AXIS if SEQUENCE_AXIS in mesh.auto_axes and x.shape[1] % mesh.shape[SEQUENCE_AXIS] == 0 else None
    return jax.lax.with_sharding_constraint(x, PartitionSpec(batch_axes(x, mesh) or None, rows))


def batch_shards(mesh: Mesh, process_index: int) -> list[int]:
    """Returns which of the equal parts of a batch the devices of a process hold, in order.

    There are data x fsdp parts; several processes hold the same ones where `seq` reaches across processes.
    """
    parts = mesh.devices.reshape(-1, mesh.shape[SEQUENCE_AXIS])
    return [i for i, row in enumerate(parts) if any(device.process_index == process_index for device in row)]


def to_devices(rows: dict[str, np.ndarray], mesh: Mesh, batch_size: int) -> dict[str, Array]:
    """Returns the global batch of which this process holds rows: all, or those of its `batch_shards`, in order.

    Args:
      rows: arrays (rows, ...): of images and the like (rows, H, W, ...).
      batch_size: of the global batch.
    """
    count = num_batch_shards(mesh)
    has_all = all(len(x) == batch_size for x in rows.values())
    shards = range(count) if has_all else batch_shards(mesh, jax.process_index())
    size = batch_size // count
    first_row = {shard * size: i * size for i, shard in enumerate(shards)}

    def place(x: np.ndarray) -> Array:
        def local(index: tuple[slice, ...]) -> np.ndarray:
            start = first_row[index[0].start or 0]
            return x[(slice(start, start + size), *index[1:])]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), over_batch(mesh, x.ndim), local)

    return {name: place(x) for name, x in rows.items()}
