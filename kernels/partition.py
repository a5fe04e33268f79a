"""Splits work over the devices of the mesh in context, `jax.set_mesh`, where XLA cannot: inside of `jax.shard_map`.

XLA does not see into kernels, and would gather a sequence to scan it or to convolve its grid.
"""

from collections.abc import Callable
from typing import Any

import jax

from kernels.typing import Array, Float

SEQUENCE_AXIS = "seq"
"""The axis of a mesh over which one image's tokens are split; batches are never split over it."""

# Fewer channels do not fill the registers of a TPU, 128 lanes wide, and take as long.
MIN_CHANNELS = 128


def split_scan(
    scan: Callable[..., tuple[Float[Array, "B L D"], Float[Array, "B D N"]]], arguments: dict[str, Array | None]
) -> tuple[Float[Array, "B L D"], Float[Array, "B D N"]]:
    """Returns scan(**arguments), computed by each device of the mesh in context for its part of batch and channels.

    Without a mesh, and inside a `jax.shard_map` over all of its axes, this is a plain call. See `batch_axes` and
    `channel_axes` for what is split; sequences are whole on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not _free_axes(mesh):
        return scan(**arguments)
    arguments = {name: x for name, x in arguments.items() if x is not None}
    batch = batch_axes(arguments["u"], mesh)
    channels = channel_axes(arguments["u"], mesh, taken=batch)
    sequence, state, parameter = jax.P(batch, None, channels), jax.P(batch, channels), jax.P(channels)
    specs = dict(u=sequence, delta=sequence, z=sequence, initial_state=state, B=jax.P(batch), C=jax.P(batch))
    specs |= dict.fromkeys(("A", "D", "delta_bias"), parameter)
    in_specs = {name: specs[name] for name in arguments}
    return map_parts(lambda x: scan(**x), (in_specs,), (sequence, state))(arguments)


def map_parts(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Returns `jax.shard_map` of the function over all axes of the mesh in context that are not manual yet."""
    mesh = jax.sharding.get_abstract_mesh()
    # JAX's interpreter of kernels, which the tests use, does not follow which values vary over devices.
    options = dict(axis_names=_free_axes(mesh), check_vma=False)
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, **options)


def _free_axes(mesh: jax.sharding.AbstractMesh) -> set[str]:
    return set(mesh.auto_axes) | set(mesh.explicit_axes)


def batch_axes(x: Array, mesh: jax.sharding.AbstractMesh) -> tuple[str, ...]:
    """Returns the mesh's axes over which the first axis of x is split: explicit ones, and all automatic that divide it.

    Those of type manual, inside a `jax.shard_map`, have split it already.
    """
    explicit = jax.typeof(x).sharding.spec[0] or ()
    axes = [explicit] if isinstance(explicit, str) else list(explicit)
    parts = 1
    for name in axes:
        parts *= mesh.shape[name]
    for name in mesh.auto_axes:
        if name != SEQUENCE_AXIS and x.shape[0] % (parts * mesh.shape[name]) == 0:
            axes.append(name)
            parts *= mesh.shape[name]
    return tuple(axes)


def channel_axes(x: Array, mesh: jax.sharding.AbstractMesh, taken: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the automatic axes, but for those taken, over which the last axis of x is split.

    They are those that would have nothing else to do, as when a batch of one image is on several devices, and that
    leave each device a multiple of 128 channels.
    """
    axes, parts = [], 1
    for name in mesh.auto_axes:
        if name not in taken and x.shape[-1] % (MIN_CHANNELS * parts * mesh.shape[name]) == 0:
            axes.append(name)
            parts *= mesh.shape[name]
    return tuple(axes)


def row_parts(*sides: int) -> int:
    """Returns in how many parts the axis `seq` of the mesh in context, of type automatic, splits sides of these sizes.

    One where there is no such axis, or where it does not divide them all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = mesh.shape[SEQUENCE_AXIS] if SEQUENCE_AXIS in mesh.auto_axes else 1
    return 1 if any(side % parts for side in sides) else parts


def vary_as(varying: Array, x: Array) -> Array:
    """x, which inside a `jax.shard_map` varies over the devices over which `varying` does.

    There each device has a part of a parameter's gradient. JAX sums the parts where a parameter that is the same on all
    devices meets something that is not. It cannot see that inside a custom VJP, so the two meet here.
    """
    axes = jax.typeof(varying).manual_axis_type.varying - jax.typeof(x).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x
