"""Partitions kernels over the devices of the mesh in context (`jax.set_mesh`) with `jax.shard_map`.

XLA's partitioner cannot see inside a kernel, so it would gather a sharded sequence before scanning it or before
convolving its grid. The functions here choose the mesh axes for batch, channels and sequence, and map the kernel.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

from .typing import Array, Float, ScanArguments

Arrays = TypeVar("Arrays")

SEQUENCE_AXIS = "seq"
"""The mesh axis over which the tokens of an image are sharded. The batch is never sharded over it."""

# The vector registers of a TPU have 128 lanes, and channels are on the lanes. With fewer channels per device the
# remaining lanes are idle, and the kernel takes the same time.
MIN_CHANNELS = 128


def split_scan(
    scan: Callable[..., tuple[Float[Array, "B L D"], Float[Array, "B D N"]]], arguments: ScanArguments
) -> tuple[Float[Array, "B L D"], Float[Array, "B D N"]]:
    """Returns `scan(**arguments)`, where each device of the mesh in context computes its part of batch and channels.

    Without a mesh, and inside a `jax.shard_map` over all of its axes, this is a plain call. `batch_axes` and
    `channel_axes` choose the axes. The sequence is replicated.

    Args:
      scan: takes the arguments by name and returns (y, final_state).
      arguments: the array arguments of `selective_scan`, by name; None for absent ones.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not _free_axes(mesh):
        return scan(**arguments)
    batch = batch_axes(arguments["u"], mesh)
    channels = channel_axes(arguments["u"], mesh, taken=batch)
    # The recurrence couples neither examples nor channels, so the scan needs no communication. B and C have no channel
    # axis, and A, D and delta_bias have no batch axis: shard_map's transpose sums their gradients over the devices.
    sequence, state, parameter = jax.P(batch, None, channels), jax.P(batch, channels), jax.P(channels)
    # Absent arguments are empty pytrees, so their specs are not used.
    in_specs = dict(u=sequence, delta=sequence, z=sequence, initial_state=state, B=jax.P(batch), C=jax.P(batch))
    in_specs |= dict.fromkeys(("A", "D", "delta_bias"), parameter)
    return map_parts(lambda x: scan(**x), (in_specs,), (sequence, state))(arguments)


def map_parts(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Returns `jax.shard_map` of the function over all axes of the mesh in context that are not manual already.

    Args:
      function: computes one device's part; it takes positional arguments.
      in_specs: tuple of one entry per argument, a PartitionSpec or a pytree of them that is a prefix of the argument.
      out_specs: PartitionSpec, or a pytree of them that is a prefix of the result.
    """
    axes = _free_axes(jax.sharding.get_abstract_mesh())
    # check_vma: Pallas's interpreter, which the tests use, does not track which values vary over devices.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)


def _free_axes(mesh: jax.sharding.AbstractMesh) -> set[str]:
    """The names of the axes that are not manual."""
    return set(mesh.auto_axes) | set(mesh.explicit_axes)


def batch_axes(x: Array, mesh: jax.sharding.AbstractMesh) -> tuple[str, ...]:
    """Returns the mesh axes over which to shard the first axis of x.

    They are the explicit mesh axes that shard it already, and then each automatic mesh axis other than `seq` that still
    divides the axis of x. Manual mesh axes do not count: inside their `jax.shard_map`, x is one device's part.

    Args:
      x: of any shape with at least one axis; it may be a tracer.
      mesh: the mesh in context, from `jax.sharding.get_abstract_mesh`.
    """
    # An explicit axis is part of the array's type. A PartitionSpec entry is None, one name or a tuple of names.
    explicit = jax.typeof(x).sharding.spec[0] or ()
    axes = [explicit] if isinstance(explicit, str) else list(explicit)
    parts = 1
    for name in axes:
        parts *= mesh.shape[name]
    # How automatic axes shard x is not known at trace time. A caller that shards its batch over the axes that this
    # function returns moves no data.
    for name in mesh.auto_axes:
        if name != SEQUENCE_AXIS and x.shape[0] % (parts * mesh.shape[name]) == 0:
            axes.append(name)
            parts *= mesh.shape[name]
    return tuple(axes)


def channel_axes(x: Array, mesh: jax.sharding.AbstractMesh, taken: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the automatic mesh axes, other than those taken, over which to shard the last axis of x.

    Devices along these axes would otherwise repeat each other's work, for example with a batch of one image on several
    devices. An axis is used if it leaves each device a multiple of 128 channels.

    Args:
      x: of any shape with channels last; it may be a tracer.
      mesh: the mesh in context, from `jax.sharding.get_abstract_mesh`.
      taken: names of the mesh axes that shard other axes of x.
    """
    axes, parts = [], 1
    for name in mesh.auto_axes:
        if name not in taken and x.shape[-1] % (MIN_CHANNELS * parts * mesh.shape[name]) == 0:
            axes.append(name)
            parts *= mesh.shape[name]
    return tuple(axes)


def row_parts(*sides: int) -> int:
    """Returns the number of parts into which the automatic mesh axis `seq` divides sides of these sizes.

    It is 1 if the mesh in context has no such axis, or if the axis does not divide all of the sides.

    Args:
      sides: sizes of the array axes to be sharded.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = mesh.shape[SEQUENCE_AXIS] if SEQUENCE_AXIS in mesh.auto_axes else 1
    return 1 if any(side % parts for side in sides) else parts


def vary_alike(arrays: Arrays) -> Arrays:
    """Returns the arrays, marked inside a `jax.shard_map` as varying over each manual axis over which one of them does.

    This makes the gradients of replicated parameters correct. Each device computes its part of such a gradient, and JAX
    sums the parts in the transpose of the cast from replicated to varying. JAX inserts that cast where the two kinds of
    value meet in an operation, but it cannot see operations inside a function with its own gradient, so the cast is
    explicit here.

    Args:
      arrays: pytree of arrays of any shapes; outside a `jax.shard_map` it is returned as it is.
    """
    varying = frozenset[str]().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(arrays)))

    def vary(x: Array) -> Array:
        axes = varying - jax.typeof(x).manual_axis_type.varying
        return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x

    return jax.tree.map(vary, arrays)
