"""Decodes, encodes and resizes image files, as uint8 RGB arrays.

This module and `masks.py` check every file that a user supplies, so an error names a damaged file before its pixels are
used. OpenCV decodes, because it is faster than Pillow. Image and mask have the same geometry: both are cropped to the
central square and resized.
"""

import io
import os

import cv2
import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from sisma_jax.errors import InputError
from sisma_jax.files import bucket_errors, to_path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")

# Photographs and masks of more pixels are refused; 13,377 x 13,377 are read. Above this number Pillow, which decodes
# some of the files, takes an image for a decompression bomb.
MAX_PIXELS = 178_956_970
# What OpenCV decodes. It limits only files that are reduced at once, when a data set is prepared.
_OPENCV_PIXELS = 2**30

PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND"
_JPEG_START = b"\xff\xd8"
_JPEG_SCAN = b"\xff\xda"
_JPEG_END = b"\xff\xd9"


def require_complete(data: bytes, source: str) -> None:
    """Checks that the bytes of a JPEG or PNG file are not truncated. Other formats pass unless they are empty.

    Decoders differ in how they treat truncated files: some fill the missing pixels with grey and only warn. The end
    marker of a JPEG cannot occur inside entropy-coded data. If no end marker follows the last start of a scan, the file
    is truncated, or its tail is overwritten with zeros.

    Args:
      data: contents of the file.
      source: where the bytes come from, for the error message.

    Raises:
      InputError: `data` is empty or truncated.
    """
    if not data:
        raise InputError(f"{source} is empty (0 bytes); copy or download it again.")
    cut_jpeg = data.startswith(_JPEG_START) and data.rfind(_JPEG_END) < max(data.rfind(_JPEG_SCAN), len(_JPEG_START))
    cut_png = data.startswith(PNG_START) and _PNG_END not in data
    if cut_jpeg or cut_png:
        raise InputError(f"{source} is truncated after {len(data)} bytes; copy or download it again.")
    if data.startswith(PNG_START) and not _has_whole_chunks(data):  # OpenCV would allocate what a chunk claims to hold
        raise not_an_image(source, "a chunk exceeds the file")


def _has_whole_chunks(png: bytes) -> bool:
    """Whether all chunks of a PNG file, up to its end marker, lie inside of the file."""
    position = len(PNG_START)
    while position + 12 <= len(png):
        name, length = png[position + 4 : position + 8], int.from_bytes(png[position : position + 4], "big")
        position += 12 + length
        if name == _PNG_END:
            return position <= len(png)
    return False


def require_readable(data: bytes, source: str, stored_size: int | None = None) -> tuple[int, int] | None:
    """Checks that the bytes of an image file are not truncated, and that its header states a size that is read.

    Args:
      data: contents of the file.
      source: where the bytes come from, for the error message.
      stored_size: for a raw file of a data set, the side in pixels to which its preparation reduces images; 0 if it
        keeps them as they are. None for any other file.

    Returns:
      Width and height in pixels by the header; None if Pillow cannot read it, so that the decoder has to decide.

    Raises:
      InputError: `data` is empty or truncated, or the image has more than MAX_PIXELS pixels; if `stored_size` reduces
        it, more than OpenCV decodes.
    """
    require_complete(data, source)
    limit = _OPENCV_PIXELS if stored_size else MAX_PIXELS
    fix = "shrink it, or give data.stored_size, to which images are reduced" if stored_size == 0 else "shrink it"
    try:
        size = _size(data)
    except Image.DecompressionBombError as error:  # of other formats than JPEG and PNG
        raise InputError(f"{source} has more than {MAX_PIXELS:,} pixels, the limit; shrink it.") from error
    if size is not None and size[0] * size[1] > limit:
        raise InputError(f"{source} is {size[0]}x{size[1]} pixels, and the limit is {limit:,} pixels; {fix}.")
    return size


def _size(data: bytes) -> tuple[int, int] | None:
    if data.startswith(PNG_START):
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    try:
        # Unlike `Image.open`, the class of a format has no limit of its own, so an error can state the size.
        with JpegImageFile(io.BytesIO(data)) if data.startswith(_JPEG_START) else Image.open(io.BytesIO(data)) as image:
            return image.size
    except Image.DecompressionBombError:
        raise
    except Exception:  # Pillow's readers raise whatever a damaged file makes them
        return None


