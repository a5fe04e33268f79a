"""Images in and out. The header of a file is checked against the limits before anything is decoded."""

import dataclasses
import io
from typing import Any

import numpy as np
from PIL import Image

from sisma_jax.data.classes import ClassSet
from sisma_jax.data.masks import decode_mask, decode_part
from sisma_jax.data.photo_files import Photo, decode_photo, encode_photo
from sisma_jax.data.photos import PNG_START
from sisma_jax.serving.bodies import Upload
from sisma_jax.serving.limits import MAX_LIST_PIXELS, Limits
from sisma_jax.serving.problems import Problem

_PHOTO_FORMATS = ("PNG", "JPEG", "WEBP")
# More than the compression of flat images needs: DEFLATE reaches 1032:1.
_MAX_SIDE = 1 << 15


def mask_of(value: Any, name: str, classes: ClassSet, limits: Limits) -> np.ndarray:
    """Returns a mask, uint8 class indices (H, W).

    Args:
      value: `Upload` of a PNG file, or a nested list.
      name: of the field.
      classes: of the mask.
      limits: of pixels.

    Raises:
      Problem: the value has another form, or too many pixels.
      InputError: the file is damaged, or is no mask of these classes.
    """
    if isinstance(value, Upload):
        _require_png(value, name, limits)
        return decode_mask(bytes(value), name, classes)
    return classes.check(_rows(value, name), name)


def region_of(value: Any, name: str, limits: Limits) -> np.ndarray:
    """Returns a region, bool (H, W); the arguments are those of `mask_of`.

    Raises:
      Problem: the value has another form, or too many pixels.
      InputError: the file is damaged.
    """
    if isinstance(value, Upload):
        _require_png(value, name, limits)
        return decode_part(bytes(value), name)
    return _rows(value, name) != 0


def photo_of(value: Upload, name: str, limits: Limits) -> Photo:
    """Returns a photograph.

    Args:
      value: of a PNG, JPEG or WebP file.
      name: of the field.
      limits: of pixels.

    Raises:
      Problem: the file has another format, or too many pixels.
      InputError: the file is damaged.
    """
    try:
        with Image.open(io.BytesIO(value), formats=_PHOTO_FORMATS) as image:
            size = image.size
    except Image.DecompressionBombError:
        raise Problem(413, f"{name!r} has more than {limits.photo_pixels:,} pixels, the limit; shrink it.") from None
    except Exception:  # Pillow's readers raise whatever a damaged file makes them
        raise Problem(415, f"{name!r} is no PNG, JPEG or WebP file, or it is damaged.") from None
    _require_size(*size, name, limits.photo_pixels)
    return decode_photo(bytes(value), name)


def png_of(pixels: np.ndarray, photo: Photo | None = None) -> bytes:
    """Returns the bytes of a PNG file.

    Args:
      pixels: uint8 or uint16, RGB (H, W, 3) or a mask (H, W).
      photo: whose alpha channel and colour profile the file carries.
    """
    if photo is not None:
        return encode_photo(dataclasses.replace(photo, pixels=pixels))
    buffer = io.BytesIO()
    # Level 1 takes a third of the time of the default and a tenth more bytes.
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _require_png(value: Upload, name: str, limits: Limits) -> None:
    if not value.startswith(PNG_START) or value[12:16] != b"IHDR" or len(value) < 33:
        raise Problem(415, f"{name!r} is no PNG file; send the mask in this lossless format.")
    width, height = (int.from_bytes(value[i : i + 4], "big") for i in (16, 20))
    _require_size(width, height, name, limits.mask_pixels)


def _require_size(width: int, height: int, name: str, pixels: int) -> None:
    if width * height > pixels or max(width, height) > _MAX_SIDE:
        raise Problem(
            413, f"{name!r} has {width}x{height} pixels; the limits are {pixels:,} pixels and {_MAX_SIDE:,} a side."
        )


def _rows(rows: Any, name: str) -> np.ndarray:
    if not rows or not all(isinstance(row, list) and len(row) == len(rows[0]) > 0 for row in rows):
        raise Problem(422, f"{name!r} must be a list of rows of the same length.")
    if len(rows) * len(rows[0]) > MAX_LIST_PIXELS:
        raise Problem(413, f"{name!r} has more than {MAX_LIST_PIXELS:,} pixels, the limit of a list; send a PNG file.")
    if not all(type(value) is int and 0 <= value < 256 for row in rows for value in row):
        raise Problem(422, f"{name!r} must hold whole numbers in [0, 255].")
    return np.array(rows, np.uint8)
