"""The masks that a path names: one file, the files of a folder, or the part files of faces in a folder."""

import dataclasses
import logging
import os
import re

import numpy as np

from sisma_jax.data.classes import ClassSet
from sisma_jax.data.masks import paint_parts, read_mask_file
from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, to_path

logger = logging.getLogger(__name__)

MASK_SUFFIXES = (
    *(".png", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm", ".pbm", ".tga"),
    # Read to be refused by name.
    *(".jpg", ".jpeg", ".jp2", ".avif"),
)


@dataclasses.dataclass(frozen=True)
class MaskFile:
    """A mask on a disk.

    Attributes:
      name: what images of it are named by; no two masks of a folder have names that differ only in case.
      files: its file, or its part files in the order in which they are painted.
      is_in_parts: whether the files are part files.
    """

    name: str
    files: tuple[AnyPath, ...]
    is_in_parts: bool = False

    def read(self, classes: ClassSet) -> np.ndarray:
        """Returns the mask, uint8 class indices (H, W). Raises InputError as `decode_mask` and `paint_parts` do."""
        return paint_parts(self.files, classes) if self.is_in_parts else read_mask_file(self.files[0], classes)

    def __str__(self) -> str:
        return f"{self.files[0]} and its other parts" if self.is_in_parts else str(self.files[0])


def find_masks(path: str | os.PathLike[str], classes: ClassSet) -> list[MaskFile]:
    """Returns the mask that a path names, or the masks in a folder, sorted by name.

    Part files as in CelebAMask-HQ make one mask per face, if the folder holds no other masks. What is left out of a
    folder is logged in one line.

    Args:
      path: of a file, or of a folder; its subfolders are left out.
      classes: that part files are named by.

    Raises:
      InputError: the path does not exist, or is a folder without masks.
    """
    path = to_path(path)
    if not path.is_dir():
        if not path.exists():
            raise InputError(f"{path} does not exist; name a mask or a folder of masks.")
        return [MaskFile(path.stem, (path,))]
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.suffix.lower() in MASK_SUFFIXES and not entry.is_dir()]
    if left_out := [entry.name for entry in entries if entry not in files]:
        shown = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
        logger.warning("%s: %d entries are left out, which are no mask files: %s.", path, len(left_out), shown)
    if not files:
        raise InputError(f"{path} holds no mask ({', '.join(MASK_SUFFIXES)}).")
    return _of_parts(files, classes) or _distinct(files)


def _of_parts(files: list[AnyPath], classes: ClassSet) -> list[MaskFile]:
    """Returns one mask per face of part files; none if a file is named otherwise."""
    parts: dict[str, dict[str, AnyPath]] = {}
    for file in files:
        match = re.fullmatch("([0-9]+)_(.+)", file.stem)
        if match is None or classes.index.get(match[2], 0) == 0:
            return []
        parts.setdefault(match[1], {})[match[2]] = file
    return [
        MaskFile(face, tuple(found[name] for name in classes.names if name in found), is_in_parts=True)
        for face, found in parts.items()
    ]


def _distinct(files: list[AnyPath]) -> list[MaskFile]:
    """Returns a mask per file; names that some disks would not tell apart get a number."""
    masks: list[MaskFile] = []
    taken: set[str] = set()
    for file in files:
        name, number = file.stem, 1
        while name.casefold() in taken:
            number += 1
            name = f"{file.stem}-{number}"
        taken.add(name.casefold())
        masks.append(MaskFile(name, (file,)))
    return masks