def not_an_image(source: str, detail: object = "") -> InputError:
    """Returns the error for bytes that cannot be decoded.

    Args:
      source: where the bytes come from.
      detail: message of the decoder, if it has one.
    """
    reason = f" ({detail})" if detail else ""
    return InputError(f"{source} cannot be decoded{reason}; expected a complete JPEG or PNG file.")


def decode_by_opencv(data: bytes, source: str, flags: int) -> np.ndarray:
    """Returns the pixels of an encoded image, uint8 or uint16, (H, W) or (H, W, 3) in BGR order.

    Args:
      data: contents of the image file.
      source: where the bytes come from, for the error message.
      flags: `cv2.IMREAD_*` flags, which decide the dtype and the number of channels.

    Raises:
      InputError: OpenCV cannot decode the bytes.
    """
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise not_an_image(source, error.err) from error
    if image is None:
        raise not_an_image(source)
    return image


def decode_image(
    data: bytes, source: str, *, size_needed: int | None = None, stored_size: int | None = None
) -> np.ndarray:
    """Returns an image as uint8 RGB, (H, W, 3), rotated according to its EXIF orientation.

    Args:
      data: contents of a JPEG or PNG file, or of another format that OpenCV reads.
      source: where the bytes come from, for the error message.
      size_needed: resolution to which the caller resizes the image. A JPEG whose shorter side is at least four times as
        large is decoded at half size, which takes 0.4 times as long. The resized image then differs by at most a few
        grey levels. None decodes at full size.
      stored_size: for a raw file of a data set, the side to which it is reduced, or 0; see `require_readable`.

    Raises:
      InputError: `data` is empty, truncated, not an image, or too large, as for `require_readable`.
    """
    size = require_readable(data, source, stored_size)
    flags = cv2.IMREAD_COLOR
    if size_needed is not None and data.startswith(_JPEG_START) and size is not None and min(size) >= 4 * size_needed:
        flags = cv2.IMREAD_REDUCED_COLOR_2
    return cv2.cvtColor(decode_by_opencv(data, source, flags), cv2.COLOR_BGR2RGB)


def encode_png(array: np.ndarray) -> bytes:
    """Returns the bytes of a PNG file, which is lossless.

    Args:
      array: uint8 RGB image (H, W, 3), or mask (H, W).
    """
    if array.ndim == 3:
        array = cv2.cvtColor(array, cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".png", array)
    return encoded.tobytes()


def encode_jpeg(image: np.ndarray) -> bytes:
    """Returns the bytes of a JPEG file of quality 95 without chroma subsampling (4:4:4).

    Args:
      image: uint8 RGB (H, W, 3).
    """
    settings = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), settings)
    return encoded.tobytes()


def central_square(array: np.ndarray) -> np.ndarray:
    """Returns a view of the central square of an array (H, W, ...), with side min(H, W)."""
    height, width = array.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return array[top : top + side, left : left + side]


def resize_image(image: np.ndarray, size: int) -> np.ndarray:
    """Returns the central square of an image, resized to (size, size, 3).

    Area averaging shrinks an image, and bicubic interpolation enlarges it.

    Args:
      image: uint8 RGB (H, W, 3).
      size: height and width of the result, in pixels.
    """
    image = central_square(image)
    if image.shape[0] == size:
        return image
    interpolation = cv2.INTER_AREA if image.shape[0] > size else cv2.INTER_CUBIC
    return cv2.resize(image, (size, size), interpolation=interpolation)


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Returns the contents of a file on the disk or in a bucket.

    Raises:
      InputError: the file does not exist, is a folder, or cannot be read.
    """
    path = to_path(path)
    try:
        with bucket_errors(path):
            return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_image_file(path: str | os.PathLike[str]) -> np.ndarray:
    """Returns an image file as uint8 RGB, (H, W, 3), rotated according to its EXIF orientation.

    Raises:
      InputError: the file cannot be read, or is empty, truncated, not an image, or of more than MAX_PIXELS pixels.
    """
    return decode_image(read_bytes(path), os.fspath(path))
