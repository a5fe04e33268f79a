"""Checksums of the files in a folder: they are written with the files and verified before the files are read.

`checksums.json` holds the length of each file below a folder and, on a disk, its CRC-32. A bucket stores a checksum of
each object itself, and computing CRC-32 there would mean to download a large state that has just been uploaded.
"""

import json
import zlib
from collections.abc import Callable, Iterator
from typing import TypeVar

from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, bucket_errors, is_bucket

CHECKSUMS_NAME = "checksums.json"

Result = TypeVar("Result")


class DamagedError(Exception):
    """A file differs from what was saved, or is missing; the message is the reason in one line."""


def write_checksums(folder: AnyPath) -> None:
    """Writes the checksums of all files below a folder, on a disk or in a bucket.

    Raises:
      OSError: a file cannot be read, or the checksums cannot be written.
    """
    files = {
        name: [_length(folder / name), None if is_bucket(folder) else _crc32(folder / name)]
        for name in sorted(_names(folder))
    }
    text = json.dumps(files)
    (folder / CHECKSUMS_NAME).write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "files": files}, indent=1))


def verify_checksums(folder: AnyPath, part: int = 0, parts: int = 1) -> None:
    """Checks files against the checksums of their folder.

    Several processes can share the work: each calls this with its own `part`.

    Args:
      folder: where `write_checksums` was called.
      part: index of the first file to check.
      parts: check one file in every `parts`.

    Raises:
      DamagedError: a file is missing or differs from what was saved.
      InputError: a file cannot be read, because of its permissions or because the bucket does not respond.
    """
    text = _read(folder / CHECKSUMS_NAME, lambda path: path.read_bytes())
    files = _parse(text)
    if files is None:
        raise DamagedError(f"{folder / CHECKSUMS_NAME} differs from what was saved")
    for name, (length, checksum) in list(files.items())[part::parts]:
        path = folder / name
        if _read(path, _length) != length or (checksum is not None and _read(path, _crc32) != checksum):
            raise DamagedError(f"{path} differs from what was saved")


def _parse(text: bytes) -> dict[str, tuple[int, int | None]] | None:
    """Returns {file: (length, CRC-32 or None)}, or None if the table does not match its own checksum."""
    try:
        table = json.loads(text)
        is_whole = table["crc32"] == zlib.crc32(json.dumps(table["files"]).encode())
    except (ValueError, TypeError, KeyError):
        return None
    return table["files"] if is_whole else None


def _names(folder: AnyPath, prefix: str = "") -> Iterator[str]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _names(path, f"{prefix}{path.name}/")
        elif prefix or path.name != CHECKSUMS_NAME:
            yield prefix + path.name


def _read(path: AnyPath, read: Callable[[AnyPath], Result]) -> Result:
    try:
        with bucket_errors(path):
            return read(path)
    except PermissionError as error:
        raise InputError(f"{path} cannot be read, permission denied; fix its permissions.") from error
    except OSError as error:
        if is_bucket(path) and not isinstance(error, FileNotFoundError):  # probably a temporary network failure
            raise InputError(f"{path} cannot be read ({error}); try again.") from error
        raise DamagedError(f"{path} cannot be read ({error.strerror or error})") from error


def _length(path: AnyPath) -> int:
    return path.stat().length if is_bucket(path) else path.stat().st_size


def _crc32(path: AnyPath) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
