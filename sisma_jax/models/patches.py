"""Moves squares of pixels into channels and back, which converts between an image and its tokens."""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

Grid = Float[Array, "B H W D"]
"""One vector per token of an image, in the rows and columns of the token grid."""

ArrayT = TypeVar("ArrayT", Array, np.ndarray)


def space_to_depth(x: Shaped[ArrayT, "B H W C"], factor: int) -> Shaped[ArrayT, "B h w D"]:
    """Returns x with each `factor` x `factor` square of pixels moved into the channels: D = factor² C, h = H / factor.

    Args:
      x: image or grid, of any dtype.
      factor: side of a square; it divides H and W.
    """
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // factor, factor, width // factor, factor, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // factor, width // factor, factor**2 * channels)


def depth_to_space(x: Shaped[ArrayT, "B h w D"], factor: int) -> Shaped[ArrayT, "B H W C"]:
    """Returns x with the channels moved back to squares of pixels: the inverse of `space_to_depth`.

    Args:
      x: grid, of any dtype.
      factor: side of a square; factor² divides D.
    """
    batch, height, width, depth = x.shape
    channels = depth // factor**2
    x = x.reshape(batch, height, width, factor, factor, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height * factor, width * factor, channels)


def windows(x: Float[Array, "B H W C"], factor: int, overlap: int) -> Float[Array, "B h w D"]:
    """Returns the squares of `space_to_depth`, each with a margin of `overlap` pixels: D = (factor + 2 overlap)² C.

    Beyond the border, the pixels are zero.

    Args:
      x: image or grid.
      factor: side of a square; it divides H and W.
      overlap: width of the margin; with 0, the result is that of `space_to_depth`.
    """
    if overlap == 0:
        return space_to_depth(x, factor)
    _, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (overlap, overlap), (overlap, overlap), (0, 0)))
    offsets = range(factor + 2 * overlap)
    slices = [padded[:, i : i + height : factor, j : j + width : factor] for i in offsets for j in offsets]
    return jnp.concatenate(slices, axis=-1)


def overlap_add(x: Float[Array, "B h w D"], factor: int, overlap: int) -> Float[Array, "B H W C"]:
    """Returns the image in which the windows of all tokens are added up: the transpose of `windows`.

    Args:
      x: grid; (factor + 2 overlap)² divides D.
      factor: side of a square.
      overlap: width of the margin; with 0, the result is that of `depth_to_space`.
    """
    if overlap == 0:
        return depth_to_space(x, factor)
    batch, height, width, depth = x.shape
    side = factor + 2 * overlap
    image = jax.ShapeDtypeStruct((batch, height * factor, width * factor, depth // side**2), x.dtype)
    return jax.linear_transpose(lambda image: windows(image, factor, overlap), image)(x)[0]
