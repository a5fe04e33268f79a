"""Checksums of the files in a folder, and what they say when it is read again.

A folder's `checksums.json` holds the length of each file below it, and its CRC-32 on a disk. A bucket keeps a checksum
of every object itself, and to read a large state back from there would take as long as to write it.
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
    """Files are not what was saved; the message is the reason in one line."""


def write_checksums(folder: AnyPath) -> None:
    """Writes the checksums of a folder that is complete."""
    files = {
        name: [_length(folder / name), None if is_bucket(folder) else _crc32(folder / name)]
        for name in sorted(_names(folder))
    }
    text = json.dumps(files)
    (folder / CHECKSUMS_NAME).write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "files": files}, indent=1))


def verify_checksums(folder: AnyPath, part: int = 0, parts: int = 1) -> None:
    """Checks that files have the bytes that were saved: of every `parts` files one, from number `part` on.

    Raises:
      DamagedError: one has not, or is missing.
      InputError: one may not be read.
    """
    text = _read(folder / CHECKSUMS_NAME, lambda path: path.read_bytes())
    try:
        table = json.loads(text)
        whole = table["crc32"] == zlib.crc32(json.dumps(table["files"]).encode())
    except (ValueError, TypeError, KeyError):
        whole = False
    if not whole:
        raise DamagedError(f"{folder / CHECKSUMS_NAME} has not the bytes that were saved")
    for name, (length, checksum) in list(table["files"].items())[part::parts]:
        path = folder / name
        if _read(path, _length) != length or (checksum is not None and _read(path, _crc32) != checksum):
            raise DamagedError(f"{path} has not the bytes that were saved")


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
        raise InputError(f"{path} may not be read; fix its permissions.") from error
    except OSError as error:
        if is_bucket(path) and not isinstance(error, FileNotFoundError):  # the network, which comes back
            raise InputError(f"{path} cannot be read ({error}); try again.") from error
        raise DamagedError(f"{path} cannot be read ({error.strerror or error})") from error


def _length(path: AnyPath) -> int:
    status = path.stat()
    return status.length if is_bucket(path) else status.st_size


def _crc32(path: AnyPath) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
