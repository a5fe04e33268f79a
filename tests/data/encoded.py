"""Encodes arrays as image files with Pillow, for comparison with what the product decodes."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def jpeg(image: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def raw_png(samples: np.ndarray, depth: int, color_type: int, **chunks: bytes) -> bytes:
    """A PNG file with these samples, as they are, and further chunks such as `eXIf` and `tRNS`.

    Args:
      samples: (H, W) or (H, W, channels), each below 2**depth.
      depth: bits per sample: 1, 2, 4, 8 or 16.
      color_type: 0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGBA.
      chunks: their contents by name, written before the pixels.
    """

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = samples.reshape(len(samples), -1)
    if depth == 16:
        packed = rows.astype(">u2").view(np.uint8)
    else:
        bits = np.unpackbits(rows.astype(np.uint8)[..., None], axis=-1)[..., -depth:]
        packed = np.packbits(bits.reshape(len(rows), -1), axis=-1)
    lines = b"".join(b"\0" + row.tobytes() for row in packed)
    height, width = samples.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    parts = [(b"IHDR", header), *((name.encode(), data) for name, data in chunks.items())]
    parts += [(b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def png_that_declares(width: int, height: int, color_type: int = 0) -> bytes:
    """A PNG file of a few bytes whose header states any size, as a decompression bomb's does.

    Args:
      width: in pixels.
      height: in pixels.
      color_type: 0 grey, 2 RGB, 3 palette; 8 bits.
    """
    channels = {0: 1, 2: 3, 3: 1}[color_type]
    data = raw_png(
        np.zeros((1, 1, channels), np.uint8), 8, color_type, **({"PLTE": bytes(6)} if color_type == 3 else {})
    )
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def exif(orientation: int) -> bytes:
    """An EXIF block that holds nothing but an orientation."""
    return b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", 274, 3, 1, orientation, 0) + b"\0\0\0\0"
