"""Lossless image files to samples: what a mask file holds, before anything is read into it.

Decoders convert silently: Pillow cuts 16-bit colours to 8 bits and stretches grey of 2 and 4 bits over 0..255, OpenCV
turns palettes into colours. `decode_raster` undoes or avoids each of these: a sample of the result is the number that
the file stores, in every mode. Lossy compression, which changes the numbers before they are stored, is refused.
"""

import dataclasses
import io
import re

import cv2
import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from sisma_jax.data.photos import PNG_START, decode_by_opencv, not_an_image, require_readable
from sisma_jax.errors import InputError

# By Pillow's names. Lossy formats are refused by name, and so is all that is not listed here.
_LOSSLESS = {"PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA"}
_LOSSY = {
    "JPEG": "a JPEG",
    "MPO": "a JPEG",
    "JPEG2000": "a JPEG 2000 file",
    "AVIF": "an AVIF file",
    "HEIF": "a HEIF file",
}
_ONE_CHANNEL_16_BITS = {"I", "I;16", "I;16B", "I;16L", "I;16N"}
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX"} | _ONE_CHANNEL_16_BITS

# Tag 259 of TIFF: none, CCITT, LZW, deflate (two numbers), PackBits, LZMA, Zstandard.
_TIFF_LOSSLESS = {1, 2, 3, 4, 5, 8, 32773, 32946, 34925, 50000}
_TIFF_COMPRESSION, TIFF_BITS = 259, 258
ORIENTATION = 274

# Where a PNG's header, its first chunk, has the bit depth.
PNG_DEPTH = 24


@dataclasses.dataclass(frozen=True)
class Raster:
    """What an image file stores.

    Attributes:
      samples: (H, W), numbers or indices into `palette`; or (H, W, 3), RGB. uint8, uint16 or int32, upright.
      palette: uint8 (entries, 3), RGB; None if the samples are no indices.
      transparent: bool (H, W), pixels that are fully transparent; None if the file has no transparency.
    """

    samples: np.ndarray
    palette: np.ndarray | None = None
    transparent: np.ndarray | None = None

    def upright(self, orientation: int) -> "Raster":
        """Returns the raster turned as an EXIF orientation, 1 to 8, says."""
        transparent = None if self.transparent is None else upright(self.transparent, orientation)
        return Raster(upright(self.samples, orientation), self.palette, transparent)


def decode_raster(data: bytes, source: str) -> Raster:
    """Decodes a lossless image file, upright according to its EXIF orientation.

    Args:
      data: the bytes of a file in a lossless format: PNG, GIF, BMP, TIFF, WebP, PGM and the like.
      source: where the bytes come from, for the message.

    Raises:
      InputError: the bytes are empty, truncated or no image; or the image is too large, as for `require_readable`, is
        lossy, has several pages or frames, or has a format or colour mode that holds no labels.
    """
    require_readable(data, source)
    try:
        with Image.open(io.BytesIO(data)) as image:
            _require_readable(image, data, source)
            raster = _decode(image, data, source)
            orientation = image.getexif().get(ORIENTATION, 1)
    except InputError:
        raise
    except Exception as error:  # Pillow's readers raise whatever a damaged file makes them
        raise not_an_image(source, error) from error
    return raster.upright(orientation)


def _require_readable(image: Image.Image, data: bytes, source: str) -> None:
    kind = _LOSSY.get(str(image.format))
    if image.format == "WEBP" and _is_lossy_webp(data):
        kind = "a lossy WebP file"
    compression = image.tag_v2.get(_TIFF_COMPRESSION, 1) if isinstance(image, TiffImageFile) else 1
    if compression not in _TIFF_LOSSLESS:
        kind = f"a TIFF file with lossy or unknown compression ({image.info.get('compression', compression)})"
    if kind:
        raise InputError(f"{source} is {kind}: lossy compression changes class indices into others. Save masks as PNG.")
    if image.format not in _LOSSLESS:
        raise InputError(f"{source} is a file of the format {image.format}, which is not read; save masks as PNG.")
    if (frames := getattr(image, "n_frames", 1)) > 1:
        raise InputError(f"{source} has {frames} pages or frames; a mask is one image. Save the one that you mean.")
    if image.mode not in _MODES:
        raise InputError(
            f"{source} has the colour mode {image.mode}; save masks as grey, palette, RGB or RGBA, with 8 or 16 bits."
        )


def _is_lossy_webp(data: bytes) -> bool:
    """Whether a chunk of the RIFF file holds lossy pixels, "VP8 ", instead of lossless ones, "VP8L"."""
    position = 12
    while position + 8 <= len(data):
        name, size = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], "little")
        if name == b"VP8 ":
            return True
        if name == b"ANMF":  # a frame, whose chunks come after a header of 16 bytes
            position += 8 + 16
            continue
        position += 8 + size + size % 2
    return False


