"""The region of an edit: where masks differ, the square in which the model generates it, and the blended result."""

import logging
import os
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from sisma_jax.data.faces import Square, central_square, square_around
from sisma_jax.data.masks import decode_part
from sisma_jax.data.photos import read_bytes
from sisma_jax.errors import InputError

logger = logging.getLogger(__name__)

Region = np.ndarray | Image.Image | str | os.PathLike[str]
"""The region of an edit in any form that `as_region` takes."""


def as_region(region: Region) -> Bool[np.ndarray, "H W"]:
    """Returns a region that a caller gives as a bool array: True where it is not zero.

    Args:
      region: (H, W), of numbers or booleans; a PIL image of one channel; or the path of a lossless image file.

    Raises:
      InputError: the region has another number of dimensions, no pixels, or values that are not finite; or the file
        cannot be read.
    """
    if isinstance(region, str | os.PathLike):
        return decode_part(read_bytes(region), os.fspath(region))
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


def guessed_regions(
    masks: Sequence[UInt8[np.ndarray, "_ _"]], predicted: UInt8[np.ndarray, "H W"]
) -> list[Bool[np.ndarray, "_ _"]]:
    """Returns where each edited mask differs from the predicted mask of a photograph, apart from thin differences.

    Args:
      masks: class indices, of the whole photograph, or square ones of its central square.
      predicted: mask of the whole photograph.
    """
    height, width = predicted.shape
    regions = []
    for mask in masks:
        before = predicted if is_whole(mask, height, width) else central_square(height, width).crop(predicted)
        before = cv2.resize(before, mask.shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
        # Mask and prediction differ along all outlines of the face.
        kernel = np.ones((max(3, min(mask.shape) // 40),) * 2, np.uint8)
        regions.append(cv2.morphologyEx((mask != before).astype(np.uint8), cv2.MORPH_OPEN, kernel) > 0)
    return regions


def is_whole(array: np.ndarray, height: int, width: int) -> bool:
    """Returns whether a mask or region has the aspect ratio of a photograph, up to rounding by one pixel.

    Args:
      array: (h, w).
      height: of the photograph, in pixels.
      width: of the photograph, in pixels.
    """
    rows, columns = array.shape
    return abs(rows * width - columns * height) < max(rows, columns, height, width)


def require_region(region: Bool[np.ndarray, "h w"], height: int, width: int) -> None:
    """Checks that a region of a photograph can be used.

    Args:
      region: in the aspect ratio of the photograph, or square for its central square.
      height: of the photograph, in pixels.
      width: of the photograph, in pixels.

    Raises:
      InputError: the region is empty, or has another aspect ratio.
    """
    rows, columns = region.shape
    if rows != columns and not is_whole(region, height, width):
        raise InputError(
            f"region is {columns}x{rows} pixels and the photograph {width}x{height}; give a region with the aspect "
            "ratio of the photograph, or a square one for its central square."
        )
    if not region.any():
        raise InputError(
            "there is nothing to generate, as the mask equals that of the photograph, or the region is empty; edit the "
            "mask, or give another region."
        )


def require_square(square: Square, height: int, width: int) -> None:
    """Checks that a square lies inside of a photograph.

    Args:
      square: that a caller gives.
      height: of the photograph, in pixels.
      width: of the photograph, in pixels.

    Raises:
      InputError: the square has no pixels, or reaches out of the photograph.
    """
    ends = square.top + square.side, square.left + square.side
    if square.side < 1 or min(square.top, square.left) < 0 or ends[0] > height or ends[1] > width:
        raise InputError(f"square {square} does not lie inside of the photograph, which has {width}x{height} pixels.")


def choose_square(
    regions: Sequence[Bool[np.ndarray, "_ _"]], faces: Sequence[Square], height: int, width: int
) -> Square:
    """Returns the square of a photograph in which the model generates regions.

    It is that of the face that holds most of the regions, if this is more than half of them; else the central square,
    if it holds them all; else the largest square around them.

    Args:
      regions: of the photograph, in its aspect ratio, or square ones for its central square.
      faces: squares around the faces in the photograph.
      height: of the photograph, in pixels.
      width: of the photograph, in pixels.
    """
    central = central_square(height, width)
    whole = [region for region in regions if is_whole(region, height, width)]
    if len(whole) < len(regions):
        return central
    shares = [min(_share_inside(region, square, width) for region in whole) for square in faces]
    if shares and max(shares) > 0.5:
        return faces[int(np.argmax(shares))]
    if all(_share_inside(region, central, width) == 1 for region in whole):
        return central
    pixels = [(np.argwhere(region), width / region.shape[1]) for region in whole]
    first = np.min([found.min(axis=0) * factor for found, factor in pixels], axis=0)
    last = np.max([(found.max(axis=0) + 1) * factor for found, factor in pixels], axis=0)
    down, across = (first + last) / 2
    return square_around(across, down, min(height, width), height, width)


def sample_mask(
    mask: UInt8[np.ndarray, "h w"], square: Square, height: int, width: int, size: int
) -> UInt8[np.ndarray, "S S"]:
    """Returns the part of a mask that lies in a square of a photograph, by nearest-neighbour sampling.

    Args:
      mask: in the aspect ratio of the photograph, or square, for its central square.
      square: of the photograph; for a square mask of a photograph that is not square, the central one.
      height: of the photograph, in pixels.
      width: of the photograph, in pixels.
      size: height and width S of the result.
    """
    steps = (np.arange(size) + 0.5) / size
    if is_whole(mask, height, width):
        down, across = (square.top + square.side * steps) / height, (square.left + square.side * steps) / width
    else:
        down = across = steps
    rows, columns = ((place * length).astype(int) for place, length in zip((down, across), mask.shape, strict=True))
    return mask[np.minimum(rows, mask.shape[0] - 1)][:, np.minimum(columns, mask.shape[1] - 1)]


def crop_region(region: Bool[np.ndarray, "h w"], square: Square, height: int, width: int) -> Bool[np.ndarray, "P P"]:
    """Returns the part of a region in a square of a photograph, at its resolution; logs what it leaves out.

    Args:
      region: in the aspect ratio of the photograph, or square, for its central square. A pixel of the photograph that
        overlaps the region belongs to it.
      square: of side P; for a square region of a photograph that is not square, the central one.
      height: of the photograph, in pixels.
      width: of the photograph, in pixels.

    Raises:
      InputError: the whole region lies outside of the square.
    """
    if not is_whole(region, height, width):
        return resize_region(region, square.side)
    at_photo = _resize(region, height, width)
    inside = square.crop(at_photo)
    share = 1 - inside.sum() / at_photo.sum()
    if share == 1:
        raise InputError(
            f"region lies outside of {square}, which is all that this edit generates; give another square."
        )
    if share > 0:
        logger.warning("%.0f %% of the region lie outside of the generated square and stay as they are.", 100 * share)
    return inside


def _scaled(square: Square, array: np.ndarray, width: int) -> Square:
    """Returns a square of a photograph of this width in the pixels of a mask of it."""
    rows, columns = array.shape
    factor = columns / width
    return square_around(
        (square.left + square.side / 2) * factor,
        (square.top + square.side / 2) * factor,
        square.side * factor,
        rows,
        columns,
    )


def _share_inside(region: Bool[np.ndarray, "h w"], square: Square, width: int) -> float:
    return float(_scaled(square, region, width).crop(region).sum() / region.sum())


def resize_region(region: Bool[np.ndarray, "H W"], size: int) -> Bool[np.ndarray, "S S"]:
    """Returns a square region at another resolution; a pixel that overlaps the region belongs to it.

    Args:
      region: square, H = W.
      size: height and width of the result, in pixels.
    """
    return _resize(region, size, size)


def _resize(region: Bool[np.ndarray, "H W"], height: int, width: int) -> Bool[np.ndarray, "h w"]:
    smaller = height < region.shape[0] or width < region.shape[1]
    interpolation = cv2.INTER_AREA if smaller else cv2.INTER_NEAREST_EXACT
    return cv2.resize(region.astype(np.float32), (width, height), interpolation=interpolation) > 0


def feather(region: Bool[np.ndarray, "H W"], margin: float | int) -> Float[np.ndarray, "H W"]:
    """Returns float32 weights that are 1 in the region and fall linearly to 0 at distances above the margin.

    Args:
      region: contains at least one pixel.
      margin: in pixels; 0 gives 1 in the region and 0 elsewhere.
    """
    distance = cv2.distanceTransform((~region).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.clip(1 - distance / (margin + 1), 0, 1).astype(np.float32)


def composite(
    photo: np.ndarray, generated: UInt8[np.ndarray, "S S 3"], weight: Float[np.ndarray, "P P"], square: Square
) -> np.ndarray:
    """Returns the photograph, blended with a generated image in a square of side P.

    Pixels with weight 0 are bit-identical to those of the photograph, at its bit depth.

    Args:
      photo: uint8 or uint16 (H, W, 3), RGB.
      generated: RGB, resized to the square.
      weight: weight of the generated image in the square, in [0, 1].
      square: where the generated image lies.
    """
    if len(generated) != square.side:
        interpolation = cv2.INTER_AREA if len(generated) > square.side else cv2.INTER_CUBIC
        generated = cv2.resize(generated, (square.side, square.side), interpolation=interpolation)
    factor = np.iinfo(photo.dtype).max // 255  # 257 for 16 bits: 255 becomes 65535
    result = photo.copy()
    part = square.crop(result)
    mixed = weight[..., None] * (generated * np.float32(factor)) + (1 - weight[..., None]) * part
    part[...] = np.where(weight[..., None] > 0, np.round(mixed), part).astype(photo.dtype)
    return result
