"""The device mesh, and the shardings of state, batches and activations.

Axes of the mesh, each of any size:

    data   the state is replicated over it, and the batch is sharded (data parallelism)
    fsdp   parameters, EMA parameters, optimizer state and the batch are sharded over it (ZeRO, arXiv 1910.02054)
    seq    the rows of an image and of its token grid are sharded over it; see `kernels.partition`

All axes have the type Auto: XLA chooses the shardings that are not given here, and inserts the collectives.
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
from sisma_jax.parallel.topology import Device

AXES = ("data", "fsdp", SEQUENCE_AXIS)
"""Names of the mesh axes, in order."""
BATCH_AXES = ("data", "fsdp")
"""Mesh axes over which a batch is sharded."""

MIN_SPLIT_ENTRIES = 1 << 16
"""Arrays with fewer entries are replicated: they need little memory, and the latency of gathering one is about as long
as the transfer of ten times its bytes."""

STACKED = "stacked"
"""Key under which `models.layers.Stack` stores the parameters of its layers, which have a leading axis of layers."""

PyTree = Any


def make_mesh(config: MeshConfig, devices: Sequence[Device] | None = None) -> Mesh:
    """Returns the device mesh.

    Args:
      config: sizes of the axes.
      devices: the devices of the mesh; None is all devices of all processes.

    Raises:
      InputError: the product of the axis sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.seq]
    named = " x ".join(f"mesh.{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    if config.data == 0:
        sizes[0], rest = divmod(len(devices), math.prod(sizes[1:]))
        if rest or not sizes[0]:
            raise InputError(
                f"mesh.fsdp {config.fsdp} times mesh.seq {config.seq} does not divide the {len(devices)} devices; "
                "choose factors of their number."
            )
    elif math.prod(sizes) != len(devices):
        raise InputError(
            f"{named} are {math.prod(sizes)} devices, but there are {len(devices)}; with mesh.data 0, the remaining "
            "devices are used."
        )
    return jax.make_mesh(sizes, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES), devices=devices)


def require_fit(
    config: Config, mesh: Mesh, batch_size: int, accumulate_steps: int = 1, name: str = "train.batch_size"
) -> None:
    """Checks that the batch and the rows of an image can be sharded evenly over the mesh.

    Args:
      config: of the run, which gives the rows of the token grid.
      mesh: of the devices.
      batch_size: examples per step, over all devices.
      accumulate_steps: parts of a batch whose gradients are computed in sequence.
      name: configuration key of the batch size, for the error message.

    Raises:
      InputError: the batch or the rows cannot be sharded evenly.
    """
    shards = num_batch_shards(mesh)
    if batch_size % (shards * accumulate_steps):
        parts = f" times train.accumulate_steps {accumulate_steps}" if accumulate_steps > 1 else ""
        raise InputError(
            f"{name} {batch_size} is not a multiple of the {shards} devices (mesh.data times mesh.fsdp) that "
            f"share it{parts}; choose a multiple."
        )
    rows, parts = config.token_rows, mesh.shape[SEQUENCE_AXIS]
    if rows % parts:
        raise InputError(
            f"mesh.{SEQUENCE_AXIS} {parts} does not divide the {rows} rows of the (coarsest) token grid; choose a "
            "divisor."
        )


def num_batch_shards(mesh: Mesh) -> int:
    """Returns the number of equal parts into which a batch is sharded."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def round_up(batch_size: int, mesh: Mesh) -> int:
    """Returns the smallest batch size that can be sharded evenly over the mesh and is not below `batch_size`."""
    shards = num_batch_shards(mesh)
    return -(-batch_size // shards) * shards


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that is replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh, ndim: int = 4) -> NamedSharding:
    """Returns the sharding of one array of a batch: over the examples and, for images (B, H, W, ...), over the rows.

    Args:
      mesh: of the devices.
      ndim: number of dimensions of the array; three or more are an image, a mask or a latent.
    """
    if ndim < 3:
        return NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    rows = SEQUENCE_AXIS if mesh.shape[SEQUENCE_AXIS] > 1 else None
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, rows))


def of_state(abstract: PyTree, mesh: Mesh | jax.sharding.AbstractMesh) -> PyTree:
    """Returns the sharding of each array of a training state, or of parameters.

    A large array is sharded over `fsdp` along its longest axis that is divisible by the size of `fsdp`. The axis of
    layers is excluded, because the scan over the layers slices it. Gradients and the moments of the optimizer have the
    shapes of their parameters, and therefore the same shardings.

    Args:
      abstract: tree of arrays or `jax.ShapeDtypeStruct`s.
      mesh: of the devices.
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
    """Returns whether a leaf of a parameter tree has a leading axis of layers.

    Args:
      path: of the leaf, as `jax.tree_util.tree_map_with_path` passes it.
    """
    return any(getattr(part, "key", None) == STACKED for part in path)


