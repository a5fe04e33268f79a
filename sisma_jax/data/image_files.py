"""The image files that a path names, and distinct names for what is made of them."""

import logging
from collections.abc import Iterable

from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath

logger = logging.getLogger(__name__)

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")


def list_images(path: AnyPath, suffixes: tuple[str, ...], kind: str) -> list[AnyPath]:
    """Returns the file that a path names, or the files in a folder, sorted by name.

    What is left out of a folder is logged in one line.

    Args:
      path: of a file, or of a folder; its subfolders are left out.
      suffixes: of the files of a folder, in lower case.
      kind: what the files are, for the messages.

    Raises:
      InputError: the path does not exist, or is a folder without such files.
    """
    if not path.is_dir():
        if not path.exists():
            raise InputError(f"{path} does not exist; name a file or a folder of {kind}s.")
        return [path]
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.suffix.lower() in suffixes and not entry.is_dir()]
    if left_out := [entry.name for entry in entries if entry not in files]:
        shown = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
        logger.warning("%s: %d entries are left out, which are no %s files: %s.", path, len(left_out), kind, shown)
    if not files:
        raise InputError(f"{path} holds no {kind} ({', '.join(suffixes)}).")
    return files


def distinct_names(files: Iterable[AnyPath]) -> dict[str, AnyPath]:
    """Returns {name: file}: the file names without suffix; names that some disks would not tell apart get a number."""
    named: dict[str, AnyPath] = {}
    taken: set[str] = set()
    for file in files:
        name, number = file.stem, 1
        while name.casefold() in taken:
            number += 1
            name = f"{file.stem}-{number}"
        taken.add(name.casefold())
        named[name] = file
    return named
