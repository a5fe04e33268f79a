"""Mask files: encoded bytes to uint8 class indices, and resizing.

A plain grey PNG is decoded by OpenCV, for speed; any other file by Pillow, because the labels of a palette PNG are its
indices, and OpenCV expands palettes into colours.
"""

import io
import os

import cv2
import numpy as np
from PIL import Image

from sisma_jax.data.classes import ClassSet
from sisma_jax.data.photos import (
    IMAGE_SUFFIXES,
    PNG_START,
    central_square,
    decode_by_opencv,
    not_an_image,
    read_bytes,
    require_complete,
)
from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, to_path

# Bit depth and colour type in a PNG's header, which is always its first chunk.
_GREY_8_BIT = b"\x08\x00"


def decode_mask(data: bytes, source: str, classes: ClassSet) -> np.ndarray:
    """Decodes a mask to uint8 class indices, (H, W).

    Palette files give their indices; files with three equal channels give one of them.

    Args:
      data: the bytes of a PNG file (or of another lossless format that Pillow reads).
      source: where the bytes come from, for the message.
      classes: that the mask's labels belong to.

    Raises:
      InputError: the bytes are empty, truncated, no image, a lossy JPEG, an image in colours, or hold values that are
        no label.
    """
    require_complete(data, source)
    if data.startswith(PNG_START) and data[24:26] == _GREY_8_BIT:
        # What prepared shards hold: here OpenCV takes a third of Pillow's time.
        return classes.check(decode_by_opencv(data, source, cv2.IMREAD_GRAYSCALE), source)
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "JPEG":
                raise InputError(f"{source} is a JPEG, which blurs class indices into one another; save masks as PNG.")
            values = _indices(image, classes)
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise not_an_image(source, error) from error
    if values.ndim == 3:
        # An alpha channel is no label; "LA" has two channels, "RGBA" four.
        channels = values[..., : 1 if values.shape[-1] == 2 else 3]
        if (channels != channels[..., :1]).any():
            raise InputError(
                f"{source} holds colours (mode {image.mode}); a mask is one channel of class indices "
                f"0..{len(classes) - 1}: map each colour to its class and save it as an 8-bit grey PNG."
            )
        values = channels[..., 0]
    if values.dtype == bool:
        values = values.astype(np.uint8)
    return classes.check(values, source)


def _indices(image: Image.Image, classes: ClassSet) -> np.ndarray:
    values = np.asarray(image)
    if image.mode == "P":
        palette = np.asarray(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
        # PNG optimisers rewrite a grey label map as a palette of the greys that occur, in any order. A palette
        # made of nothing but labels as greys is such a one: there the grey is the label.
        is_grey = (palette == palette[:, :1]).all()
        if is_grey and classes.is_label(palette[:, 0]).all() and values.max() < len(palette):
            values = palette[values, 0]
    return values


def decode_part(data: bytes, source: str) -> np.ndarray:
    """Decodes the image of one facial part, white on black, to bool (H, W): any colour but black is the part.

    Raises:
      InputError: the bytes are empty, truncated, or no image.
    """
    require_complete(data, source)
    # The official part files repeat their one channel three times; alpha is dropped.
    image = decode_by_opencv(data, source, cv2.IMREAD_ANYCOLOR)
    return image.astype(bool) if image.ndim == 2 else image.any(axis=-1)


def read_mask_file(path: str | os.PathLike, classes: ClassSet) -> np.ndarray:
    """Returns a mask file as uint8 class indices, (H, W). Raises InputError as `decode_mask` and `read_bytes` do."""
    return decode_mask(read_bytes(path), os.fspath(path), classes)


def resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """Returns the central square of `mask` (H, W) at (size, size): the label nearest to each pixel's centre."""
    mask = central_square(mask)
    if mask.shape[0] == size:
        return mask
    # INTER_NEAREST takes the pixel at the corner of each cell, which shifts the mask against the image.
    return cv2.resize(mask, (size, size), interpolation=cv2.INTER_NEAREST_EXACT)


def mask_files(path: str | os.PathLike) -> list[AnyPath]:
    """Returns `path` itself if it is a file, or the JPEG and PNG files of a folder, sorted by name.

    Raises:
      InputError: the path does not exist, or is a folder without images.
    """
    path = to_path(path)
    if not path.is_dir():
        if not path.exists():
            raise InputError(f"{path} does not exist; name an image file or a folder of them.")
        return [path]
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    if not files:
        raise InputError(f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)}).")
    return files