def constrain_state(tree: PyTree) -> PyTree:
    """Constrains gradients to the shardings of their parameters; for use inside `jax.jit`.

    The shardings refer to the mesh in context. Without a mesh, the tree is returned unchanged.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.auto_axes:
        return tree
    specs = jax.tree_util.tree_map_with_path(lambda path, x: _state_spec(path, x, mesh), tree)
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, specs)


def gather(params: PyTree) -> PyTree:
    """Constrains a layer's parameters to be replicated; for use inside `jax.jit`.

    The sharding refers to the mesh in context. Without a mesh, the parameters are returned unchanged. Without this
    constraint, XLA may shard the layer's activations like its parameters: a training step of SISMA-XL on 16 chips then
    communicates twelve times as many bytes (benchmarks/plan_table.py).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if "fsdp" not in mesh.auto_axes or mesh.shape["fsdp"] == 1:
        return params
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), params)


def place(abstract: PyTree, shardings: PyTree) -> PyTree:
    """Returns abstract arrays with shardings, for `jax.jit(...).lower` and for restoring a checkpoint.

    Args:
      abstract: tree of arrays or `jax.ShapeDtypeStruct`s.
      shardings: tree of the same structure.
    """
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)


def distribute(tree: PyTree, shardings: PyTree) -> PyTree:
    """Returns the arrays of a tree with the given shardings.

    Args:
      tree: NumPy or JAX arrays. Every process holds the whole array, or a `jax.Array` that is already global.
      shardings: tree of the same structure.
    """

    def one(x: Array | np.ndarray, sharding: NamedSharding) -> Array:
        is_whole = not isinstance(x, jax.Array) or x.is_fully_addressable
        return jax.device_put(np.asarray(x) if is_whole and jax.process_count() > 1 else x, sharding)

    return jax.tree.map(one, tree, shardings)


def fetch(tree: PyTree, mesh: Mesh) -> PyTree:
    """Returns copies of global arrays on the default device of this process; every process must call this.

    Args:
      tree: arrays that are sharded over the mesh in any way.
      mesh: of all devices.
    """
    whole = jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(jnp.asarray, jax.device_get(whole))


def constrain(x: Array) -> Array:
    """Constrains activations (B, H, W, ...) to the sharding of a batch: over the examples, and over the rows by `seq`.

    The sharding refers to the mesh in context. Without a mesh, and inside `jax.shard_map`, x is returned unchanged.
    Without this constraint, XLA may move activations to the shards of a parameter instead of gathering the parameter.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.auto_axes:
        return x
    rows = SEQUENCE_AXIS if SEQUENCE_AXIS in mesh.auto_axes and x.shape[1] % mesh.shape[SEQUENCE_AXIS] == 0 else None
    return jax.lax.with_sharding_constraint(x, PartitionSpec(batch_axes(x, mesh) or None, rows))


def batch_shards(mesh: Mesh, process_index: int) -> list[int]:
    """Returns the indices of the batch shards that the devices of a process hold, in increasing order.

    A batch has data x fsdp shards. Several processes hold the same shards if the axis `seq` extends over processes.

    Args:
      mesh: of all devices.
      process_index: of the process.
    """
    parts = mesh.devices.reshape(-1, mesh.shape[SEQUENCE_AXIS])
    return [i for i, row in enumerate(parts) if any(device.process_index == process_index for device in row)]


def to_local_devices(rows: np.ndarray) -> Array:
    """Returns an array that is sharded over the devices of this process by its first dimension.

    Functions that every process calls with images of its own, such as feature networks, use all its devices so. If the
    devices do not divide the rows evenly, as many as possible that do are used.

    Args:
      rows: (B, ...), B at least 1.
    """
    devices = jax.local_devices()
    count = max(number for number in range(1, len(devices) + 1) if len(rows) % number == 0)
    mesh = Mesh(np.array(devices[:count]), ("local",))
    return jax.device_put(rows, NamedSharding(mesh, PartitionSpec("local")))


def to_devices(rows: dict[str, np.ndarray], mesh: Mesh, batch_size: int) -> dict[str, Array]:
    """Returns the global batch, sharded over the mesh, from the rows that this process holds.

    Args:
      rows: arrays (rows, ...): either all rows of the batch, or the rows of this process's `batch_shards`, in order.
      mesh: of all devices.
      batch_size: rows of the global batch.
    """
    count = num_batch_shards(mesh)
    has_all = all(len(x) == batch_size for x in rows.values())
    shards = range(count) if has_all else batch_shards(mesh, jax.process_index())
    size = batch_size // count
    first_row = {shard * size: i * size for i, shard in enumerate(shards)}

    def place(x: np.ndarray) -> Array:
        def local(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None, "JAX asks for the shards of this process, which have an index"
            start = first_row[index[0].start or 0]
            return x[(slice(start, start + size), *index[1:])]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), over_batch(mesh, x.ndim), local)

    return {name: place(x) for name, x in rows.items()}
