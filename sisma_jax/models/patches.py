"""Moves squares of pixels into channels and back, which converts between an image and its tokens."""

from typing import TypeVar

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
