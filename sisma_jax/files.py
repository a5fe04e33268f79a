"""Paths on a disk or in a bucket (gs://...), and atomic writes.

A `Path` is on a disk, and an `epath.Path` is in a bucket. `to_path` makes one or the other, and the rest of the program
uses only methods that both have. Access to a bucket needs the package gcsfs. A bucket has no folders, and nothing can
be appended to an object in it.
"""

import contextlib
import importlib.util
import io
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import fsspec.config
import numpy as np
from etils import epath

from sisma_jax.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import TypeIs

AnyPath: TypeAlias = Path | epath.Path

_SCHEME = "gs:"


def to_path(path: str | os.PathLike[str]) -> AnyPath:
    """Returns a `Path` on the disk, or an `epath.Path` in a bucket.

    Args:
      path: file or folder. gs://BUCKET/... is in a bucket; anything else is on the disk, where ~ is the home folder.

    Raises:
      InputError: the path is in a bucket, and gcsfs is not installed.
    """
    if isinstance(path, epath.Path):
        path = os.fspath(path)
    head, _, rest = str(path).partition("/")
    if head != _SCHEME:
        return Path(path).expanduser()
    if not _reaches_buckets():
        raise InputError(f"{path}: buckets need the package gcsfs; pip install gcsfs.")
    # TensorStore writes to the bucket without gcsfs, so a listing that gcsfs has cached may be out of date.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return epath.Path(f"{_SCHEME}//{rest.lstrip('/')}")  # pathlib takes gs://bucket for gs:/bucket


def _reaches_buckets() -> bool:
    return any(map(importlib.util.find_spec, ("gcsfs", "tensorflow")))


def is_bucket(path: AnyPath) -> "TypeIs[epath.Path]":
    """Returns whether the path is in a bucket."""
    return os.fspath(path).startswith(f"{_SCHEME}//")


@contextlib.contextmanager
def bucket_errors(path: AnyPath) -> Iterator[None]:
    """Turns the exceptions that a bucket's client raises in the block into OSError.

    Exceptions of a block that works on the disk pass unchanged.

    Args:
      path: what the block reads or writes; it decides whether the block works on a bucket.

    Raises:
      OSError: the operation failed, on the disk or in the bucket.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if not is_bucket(path):
            raise
        raise OSError(f"{path}: {type(error).__name__}: {error}") from error


def to_npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Returns the bytes of an uncompressed npz file.

    Args:
      arrays: by name.
    """
    buffer, named = io.BytesIO(), cast(dict[str, Any], dict(arrays))  # any name, also one of a parameter of `savez`
    np.savez(buffer, **named)
    return buffer.getvalue()


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file, or replaces it, in one step.

    A reader sees the old content or the new content, never a part of it, even if this process is killed while it
    writes.

    Args:
      path: the file, on the disk or in a bucket; its folder must exist.
      content: what to write; a string is encoded as UTF-8.

    Raises:
      OSError: the file cannot be written; its old content is unchanged.
    """
    path = to_path(path)
    data = content.encode() if isinstance(content, str) else content
    if is_bucket(path):
        with bucket_errors(path):
            path.write_bytes(data)  # an object becomes visible when it is complete
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:  # the error of a full disk does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def on_disk(path: AnyPath) -> Iterator[Path]:
    """Makes a file available on the disk during the block, for readers that memory-map it.

    Args:
      path: file on the disk or in a bucket.

    Yields:
      The path itself, or the path of a temporary copy if the file is in a bucket.

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
