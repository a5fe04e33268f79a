"""Decodes and resizes mask files, as uint8 class indices.

OpenCV decodes 8-bit grey PNG files, because it is faster. Pillow decodes all other files: the labels of a palette PNG
are its palette indices, which OpenCV replaces with colours.
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

# Bit depth and colour type in the header of a PNG file, which is always its first chunk.
_GREY_8_BIT = b"\x08\x00"


def decode_mask(data: bytes, source: str, classes: ClassSet) -> np.ndarray:
    """Returns a mask as uint8 class indices, (H, W).

    The labels of a palette image are its palette indices, unless the palette holds only labels as grey values: then the
    grey values are the labels. If an image has three equal channels, one of them holds the labels. An alpha channel is
    ignored.

    Args:
      data: contents of a PNG file, or of another lossless format that Pillow reads.
      source: where the bytes come from, for the error message.
      classes: class set of the labels.

    Raises:
      InputError: `data` is empty, truncated, not an image, a JPEG, or a colour image; or it holds a value that is
        neither a class index nor the ignored label.
    """
    require_complete(data, source)
    if data.startswith(PNG_START) and data[24:26] == _GREY_8_BIT:
        # Prepared shards hold such files. OpenCV takes a third of Pillow's time.
        return classes.check(decode_by_opencv(data, source, cv2.IMREAD_GRAYSCALE), source)
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "JPEG":
                raise InputError(
                    f"{source} is a JPEG, whose lossy compression changes class indices; save masks as PNG."
                )
            values = _indices(image, classes)
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise not_an_image(source, error) from error
    if values.ndim == 3:
        # Drop the alpha channel: "LA" has two channels, "RGBA" four.
        channels = values[..., : 1 if values.shape[-1] == 2 else 3]
        if (channels != channels[..., :1]).any():
            raise InputError(
                f"{source} holds colours (mode {image.mode}); expected a single channel of class indices "
                f"0..{len(classes) - 1}. Map each colour to its class index and save an 8-bit grey PNG."
            )
        values = channels[..., 0]
    if values.dtype == bool:
        values = values.astype(np.uint8)
    return classes.check(values, source)


def _indices(image: Image.Image, classes: ClassSet) -> np.ndarray:
    values = np.asarray(image)
    if image.mode == "P":
        palette = np.asarray(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
        # PNG optimisers rewrite a grey label map as a palette image. The palette then holds the grey values that occur,
        # in any order. If all its entries are grey and valid labels, the grey value is the label, not the index.
        is_grey = (palette == palette[:, :1]).all()
        if is_grey and classes.is_label(palette[:, 0]).all() and values.max() < len(palette):
            values = palette[values, 0]
    return values


def decode_part(data: bytes, source: str) -> np.ndarray:
    """Returns the pixels of one facial part as bool (H, W), from an image of the part in white on black.

    All colours other than black belong to the part.

    Args:
      data: contents of the image file.
      source: where the bytes come from, for the error message.

    Raises:
      InputError: `data` is empty, truncated, or not an image.
    """
    require_complete(data, source)
    # The official part files have three equal channels. This flag drops an alpha channel.
    image = decode_by_opencv(data, source, cv2.IMREAD_ANYCOLOR)
    return image.astype(bool) if image.ndim == 2 else np.asarray(image.any(axis=-1))


def read_mask_file(path: str | os.PathLike[str], classes: ClassSet) -> np.ndarray:
    """Returns a mask file as uint8 class indices, (H, W), decoded by `decode_mask`.

    Raises:
      InputError: the file cannot be read, or is not a mask of these classes.
    """
    return decode_mask(read_bytes(path), os.fspath(path), classes)


def resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """Returns the central square of a mask, resized to (size, size) by nearest-neighbour sampling at pixel centres.

    Args:
      mask: uint8 (H, W).
      size: height and width of the result, in pixels.
    """
    mask = central_square(mask)
    if mask.shape[0] == size:
        return mask
    # INTER_NEAREST samples the corner of each cell, which shifts the mask relative to the image.
    return cv2.resize(mask, (size, size), interpolation=cv2.INTER_NEAREST_EXACT)


def mask_files(path: str | os.PathLike[str]) -> list[AnyPath]:
    """Returns the JPEG and PNG files in a folder, sorted by name, or `[path]` if `path` is a file.

    Files whose names start with a dot are left out.

    Raises:
      InputError: `path` does not exist, or is a folder without images.
    """
    path = to_path(path)
    if not path.is_dir():
        if not path.exists():
            raise InputError(f"{path} does not exist; name an image file or a folder of image files.")
        return [path]
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    if not files:
        raise InputError(f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)}).")
    return files