def _decode(image: Image.Image, data: bytes, source: str) -> Raster:
    bits = _bits(image, data)
    if bits == 16 and image.mode not in _ONE_CHANNEL_16_BITS:
        return _decode_16_bits(data, source)  # Pillow would keep the upper 8 bits
    return _from_pillow(image, bits)


def _from_pillow(image: Image.Image, bits: int) -> Raster:
    """Returns what an image holds; `bits` per sample were in its file."""
    samples = np.asarray(image)
    transparency = image.info.get("transparency")
    match image.mode:
        case "P" | "PA":
            palette = np.asarray(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
            if image.mode == "PA":
                return Raster(samples[..., 0], palette, _transparent(samples[..., 1]))
            return Raster(samples, palette, _transparent(_palette_alpha(transparency)[samples]))
        case "LA":
            return Raster(samples[..., 0], None, _transparent(samples[..., 1]))
        case "RGBA":
            return Raster(samples[..., :3], None, _transparent(samples[..., 3]))
        case "RGBX":
            return Raster(samples[..., :3])
        case "1":
            samples = samples.astype(np.uint8)
        case "L" if bits < 8:
            samples = samples // (255 // (2**bits - 1))  # Pillow stretches grey of 2 and 4 bits over 0..255
        case _:
            pass
    return Raster(samples, None, _keyed(samples, transparency))


def _bits(image: Image.Image, data: bytes) -> int:
    """Bits per sample as the file stores them, where that may differ from what Pillow returns; else 8."""
    if data.startswith(PNG_START):
        return data[PNG_DEPTH] if image.mode != "P" else 8
    if isinstance(image, TiffImageFile):
        return max(image.tag_v2.get(TIFF_BITS, (1,)))
    if image.format == "PPM" and image.mode == "RGB":
        return 16 if _ppm_maximum(data) > 255 else 8
    return 8


def _ppm_maximum(data: bytes) -> int:
    """Returns the largest value by the header of a PPM file: "P6 width height maximum", with comments."""
    words: list[bytes] = []
    for line in data[:4096].split(b"\n"):
        words += line.split(b"#")[0].split()
        if len(words) >= 4:
            return int(words[3])
    return 255


def _decode_16_bits(data: bytes, source: str) -> Raster:
    samples = decode_by_opencv(data, source, cv2.IMREAD_UNCHANGED)
    if samples.ndim == 2:
        return Raster(samples)
    rgb = np.ascontiguousarray(samples[..., 2::-1])
    return Raster(rgb, None, _transparent(samples[..., 3]) if samples.shape[-1] == 4 else None)


def _palette_alpha(transparency: bytes | int | None) -> np.ndarray:
    alpha = np.full(256, 255, np.uint8)
    if isinstance(transparency, bytes):
        alpha[: len(transparency)] = np.frombuffer(transparency, np.uint8)
    elif transparency is not None:
        alpha[transparency] = 0
    return alpha


def _keyed(samples: np.ndarray, transparency: object) -> np.ndarray | None:
    """Returns where the samples have the one value or colour that the file calls transparent."""
    if transparency is None or isinstance(transparency, bytes):
        return None
    key = np.asarray(transparency)
    return _transparent(np.where(samples == key if samples.ndim == 2 else (samples == key).all(-1), 0, 1))


def _transparent(alpha: np.ndarray) -> np.ndarray | None:
    return None if alpha.all() else alpha == 0


def upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Returns an image as it is to be shown.

    Args:
      array: (H, W, ...).
      orientation: value of EXIF tag 274, 1 to 8; any other value changes nothing.
    """
    turned = {
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: x[::-1].swapaxes(0, 1),
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: x[:, ::-1].swapaxes(0, 1),
    }
    return np.ascontiguousarray(turned[orientation](array)) if orientation in turned else array


def raster_of(image: Image.Image, source: str) -> Raster:
    """Returns what an opened or computed Pillow image holds, as `decode_raster` does for a file's bytes.

    Raises:
      InputError: as `decode_raster` does; or Pillow has opened a file whose samples it would change.
    """
    tiles = image.tile if isinstance(image, ImageFile) else []  # empty once the file is decoded
    raw_mode = str(tiles[0].args) if tiles else ""
    if match := re.search(r"(L;[24]|\b(?:LA|RGB|RGBA);16)", raw_mode):
        raise InputError(
            f"{source}: Pillow changes the numbers of a file of the mode {match[1]}; give the file's path."
        )
    if image.format in _LOSSY or image.mode not in _MODES:
        kind = _LOSSY.get(str(image.format), f"an image of the mode {image.mode}")
        raise InputError(f"{source} is {kind}, which holds no class indices; give a lossless image in grey or colours.")
    if getattr(image, "n_frames", 1) > 1:
        raise InputError(f"{source} has several pages or frames; give the one that you mean.")
    raster = _from_pillow(image, bits=8)
    orientation = image.getexif().get(ORIENTATION, 1)
    return raster.upright(orientation)
