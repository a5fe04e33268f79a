"""Squares of pixels to channels and back: how an image becomes tokens."""

import numpy as np
from jaxtyping import Array, Float, Shaped

Grid = Float[Array, "B H W D"]
"""Tokens of an image, or what is known of each, in rows and columns."""


def space_to_depth(x: Shaped[Array | np.ndarray, "B H W C"], factor: int) -> Shaped[Array | np.ndarray, "B h w D"]:
    """Moves each `factor` x `factor` square of pixels into the channels: D = factor² C, h = H / factor."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // factor, factor, width // factor, factor, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // factor, width // factor, factor**2 * channels)


def depth_to_space(x: Shaped[Array | np.ndarray, "B h w D"], factor: int) -> Shaped[Array | np.ndarray, "B H W C"]:
    """Inverts `space_to_depth`."""
    batch, height, width, depth = x.shape
    channels = depth // factor**2
    x = x.reshape(batch, height, width, factor, factor, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height * factor, width * factor, channels)
