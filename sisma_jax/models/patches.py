"""Squares of pixels to channels and back: how an image becomes tokens."""

from jaxtyping import Array, Float


def space_to_depth(x: Float[Array, "B H W C"], factor: int) -> Float[Array, "B h w D"]:
    """Moves each `factor` x `factor` square of pixels into the channels: D = factor² C, h = H / factor."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // factor, factor, width // factor, factor, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // factor, width // factor, factor**2 * channels)


def depth_to_space(x: Float[Array, "B h w D"], factor: int) -> Float[Array, "B H W C"]:
    """Inverts `space_to_depth`."""
    batch, height, width, depth = x.shape
    channels = depth // factor**2
    x = x.reshape(batch, height, width, factor, factor, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height * factor, width * factor, channels)
