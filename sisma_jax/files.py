"""Paths on a disk or in a bucket (gs://...), and files that appear all at once.

A `Path` is of the disk, an `epath.Path` of a bucket; what both have in common is all that is used of either. A bucket
is reached through gcsfs, which has to be installed; it has no folders and no appending.
"""

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import fsspec
from etils import epath

from sisma_jax.errors import InputError

AnyPath: TypeAlias = Path | epath.Path

_SCHEME = "gs:"


def to_path(path: str | os.PathLike) -> AnyPath:
    """Returns the path of a file or folder on the disk, where ~ is the home, or in a bucket if it begins with gs://.

    Raises:
      InputError: it is in a bucket, and what reaches buckets is not installed.
    """
    if isinstance(path, epath.Path):
        path = os.fspath(path)
    head, _, rest = str(path).partition("/")
    if head != _SCHEME:
        return Path(path).expanduser()
    if not _reaches_buckets():
        raise InputError(f"{path}: buckets need the package gcsfs; pip install gcsfs.")
    # TensorStore writes past gcsfs, which would go on listing what it has seen before.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return epath.Path(f"{_SCHEME}//{rest.lstrip('/')}")  # pathlib takes gs://bucket for gs:/bucket


def _reaches_buckets() -> bool:
    return any(map(importlib.util.find_spec, ("gcsfs", "tensorflow")))


def is_bucket(path: AnyPath) -> bool:
    """Whether the path is in a bucket."""
    return os.fspath(path).startswith(f"{_SCHEME}//")


@contextlib.contextmanager
def bucket_errors(path: AnyPath) -> Iterator[None]:
    """Turns what the client of a bucket raises, which has exceptions of its own, into OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if not is_bucket(path):
            raise
        raise OSError(f"{path}: {type(error).__name__}: {error}") from error


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Replaces the file at `path`, whose folder exists.

    A reader, or a process killed meanwhile, finds the old content or the new, never a part.

    Raises:
      OSError: the file cannot be written; what was there before is untouched.
    """
    path = to_path(path)
    data = content.encode() if isinstance(content, str) else content
    if is_bucket(path):
        with bucket_errors(path):
            path.write_bytes(data)  # an object appears when its last byte is there
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:  # a full disk is reported without the name of the file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def on_disk(path: AnyPath) -> Iterator[Path]:
    """Gives the file's path, or that of its copy on the disk if it is in a bucket: for readers that map files.

    Raises:
      OSError: the file cannot be copied.
    """
    if not is_bucket(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        with bucket_errors(path), path.open("rb") as source, copy.open("wb") as target:
            while chunk := source.read(1 << 24):
                target.write(chunk)
        yield copy
