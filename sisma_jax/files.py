"""Files that appear all at once."""

import os
from pathlib import Path


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Replaces the file at `path`, whose folder exists.

    A reader, or a process killed meanwhile, finds the old content or the new, never a part.

    Raises:
      OSError: the file cannot be written; what was there before is untouched.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
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
