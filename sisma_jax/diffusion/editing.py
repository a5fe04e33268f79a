"""Generates a part of a photograph anew: where, along which path the rest goes, and how the two are joined."""

import cv2
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from sisma_jax.diffusion.solvers import Point, Velocity


def keeping(
    velocity: Velocity, noise: Point, kept: Float[Array, "#B H W C"], is_generated: Bool[Array, "#B H W 1"]
) -> Velocity:
    """Returns the given velocity where `is_generated`, and elsewhere the one that ends in `kept`.

    What is kept moves along its own straight path from the noise, t kept + (1 - t) noise, whose velocity is constant:
    every solver follows it exactly, and at every time the network sees it at the noise level of that time. So the
    generated part fits its surroundings.

    Args:
      noise: where the integration starts at t = 0.
      kept: latent of the photograph, the same for all of a batch or one for each.
      is_generated: where the velocity applies.
    """
    of_kept = kept - noise
    return lambda x, t: jnp.where(is_generated, velocity(x, t), of_kept)


def to_latent_grid(region: Bool[Array, "B H W"], downsampling: int) -> Bool[Array, "B h w 1"]:
    """Returns which latent positions have any pixel of the region."""
    batch, height, width = region.shape
    squares = region.reshape(batch, height // downsampling, downsampling, width // downsampling, downsampling)
    return squares.any(axis=(2, 4))[..., None]


def resize_region(region: Bool[np.ndarray, "H W"], size: int) -> Bool[np.ndarray, "S S"]:
    """Returns a square region at another size; a pixel with any part in the region is in it."""
    smaller = size < region.shape[0]
    interpolation = cv2.INTER_AREA if smaller else cv2.INTER_NEAREST_EXACT
    return cv2.resize(region.astype(np.float32), (size, size), interpolation=interpolation) > 0


def feather(region: Bool[np.ndarray, "H W"], margin: float | int) -> Float[np.ndarray, "H W"]:
    """Returns float32 weights: 1 in the region, falling linearly to 0 where the distance to it exceeds the margin.

    Args:
      region: with at least one pixel.
      margin: in pixels; with 0 the weights are the region.
    """
    distance = cv2.distanceTransform((~region).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.clip(1 - distance / (margin + 1), 0, 1).astype(np.float32)


def composite(
    photo: UInt8[np.ndarray, "H W 3"], generated: UInt8[np.ndarray, "S S 3"], weight: Float[np.ndarray, "P P"]
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the photograph with its central square of side P replaced; where the weight is 0, it is bit-identical.

    Args:
      generated: of any size; resized to the square.
      weight: share of the generated image, from 0 to 1.
    """
    side = len(weight)
    top, left = (photo.shape[0] - side) // 2, (photo.shape[1] - side) // 2
    if len(generated) != side:
        interpolation = cv2.INTER_AREA if len(generated) > side else cv2.INTER_CUBIC
        generated = cv2.resize(generated, (side, side), interpolation=interpolation)
    result = photo.copy()
    square = result[top : top + side, left : left + side]
    mixed = weight[..., None] * generated + (1 - weight[..., None]) * square
    square[...] = np.where(weight[..., None] > 0, np.round(mixed), square).astype(np.uint8)
    return result
