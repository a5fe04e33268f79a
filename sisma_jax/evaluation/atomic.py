"""Result files that appear all at once: a reader, or a process killed meanwhile, leaves the old file or the new."""

import os
from pathlib import Path


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Replaces the file at `path`, whose folder exists."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
