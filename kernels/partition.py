"""Splits kernel calls over devices, which XLA cannot do for a call whose inside it does not see."""

from collections.abc import Callable

import jax

from kernels.typing import Array, Float

PARAMETERS = ("A", "D", "delta_bias")

SEQUENCE_AXIS = "seq"
"""The axis of a mesh over which one image's tokens are split; batches are never split over it."""


def split_batch(
    scan: Callable[..., tuple[Float[Array, "B L D"], Float[Array, "B D N"]]], arguments: dict[str, Array | None]
) -> tuple[Float[Array, "B L D"], Float[Array, "B D N"]]:
    """Returns scan(**arguments), computed by each device of the mesh in context for its part of the batch.

    The mesh is that of `jax.set_mesh`; without one, and inside a `jax.shard_map` over all of its axes, this is a plain
    call. A batch is split over the axes that split `u` if their type is explicit, and over all that divide it if their
    type is automatic. Parameters are whole on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = set(mesh.auto_axes) | set(mesh.explicit_axes)
    if not axes:
        return scan(**arguments)
    arguments = {name: x for name, x in arguments.items() if x is not None}
    by_batch = jax.P(batch_axes(arguments["u"], mesh) or None)
    specs = {name: jax.P() if name in PARAMETERS else by_batch for name in arguments}
    # JAX's interpreter of kernels, which the tests use, does not follow which values vary over devices.
    options = dict(axis_names=axes, check_vma=False)
    mapped = jax.shard_map(lambda x: scan(**x), in_specs=(specs,), out_specs=(by_batch, by_batch), **options)
    return mapped(arguments)


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
