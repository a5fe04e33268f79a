"""Edits of a photograph: the region to generate, the path of the kept latents, and the composition of the result."""

import logging
from collections.abc import Sequence
from typing import Any

import cv2
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from sisma_jax.data.photos import central_square
from sisma_jax.diffusion.solvers import Point, Velocity
from sisma_jax.errors import InputError

logger = logging.getLogger(__name__)


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


def as_region(region: Any) -> Bool[np.ndarray, "H W"]:
    """Returns a region that a caller gives as a bool array: True where it is not zero.

    Args:
      region: (H, W), of numbers or booleans.

    Raises:
      InputError: the region has another number of dimensions, no pixels, or values that are not finite.
    """
    array = np.asarray(region)
    if array.ndim != 2 or array.size == 0 or array.dtype.kind not in "biuf":
        raise InputError(f"region must be an array (H, W), got {array.dtype} {array.shape}.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError("region has values that are not finite; give True where the image is to be generated.")
    return array != 0


def changed_regions(
    masks: Sequence[UInt8[np.ndarray, "_ _"]], before: Sequence[UInt8[np.ndarray, "_ _"]]
) -> list[Bool[np.ndarray, "_ _"]]:
    """Returns where each edited mask differs from the mask before it was edited.

    Args:
      masks: class indices.
      before: one mask for all of them, or one for each.

    Raises:
      InputError: the numbers of masks or their sizes do not correspond.
    """
    if len(before) not in (1, len(masks)):
        raise InputError(f"image_mask has {len(before)} masks for {len(masks)} edited ones; give one, or one for each.")
    pairs = list(zip(masks, list(before) * (len(masks) // len(before)), strict=True))
    for mask, old in pairs:
        if mask.shape != old.shape:
            raise InputError(f"mask is {mask.shape} and image_mask {old.shape}; they must have one size.")
    return [mask != old for mask, old in pairs]


def central_region(region: Bool[np.ndarray, "H W"], photo_shape: tuple[int, ...]) -> Bool[np.ndarray, "S S"]:
    """Returns the central square of a region, which is all that an edit can generate; logs what it leaves out.

    Args:
      region: in the aspect ratio of the photograph, or square for its central square.
      photo_shape: height and width of the photograph in pixels.

    Raises:
      InputError: the region is empty, lies outside of the central square, or has another aspect ratio.
    """
    (height, width), (photo_height, photo_width) = region.shape, photo_shape
    is_similar = abs(height * photo_width - width * photo_height) < max(height, width, photo_height, photo_width)
    if height != width and not is_similar:
        raise InputError(
            f"region is {width}x{height} pixels and the photograph {photo_width}x{photo_height}; give a region with "
            "the aspect ratio of the photograph, or a square one for its central square."
        )
    if not region.any():
        raise InputError(
            "there is nothing to generate, as the mask equals that of the photograph, or the region is empty; edit the "
            "mask, or give another region."
        )
    square = central_square(region)
    share = 1 - square.sum() / region.sum()
    if share == 1:
        raise InputError("region lies outside of the photograph's central square, which is all that an edit generates.")
    if share > 0:
        logger.warning("%.0f %% of the region lie outside of the central square and stay as they are.", 100 * share)
    return square


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
