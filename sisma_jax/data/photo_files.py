"""Photographs as files: reads and writes the pixels at their own bit depth, with what else the file carries."""

import dataclasses
import io
import logging
import os
import struct
import zlib

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from sisma_jax.data.photos import PNG_START, decode_by_opencv, decode_image, not_an_image, read_bytes, require_readable
from sisma_jax.data.rasters import ORIENTATION, PNG_DEPTH, TIFF_BITS, upright
from sisma_jax.errors import InputError
from sisma_jax.files import write_atomically

_FORMATS = {"JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP"}

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Photo:
    """A photograph, upright.

    Attributes:
      pixels: RGB (H, W, 3), uint8, or uint16 if the file has 16 bits per sample.
      alpha: (H, W), opacity in the dtype of `pixels`; None if the file has none.
      icc_profile: the colour profile of the file; None if it has none.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    icc_profile: bytes | None = None


def to_8_bits(pixels: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the pixels of a photograph with 8 bits per sample.

    Args:
      pixels: uint8 or uint16 (H, W, 3), RGB.
    """
    return pixels if pixels.dtype == np.uint8 else np.round(pixels / 257).astype(np.uint8)


def read_photo(path: str | os.PathLike[str]) -> Photo:
    """Returns the photograph in a file.

    Args:
      path: of a JPEG, PNG, WebP, TIFF or BMP file, on the disk or in a bucket.

    Raises:
      InputError: the file cannot be read; it is damaged; or it has another format, several pages or frames, or a colour
        mode that is neither grey nor RGB, with 8 or 16 bits.
    """
    return decode_photo(read_bytes(path), os.fspath(path))


def decode_photo(data: bytes, source: str) -> Photo:
    """Returns the photograph in the bytes of a file.

    Args:
      data: the bytes.
      source: where they come from, for the error message.

    Raises:
      InputError: as for `read_photo`.
    """
    require_readable(data, source)
    try:
        with Image.open(io.BytesIO(data)) as image:
            _require_readable(image, source)
            orientation, profile = image.getexif().get(ORIENTATION, 1), _profile(image, source)
            if image.format in ("JPEG", "MPO"):
                return Photo(decode_image(data, source), None, profile)
            pixels = _with_16_bits(image, data, source) if _is_deep(image, data) else _with_8_bits(image)
            if image.format == "TIFF":  # both decoders turn a TIFF themselves, and no other format
                orientation = 1
    except InputError:
        raise
    except Exception as error:  # Pillow's readers raise whatever a damaged file makes them
        raise not_an_image(source, error) from error
    pixels = upright(pixels, orientation)
    alpha = np.ascontiguousarray(pixels[..., 3]) if pixels.shape[-1] == 4 else None
    return Photo(np.ascontiguousarray(pixels[..., :3]), alpha, profile)


def _is_deep(image: Image.Image, data: bytes) -> bool:
    """Whether the file has 16 bits per sample."""
    if isinstance(image, TiffImageFile):
        return 16 in np.atleast_1d(image.tag_v2.get(TIFF_BITS, 1)).tolist()
    return image.format == "PNG" and data[PNG_DEPTH] == 16


def _with_8_bits(image: Image.Image) -> UInt8[np.ndarray, "H W _"]:
    has_alpha = image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info
    return np.asarray(image.convert("RGBA" if has_alpha else "RGB"))


def _with_16_bits(image: Image.Image, data: bytes, source: str) -> np.ndarray:
    """Returns the pixels of a PNG or TIFF file, RGB or RGBA; Pillow would reduce them to 8 bits."""
    if "transparency" in image.info:
        raise InputError(f"{source} marks one colour of 16 bits as transparent; save it with an alpha channel.")
    stored = decode_by_opencv(data, source, cv2.IMREAD_UNCHANGED)
    if stored.dtype != np.uint16:
        raise InputError(f"{source} has samples of type {stored.dtype}; save it with 8 or 16 bits per sample.")
    if stored.ndim == 2:
        return np.repeat(stored[..., None], 3, axis=-1)
    return np.concatenate([stored[..., 2::-1], stored[..., 3:]], axis=-1)


def _profile(image: Image.Image, source: str) -> bytes | None:
    """Returns the colour profile of a file, if it is one of RGB colours, as what is written is RGB."""
    profile = image.info.get("icc_profile")
    if profile and profile[16:20] != b"RGB ":
        logger.warning("%s: its colour profile is not one of RGB colours, and is left out.", source)
        return None
    return profile or None


def _require_readable(image: Image.Image, source: str) -> None:
    if image.format not in _FORMATS:
        raise InputError(f"{source} is a file of the format {image.format}; save the photograph as PNG or JPEG.")
    if (frames := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":  # whose others are previews
        raise InputError(f"{source} has {frames} pages or frames; save the one that you mean.")
    if image.mode in ("CMYK", "YCCK", "LAB", "HSV", "F"):
        raise InputError(f"{source} has the colour mode {image.mode}; convert it to RGB.")


def encode_photo(photo: Photo) -> bytes:
    """Returns the bytes of a PNG file with all that a photograph carries; it is lossless."""
    bgr = photo.pixels[..., ::-1]
    stored = bgr if photo.alpha is None else np.concatenate([bgr, photo.alpha[..., None]], axis=-1)
    _, encoded = cv2.imencode(".png", stored)
    data = encoded.tobytes()
    if photo.icc_profile is None:
        return data
    content = b"ICC profile\0\0" + zlib.compress(photo.icc_profile)
    chunk = struct.pack(">I", len(content)) + b"iCCP" + content + struct.pack(">I", zlib.crc32(b"iCCP" + content))
    start = len(PNG_START) + 25  # behind the header, which is the first chunk
    return data[:start] + chunk + data[start:]


def save_photo(path: str | os.PathLike[str], photo: Photo) -> None:
    """Writes a photograph as a PNG file, atomically.

    Raises:
      OSError: the file cannot be written.
    """
    write_atomically(path, encode_photo(photo))
