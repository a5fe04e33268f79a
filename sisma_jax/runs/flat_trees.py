"""Trees of arrays as flat dictionaries, under the path of each leaf: "layers.stacked.mixer.in_proj.kernel"."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any

_OWNERS = ("the checkpoint", "this run")


def flatten(tree: PyTree) -> dict[str, jax.Array]:
    """Returns {path: array}; NumPy arrays and numbers are copied."""
    return {path: leaf if isinstance(leaf, jax.Array) else jnp.array(leaf) for path, leaf in _named_leaves(tree)}


def flatten_abstract(tree: PyTree) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns {path: shape, dtype and sharding}; a leaf without sharding gets the default device."""
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        leaf = leaf if hasattr(leaf, "dtype") else jnp.array(leaf)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default)

    return {path: abstract(leaf) for path, leaf in _named_leaves(tree)}


def unflatten(abstract: PyTree, arrays: Mapping[str, jax.Array]) -> PyTree:
    """Returns the arrays in the structure of `abstract`."""
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[path] for path, _ in _named_leaves(abstract)])


def _named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]
    assert len(dict(named)) == len(named), "two leaves have the same path"
    return named


def forms(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Returns {path: "float32[64, 48]"}."""
    return {path: f"{array.dtype}{list(array.shape)}" for path, array in arrays.items()}


def first_not_finite(arrays: Mapping[str, jax.Array]) -> str | None:
    """Returns the path of the first array that holds NaN or infinity, or None.

    One reduction per array where it lies, and one transfer to the host: of global arrays, every process has to call
    this, and gets the same answer.
    """
    by_devices: dict[frozenset[jax.Device], dict[str, jax.Array]] = {}
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


def list_differences(
    before: Mapping[str, str], now: Mapping[str, str], prefix: str = "", owners: tuple[str, str] = _OWNERS
) -> list[str]:
    """Returns a line for each path whose form is not the same in both."""
    lines = []
    for name in sorted({*before, *now}):
        theirs, ours = before.get(name, "nothing"), now.get(name, "nothing")
        if theirs != ours:
            lines.append(f"{prefix}{name}: {owners[0]} has {theirs}, {owners[1]} {ours}")
    return lines


def shorten(lines: list[str]) -> str:
    """Returns the first lines of a long list, indented."""
    more = [f"and {len(lines) - 5} more"] if len(lines) > 5 else []
    return "\n  ".join(["", *lines[:5], *more])
