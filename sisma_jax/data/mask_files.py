"""The masks that a path names: one file, the files of a folder, or the part files of faces in a folder."""

import dataclasses
import os
import re

import numpy as np

from sisma_jax.data.classes import ClassSet
from sisma_jax.data.image_files import distinct_names, list_images
from sisma_jax.data.masks import paint_parts, read_mask_file
from sisma_jax.files import AnyPath, to_path

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
    files = list_images(path, MASK_SUFFIXES, "mask")
    if not path.is_dir():
        return [MaskFile(path.stem, (path,))]
    return _of_parts(files, classes) or [MaskFile(name, (file,)) for name, file in distinct_names(files).items()]


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
