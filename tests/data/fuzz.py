"""Mutated image files: what no person would send, but what disks, downloads and other programs make of files.

Run by hand for large numbers: python -m tests.data.fuzz --count 10000
"""

import argparse
import collections
import io
import resource
import struct
import time
import warnings
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from sisma_jax.data.classes import CELEBAMASK_HQ
from sisma_jax.data.drawing import draw_face
from sisma_jax.data.masks import decode_mask, decode_part
from sisma_jax.data.photo_files import decode_photo
from sisma_jax.data.photos import PNG_START, decode_image
from sisma_jax.errors import InputError
from tests.data.encoded import exif, jpeg, raw_png

PHOTO, MASK = draw_face((0, 3), 48)

READERS: dict[str, Callable[[bytes], np.ndarray]] = {
    "mask": lambda data: decode_mask(data, "FILE", CELEBAMASK_HQ),
    "part": lambda data: decode_part(data, "FILE"),
    "photo": lambda data: decode_image(data, "FILE"),
    "photo with all": lambda data: decode_photo(data, "FILE").pixels,
}


def seeds() -> dict[str, bytes]:
    """Returns valid files of every format and mode that is read, and of some that are refused."""

    def encode(image: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
        buffer = io.BytesIO()
        (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
        return buffer.getvalue()

    palette = Image.fromarray(MASK, "P")
    palette.putpalette(np.uint8(CELEBAMASK_HQ.colors).ravel().tolist())
    colors = CELEBAMASK_HQ.colorize(MASK)
    rgba = np.concatenate([PHOTO, np.full((48, 48, 1), 200, np.uint8)], axis=-1)
    sixteen = np.repeat(MASK[..., None].astype(np.uint16), 3, -1)
    files = {
        **{f"grey_{depth}.png": raw_png(MASK % min(2**depth, 19), depth, 0) for depth in (1, 2, 4, 8, 16)},
        "rgb_16.png": raw_png(sixteen, 16, 2),
        "palette.png": encode(palette, "PNG", transparency=3),
        "colors.png": encode(colors, "PNG"),
        "exif.png": raw_png(MASK, 8, 0, eXIf=exif(6)),
        "rgba.png": encode(rgba, "PNG"),
        "photo.jpg": jpeg(PHOTO, quality=90),
        "photo_exif.jpg": jpeg(PHOTO, exif=b"Exif\0\0" + exif(8)),
        "photo_progressive.jpg": jpeg(PHOTO, progressive=True),
        "photo_cmyk.jpg": encode(Image.fromarray(PHOTO).convert("CMYK"), "JPEG"),
        "photo.webp": encode(PHOTO, "WEBP"),
        "photo.bmp": encode(PHOTO, "BMP"),
    }
    for kind in ("GIF", "BMP", "TIFF", "PPM", "TGA"):
        files[f"grey.{kind.lower()}"] = encode(MASK, kind)
    files["lossless.webp"] = encode(np.stack([MASK] * 3, -1), "WEBP", lossless=True)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        files[f"{compression}.tif"] = encode(MASK, "TIFF", compression=compression)
    return files


def mutate(data: bytes, rng: np.random.Generator, others: list[bytes]) -> bytes:
    """Returns a damaged copy of a file: one to four random changes.

    Args:
      data: the file.
      rng: what is changed.
      others: files from which parts may be inserted.
    """
    damaged = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        if not damaged:
            break
        position = int(rng.integers(len(damaged)))
        length = int(min(2 ** rng.integers(0, 9), len(damaged) - position))
        match rng.integers(9):
            case 0:
                damaged[position] ^= 1 << int(rng.integers(8))
            case 1:
                damaged[position : position + length] = rng.bytes(length)
            case 2:
                damaged[position : position + length] = bytes([int(rng.choice([0, 255]))]) * length
            case 3:
                del damaged[position : position + length]
            case 4:
                del damaged[position:]
            case 5:
                damaged[position:position] = damaged[position : position + length]
            case 6:
                other = others[int(rng.integers(len(others)))]
                start = int(rng.integers(len(other)))
                damaged[position : position + length] = other[start : start + length]
            case 7:  # numbers in a header: sizes, offsets, counts
                at = int(rng.integers(min(len(damaged), 64)))
                value = int(rng.choice([0, 1, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, int(rng.integers(2**32))]))
                number = struct.pack(str(rng.choice(["<I", ">I"])), value)
                damaged[at : at + 4] = number[: max(0, len(damaged) - at)]
            case 8:
                _repair_checksums(damaged)
    if rng.random() < 0.5:
        _repair_checksums(damaged)  # so that a damaged PNG reaches the code behind the checksums
    return bytes(damaged)


def _repair_checksums(png: bytearray) -> None:
    if not png.startswith(PNG_START):
        return
    position = len(PNG_START)
    while position + 12 <= len(png):
        (length,) = struct.unpack_from(">I", png, position)
        if position + 12 + length > len(png):
            break
        checksum = zlib.crc32(png[position + 4 : position + 8 + length])
        struct.pack_into(">I", png, position + 8 + length, checksum)
        position += 12 + length


def cases(count: int, seed: int) -> Iterator[tuple[str, int, bytes]]:
    """Yields the name of the original, the number of the case, and the damaged file."""
    files = seeds()
    names, others = list(files), list(files.values())
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        name = names[int(rng.integers(len(names)))]
        yield name, number, mutate(files[name], rng, others)


def check(data: bytes, reader: str) -> str:
    """Reads a file, and returns "read" or "refused".

    Args:
      data: the file.
      reader: key of `READERS`.

    Raises:
      AssertionError: the result has a wrong type, shape or value, or the message is not one of two lines that names the
        file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about damaged metadata
            result = READERS[reader](data)
    except InputError as error:
        message = str(error)
        assert "FILE" in message, message
        assert len(message) < 600, message
        assert message.count("\n") < 2, message
        return "refused"
    assert result.ndim == (3 if reader.startswith("photo") else 2)
    assert result.size > 0
    if reader == "mask":
        assert result.dtype == np.uint8
        assert CELEBAMASK_HQ.is_label(result).all()
    elif reader == "part":
        assert result.dtype == np.bool_
    else:
        assert result.dtype in (np.uint8, np.uint16)
        assert result.shape[2] == 3
    return "read"


def main() -> None:
    """Reads damaged files with every reader, and prints counts, the longest time and the peak memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    slowest, failures = 0.0, []
    for name, number, data in cases(options.count, options.seed):
        for reader in READERS:
            start = time.monotonic()
            try:
                counts[reader, check(data, reader)] += 1
            except Exception as error:
                failures.append((name, number, reader, repr(error)[:300]))
            slowest = max(slowest, time.monotonic() - start)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(dict(counts), f"slowest {slowest:.2f} s, peak memory {memory:.0f} MiB, failures {len(failures)}")
    for failure in failures[:40]:
        print(failure)


if __name__ == "__main__":
    main()
