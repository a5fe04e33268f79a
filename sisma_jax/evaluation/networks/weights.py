"""Checks arrays by PyTorch's names against what a network needs, and brings them into the layout of Flax."""

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np
from flax import nnx

from sisma_jax.errors import InputError

Weights: TypeAlias = Mapping[str, np.ndarray]
"""Arrays in PyTorch's layout, by PyTorch's names."""

Params: TypeAlias = dict[str, Any]
"""Nested dictionaries of arrays, without Flax types."""


def require(weights: Weights, shapes: Mapping[str, tuple[int, ...]], source: str, obtain: str) -> None:
    """Checks that arrays of the given names and shapes are there and hold finite real numbers. Others are ignored.

    Args:
      weights: the arrays.
      shapes: of the arrays that the network needs, by name.
      source: where the arrays come from, for error messages.
      obtain: what the network is and where its weights can be downloaded, one sentence.

    Raises:
      InputError: an array is missing, has another shape, is not of floating point or is not finite.
    """
    missing = [name for name in shapes if name not in weights]
    if missing:
        raise InputError(f"{source} lacks {len(missing)} of {len(shapes)} arrays, such as {missing[0]!r}. {obtain}")
    for name, shape in shapes.items():
        array = weights[name]
        if array.shape != shape:
            raise InputError(f"{source}: the array {name!r} has the shape {array.shape}, want {shape}. {obtain}")
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise InputError(f"{source}: the array {name!r} holds values that are not finite numbers. {obtain}")


def checksum(weights: Weights, names: Iterable[str]) -> str:
    """Returns a hash of the names and the float32 values of some arrays: 12 hexadecimal digits.

    Args:
      weights: the arrays.
      names: of the arrays that count.
    """
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode() + np.ascontiguousarray(weights[name], "<f4").tobytes())
    return digest.hexdigest()[:12]


def to_kernel(weight: np.ndarray) -> np.ndarray:
    """Returns the weight of a convolution (out, in, height, width) as a kernel of Flax (height, width, in, out).

    Args:
      weight: the array in PyTorch's layout.
    """
    return np.ascontiguousarray(weight.transpose(2, 3, 1, 0), np.float32)


def weight_shape(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape in PyTorch of a convolution whose kernel in Flax has the given shape.

    Args:
      kernel: (height, width, in, out).
    """
    height, width, inputs, outputs = kernel
    return outputs, inputs, height, width


@functools.cache
def abstract_params(network: type[nnx.Module]) -> tuple[nnx.GraphDef[Any], Params]:
    """Returns the graph definition of a network and its parameters as `jax.ShapeDtypeStruct`s. Computes no array.

    Args:
      network: class of the network.
    """
    graph, abstract = nnx.split(nnx.eval_shape(network))
    return graph, nnx.to_pure_dict(abstract)


def shapes_by_path(params: Params) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each parameter by its path, such as "convs.0.kernel".

    Args:
      params: nested dictionaries of arrays or `jax.ShapeDtypeStruct`s.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}


def fill(params: Params, value: Callable[[str], np.ndarray]) -> Params:
    """Returns float32 parameters with the structure of `params`.

    Args:
      params: nested dictionaries.
      value: returns the array of a path, such as "convs.0.kernel".
    """

    def leaf(path: tuple[Any, ...], _: object) -> jax.Array:
        return jax.numpy.asarray(value(jax.tree_util.keystr(path, simple=True, separator=".")), "float32")

    return jax.tree_util.tree_map_with_path(leaf, params)
