"""Checks of array arguments, whose messages name the argument and say what was received and what was wanted."""

from collections.abc import Mapping

import jax

from .typing import Array, Size


def check_arrays(wanted: Mapping[str, tuple[Array | None, tuple[Size, ...], str]], sizes: str) -> None:
    """Checks that arrays have the wanted shapes and floating-point types.

    Args:
      wanted: for each argument, by its name: the array, or None if it is absent; its shape; and the names of the axes,
        such as "(batch, length)".
      sizes: the arguments that determine the shapes, for messages.

    Raises:
      ValueError: a shape is another one, or a dtype is not floating-point.
    """
    present = {name: (array, shape, axes) for name, (array, shape, axes) in wanted.items() if array is not None}
    for name, (array, shape, axes) in present.items():
        if array.shape != shape:
            raise ValueError(f"{name}: got shape {array.shape}, want {shape}: {axes} with {sizes}")
    for name, (array, _, _) in present.items():
        if not jax.numpy.issubdtype(array.dtype, jax.numpy.floating):
            raise ValueError(f"{name}: got dtype {array.dtype}, want a real floating-point type")
