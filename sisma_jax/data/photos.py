"""Image files: encoded bytes to uint8 RGB arrays and back, and resizing.

Every file that enters from outside is checked here or in `masks.py`, so that a damaged one is named before its pixels
are used. OpenCV decodes, for speed. An image and its mask get the same geometry: the central square of each, resized.
"""

import io
import os

import cv2
import numpy as np
from PIL import Image

from sisma_jax.errors import InputError
from sisma_jax.files import bucket_errors, to_path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")

PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND"
_JPEG_START = b"\xff\xd8"
_JPEG_SCAN = b"\xff\xda"
_JPEG_END = b"\xff\xd9"


def require_complete(data: bytes, source: str) -> None:
    """Raises InputError for bytes that end before the image does.

    Decoders disagree about such files: some fill the rest with grey and only warn. The end marker of a JPEG cannot
    occur inside entropy-coded data, so a file whose last scan has none after it is truncated (or its tail is zeros).
    """
    if not data:
        raise InputError(f"{source} is empty (0 bytes); copy or download it again.")
    cut_jpeg = data.startswith(_JPEG_START) and data.rfind(_JPEG_END) < max(data.rfind(_JPEG_SCAN), len(_JPEG_START))
    cut_png = data.startswith(PNG_START) and _PNG_END not in data
    if cut_jpeg or cut_png:
        raise InputError(f"{source} is truncated after {len(data)} bytes; copy or download it again.")


def not_an_image(source: str, detail: object = "") -> InputError:
    """Returns the error for bytes that no decoder takes."""
    reason = f" ({detail})" if detail else ""
    return InputError(f"{source} cannot be decoded{reason}; a whole JPEG or PNG file is wanted.")


def decode_by_opencv(data: bytes, source: str, flags: int) -> np.ndarray:
    """Returns what OpenCV decodes with `cv2.IMREAD_*` flags: uint8 or uint16, (H, W) or (H, W, 3) in BGR.

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


def decode_image(data: bytes, source: str, *, size_needed: int | None = None) -> np.ndarray:
    """Decodes an image to uint8 RGB, (H, W, 3), upright according to its EXIF orientation.

    Args:
      data: the bytes of a JPEG or PNG file (or of any other format that OpenCV reads).
      source: where the bytes come from, for the message.
      size_needed: side to which the caller will shrink the image. A JPEG of four times that side or more is decoded at
        half size, which takes 0.4 of the time; the resized result differs by a few grey levels at most.

    Raises:
      InputError: the bytes are empty, truncated, or no image.
    """
    require_complete(data, source)
    flags = cv2.IMREAD_COLOR
    if size_needed is not None and data.startswith(_JPEG_START) and _shorter_side(data, source) >= 4 * size_needed:
        flags = cv2.IMREAD_REDUCED_COLOR_2
    return cv2.cvtColor(decode_by_opencv(data, source, flags), cv2.COLOR_BGR2RGB)


def _shorter_side(data: bytes, source: str) -> int:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return min(image.size)
    except (OSError, SyntaxError, ValueError) as error:
        raise not_an_image(source, error) from error


def encode_png(array: np.ndarray) -> bytes:
    """Encodes a uint8 image (H, W, 3) in RGB, or a mask (H, W), as PNG bytes without loss."""
    if array.ndim == 3:
        array = cv2.cvtColor(array, cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".png", array)
    return encoded.tobytes()


def encode_jpeg(image: np.ndarray) -> bytes:
    """Encodes a uint8 image (H, W, 3) in RGB as JPEG bytes of quality 95, colours at full resolution."""
    settings = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), settings)
    return encoded.tobytes()


def central_square(array: np.ndarray) -> np.ndarray:
    """Returns a view of the largest central square of an array (H, W, ...)."""
    height, width = array.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return array[top : top + side, left : left + side]


def resize_image(image: np.ndarray, size: int) -> np.ndarray:
    """Returns the central square of `image` (H, W, 3) at (size, size, 3): area-averaged down, bicubic up."""
    image = central_square(image)
    if image.shape[0] == size:
        return image
    interpolation = cv2.INTER_AREA if image.shape[0] > size else cv2.INTER_CUBIC
    return cv2.resize(image, (size, size), interpolation=interpolation)


def read_bytes(path: str | os.PathLike) -> bytes:
    """Returns the contents of a file.

    Raises:
      InputError: it is missing, a folder, or not readable.
    """
    path = to_path(path)
    try:
        with bucket_errors(path):
            return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_image_file(path: str | os.PathLike) -> np.ndarray:
    """Returns an image file as uint8 RGB, (H, W, 3). Raises InputError as `decode_image` and `read_bytes` do."""
    return decode_image(read_bytes(path), os.fspath(path))
