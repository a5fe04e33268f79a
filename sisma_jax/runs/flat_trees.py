"""Trees of arrays as flat dictionaries, keyed by the path of each leaf: "layers.stacked.mixer.in_proj.kernel"."""

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sisma_jax.parallel.topology import Device

PyTree = Any

_OWNERS = ("the checkpoint", "this run")


def flatten(tree: PyTree) -> dict[str, jax.Array]:
    """Returns {path: array}. NumPy arrays and numbers are copied to the default device; JAX arrays are not copied."""
    return {path: leaf if isinstance(leaf, jax.Array) else jnp.array(leaf) for path, leaf in _named_leaves(tree)}


def flatten_abstract(tree: PyTree) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns {path: shape, dtype and sharding}.

    Args:
      tree: arrays, `jax.ShapeDtypeStruct`s or numbers. A leaf without a sharding gets the first local device.
    """
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        leaf = leaf if hasattr(leaf, "dtype") else jnp.array(leaf)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default)

    return {path: abstract(leaf) for path, leaf in _named_leaves(tree)}


def unflatten(abstract: PyTree, arrays: Mapping[str, jax.Array]) -> PyTree:
    """Returns the arrays in the structure of a tree.

    Args:
      abstract: tree that gives the structure; its leaves are not used.
      arrays: {path: array} with every path of the tree.

    Raises:
      KeyError: a path is missing in `arrays`.
    """
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[path] for path, _ in _named_leaves(abstract)])


def _named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]
    assert len(dict(named)) == len(named), "two leaves have the same path"
    return named


def forms(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Returns {path: dtype and shape}, such as {"out.kernel": "float32[64, 48]"}.

    Args:
      arrays: {path: array or `jax.ShapeDtypeStruct`}.
    """
    return {path: f"{array.dtype}{list(array.shape)}" for path, array in arrays.items()}


def first_not_finite(arrays: Mapping[str, jax.Array]) -> str | None:
    """Returns the path of the first array that contains NaN or infinity, or None.

    Each array is reduced on its own devices, and all results are transferred to the host at once. For global arrays,
    every process must call this; all get the same result.

    Args:
      arrays: {path: array}; arrays of integers and keys are skipped.
    """
    by_devices: dict[frozenset[Device], dict[str, jax.Array]] = {}
    for path, x in arrays.items():
        if jnp.issubdtype(x.dtype, jnp.inexact):
            by_devices.setdefault(frozenset(x.devices()), {})[path] = x
    is_finite = {}
    for same_devices in jax.device_get([_are_finite(group) for group in by_devices.values()]):
        is_finite |= same_devices
    return next((path for path in arrays if not is_finite.get(path, True)), None)


@jax.jit
def _are_finite(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: jnp.isfinite(x).all() for path, x in arrays.items()}


def crc32(arrays: Mapping[str, np.ndarray | jax.Array]) -> str:
    """Returns the CRC-32 of the bytes of all arrays in the order of their names, as decimal digits.

    Args:
      arrays: {path: array}.
    """
    checksum = 0
    for _, array in sorted(arrays.items()):
        checksum = zlib.crc32(np.ravel(np.asarray(array)).view(np.uint8).data, checksum)
    return str(checksum)


def list_differences(
    before: Mapping[str, str], now: Mapping[str, str], prefix: str = "", owners: tuple[str, str] = _OWNERS
) -> list[str]:
    """Returns one line for each path whose dtype or shape differs.

    Args:
      before: the first tree, as `forms` returns it.
      now: the second tree, likewise.
      prefix: put before each path.
      owners: what the lines call the first and the second tree.
    """
    lines = []
    for name in sorted({*before, *now}):
        theirs, ours = before.get(name, "nothing"), now.get(name, "nothing")
        if theirs != ours:
            lines.append(f"{prefix}{name}: {owners[0]} has {theirs}, {owners[1]} {ours}")
    return lines


def shorten(lines: list[str]) -> str:
    """Returns the first five lines, each indented on a line of its own, and the number of the others.

    Args:
      lines: as `list_differences` returns them.
    """
    more = [f"and {len(lines) - 5} more"] if len(lines) > 5 else []
    return "\n  ".join(["", *lines[:5], *more])
