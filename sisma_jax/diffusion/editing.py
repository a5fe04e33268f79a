"""Edits of a photograph: the region to generate, the path of the kept latents, and the composition of the result."""

import cv2
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from sisma_jax.diffusion.solvers import Point, Velocity


def keeping(
    velocity: Velocity, noise: Point, kept: Float[Array, "#B H W C"], is_generated: Bool[Array, "#B H W 1"]
) -> Velocity:
    """Returns a velocity that equals `velocity` where `is_generated`, and elsewhere leads from `noise` to `kept`.

    The kept part follows its straight path t kept + (1 - t) noise, whose velocity is constant. Every solver follows
    this path exactly, and at every time the network sees the kept part at the right noise level. The generated part
    is therefore consistent with its surroundings.

    Args:
      velocity: velocity of the generated part.
      noise: point at t = 0, where the integration starts.
      kept: latent of the photograph; one for all examples, or one per example.
      is_generated: latent positions where `velocity` applies.
    """
    of_kept = kept - noise
    return lambda x, t: jnp.where(is_generated, velocity(x, t), of_kept)


def to_latent_grid(region: Bool[Array, "B H W"], downsampling: int) -> Bool[Array, "B h w 1"]:
    """Returns the latent positions that contain any pixel of the region.

    Args:
      region: pixels; height and width are multiples of `downsampling`.
      downsampling: pixels per latent position in each direction.
    """
    batch, height, width = region.shape
    squares = region.reshape(batch, height // downsampling, downsampling, width // downsampling, downsampling)
    return squares.any(axis=(2, 4))[..., None]


def resize_region(region: Bool[np.ndarray, "H W"], size: int) -> Bool[np.ndarray, "S S"]:
    """Returns a square region at another resolution; a pixel that overlaps the region belongs to it.

    Args:
      region: square, H = W.
      size: height and width of the result, in pixels.
    """
    smaller = size < region.shape[0]
    interpolation = cv2.INTER_AREA if smaller else cv2.INTER_NEAREST_EXACT
    return cv2.resize(region.astype(np.float32), (size, size), interpolation=interpolation) > 0


def feather(region: Bool[np.ndarray, "H W"], margin: float | int) -> Float[np.ndarray, "H W"]:
    """Returns float32 weights that are 1 in the region and fall linearly to 0 at distances above the margin.

    Args:
      region: contains at least one pixel.
      margin: in pixels; 0 gives 1 in the region and 0 elsewhere.
    """
    distance = cv2.distanceTransform((~region).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.clip(1 - distance / (margin + 1), 0, 1).astype(np.float32)


def composite(
    photo: UInt8[np.ndarray, "H W 3"], generated: UInt8[np.ndarray, "S S 3"], weight: Float[np.ndarray, "P P"]
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the photograph, blended with a generated image in its central square of side P.

    Pixels with weight 0 are bit-identical to those of the photograph.

    Args:
      photo: RGB.
      generated: RGB, resized to the square.
      weight: weight of the generated image in the central square, in [0, 1].
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
