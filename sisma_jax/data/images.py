"""Image and mask files: encoded bytes to uint8 arrays and back, and resizing.

Everything that enters from disk passes through here, so that a damaged file is named before its pixels are used.
Images are decoded by OpenCV, for speed; masks that are no plain grey PNG by Pillow, because the labels of a palette
PNG are its indices, and OpenCV expands palettes into colours. An image and its mask get the same geometry: the central
square of each, resized.
"""

import io
import os
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from sisma_jax.data import labels
from sisma_jax.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")

_JPEG_START = b"\xff\xd8"
_JPEG_SCAN = b"\xff\xda"
_JPEG_END = b"\xff\xd9"
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND"
# Bit depth and colour type in a PNG's header, which is always its first chunk.
_GREY_8_BIT = b"\x08\x00"


def _check_complete(data: bytes, source: str) -> None:
    """Raises InputError for bytes that end before the image does.

    Decoders disagree about such files: some fill the rest with grey and only warn. The end marker of a JPEG cannot
    occur inside entropy-coded data, so a file whose last scan has none after it is cut off (or its tail is zeros).
    """
    if not data:
        raise InputError(f"{source} is empty (0 bytes); copy or download it again.")
    cut_jpeg = data.startswith(_JPEG_START) and data.rfind(_JPEG_END) < max(data.rfind(_JPEG_SCAN), len(_JPEG_START))
    cut_png = data.startswith(_PNG_START) and _PNG_END not in data
    if cut_jpeg or cut_png:
        raise InputError(f"{source} is truncated after {len(data)} bytes; copy or download it again.")


def _not_an_image(source: str, detail: object = "") -> InputError:
    reason = f" ({detail})" if detail else ""
    return InputError(f"{source} cannot be decoded{reason}; a whole JPEG or PNG file is wanted.")


def decode_image(data: bytes, source: str, *, size_needed: int | None = None) -> np.ndarray:
    """Decodes an image to uint8 RGB, (H, W, 3), upright as its EXIF orientation tells.

    Args:
      data: the bytes of a JPEG or PNG file (or of any other format that OpenCV reads).
      source: where the bytes come from, for the message.
      size_needed: side to which the caller will shrink the image. A JPEG of four times that side or more is decoded at
        half size, which takes 0.4 of the time; the resized result moves by a few grey levels at most.

    Raises:
      InputError: the bytes are empty, cut off, or no image.
    """
    _check_complete(data, source)
    flags = cv2.IMREAD_COLOR
    if size_needed is not None and data.startswith(_JPEG_START) and _shorter_side(data, source) >= 4 * size_needed:
        flags = cv2.IMREAD_REDUCED_COLOR_2
    return cv2.cvtColor(_imdecode(data, source, flags), cv2.COLOR_BGR2RGB)


def _imdecode(data: bytes, source: str, flags: int) -> np.ndarray:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise _not_an_image(source, error.err) from error
    if image is None:
        raise _not_an_image(source)
    return image


def _shorter_side(data: bytes, source: str) -> int:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return min(image.size)
    except (OSError, SyntaxError, ValueError) as error:
        raise _not_an_image(source, error) from error


def decode_mask(data: bytes, source: str) -> np.ndarray:
    """Decodes a mask to uint8 class indices, (H, W).

    Palette files give their indices; files with three equal channels give one of them.

    Args:
      data: the bytes of a PNG file (or of another lossless format that Pillow reads).
      source: where the bytes come from, for the message.

    Raises:
      InputError: the bytes are empty, cut off, no image, a lossy JPEG, a picture in colours, or hold values that are
        no class index.
    """
    _check_complete(data, source)
    if data.startswith(_PNG_START) and data[24:26] == _GREY_8_BIT:
        # What prepared shards hold: here OpenCV takes a third of Pillow's time.
        return labels.check_mask(_imdecode(data, source, cv2.IMREAD_GRAYSCALE), source)
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "JPEG":
                raise InputError(f"{source} is a JPEG, which blurs class indices into one another; save masks as PNG.")
            values = _indices(image)
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _not_an_image(source, error) from error
    if values.ndim == 3:
        # An alpha channel is no label; "LA" has two channels, "RGBA" four.
        channels = values[..., : 1 if values.shape[-1] == 2 else 3]
        if (channels != channels[..., :1]).any():
            raise InputError(
                f"{source} holds colours (mode {image.mode}); a mask is one channel of class indices "
                f"0..{labels.NUM_CLASSES - 1}: map each colour to its class and save it as an 8-bit grey PNG."
            )
        values = channels[..., 0]
    if values.dtype == bool:
        values = values.astype(np.uint8)
    return labels.check_mask(values, source)


def _indices(image: Image.Image) -> np.ndarray:
    values = np.asarray(image)
    if image.mode == "P":
        palette = np.asarray(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
        # PNG optimisers rewrite a grey label map as a palette of the greys that occur, in any order. A palette
        # made of nothing but class indices as greys is such a one: there the grey is the label.
        if (palette == palette[:, :1]).all() and palette.max() < labels.NUM_CLASSES and values.max() < len(palette):
            values = palette[values, 0]
    return values


def decode_part(data: bytes, source: str) -> np.ndarray:
    """Decodes the picture of one facial part, white on black, to bool (H, W): any colour but black is the part.

    Raises:
      InputError: the bytes are empty, cut off, or no image.
    """
    _check_complete(data, source)
    # The official part files repeat their one channel three times; alpha is dropped.
    picture = _imdecode(data, source, cv2.IMREAD_ANYCOLOR)
    return picture.astype(bool) if picture.ndim == 2 else picture.any(axis=-1)


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


def resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """Returns the central square of `mask` (H, W) at (size, size): the label nearest to each pixel's centre."""
    mask = central_square(mask)
    if mask.shape[0] == size:
        return mask
    # INTER_NEAREST takes the pixel at the corner of each cell, which shifts the mask against the image.
    return cv2.resize(mask, (size, size), interpolation=cv2.INTER_NEAREST_EXACT)


def read_bytes(path: str | os.PathLike) -> bytes:
    """Returns the contents of a file.

    Raises:
      InputError: it is missing, a folder, or not readable.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{os.fspath(path)} cannot be read: {error.strerror or error}.") from error


def read_image_file(path: str | os.PathLike) -> np.ndarray:
    """Returns an image file as uint8 RGB, (H, W, 3). Raises InputError as `decode_image` and `read_bytes` do."""
    return decode_image(read_bytes(path), os.fspath(path))


def read_mask_file(path: str | os.PathLike) -> np.ndarray:
    """Returns a mask file as uint8 class indices, (H, W). Raises InputError as `decode_mask` and `read_bytes` do."""
    return decode_mask(read_bytes(path), os.fspath(path))


def image_files(path: str | os.PathLike) -> list[Path]:
    """Returns `path` itself if it is a file, or the JPEG and PNG files of a folder, sorted by name.

    Raises:
      InputError: the path does not exist, or is a folder without images.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.exists():
            raise InputError(f"{path} does not exist; name an image file or a folder of them.")
        return [path]
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    if not files:
        raise InputError(f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)}).")
    return files
