"""Lists the raw files of a data set of faces, in one of two layouts, and reads an image and its mask.

The first layout is that of the official download of CelebAMask-HQ:

    CelebA-HQ-img/<id>.jpg
    CelebAMask-HQ-mask-anno/<id // 2000>/<id>_<part>.png      white where the part is; no file if there is no such part

The second holds label maps, of CelebAMask-HQ or of any other data set:

    images/<name>.jpg (or .jpeg, .png)
    labels/<name>.png                                         one channel of class indices
    classes.json                                              the classes, if they are not those of CelebAMask-HQ

If all names are numbers, these are the ids of the faces: 00012 has the id 12. Otherwise the ids are 0, 1, 2, ... in the
order of the names.
"""

import dataclasses
import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sisma_jax.data import masks, photos
from sisma_jax.data.classes import CELEBAMASK_HQ, ClassSet
from sisma_jax.errors import InputError

CLASSES_FILE = "classes.json"

# A record stores the id as int64.
_MAX_ID = 2**63 - 1

_OBTAIN = (
    "The folder must hold images/<name>.jpg and labels/<name>.png; or, as the unpacked download of CelebAMask-HQ does, "
    "CelebA-HQ-img/<id>.jpg and CelebAMask-HQ-mask-anno/<id // 2000>/<id>_<part>.png. That data set is available, for "
    "non-commercial research only, from the Google Drive link at https://github.com/switchablenorms/CelebAMask-HQ."
)
_SKIP = "data.skip_damaged leaves out such faces."

_Key = tuple[float, str]
"""What image and mask of a face have in common, in the order of faces: (number, "") or (infinity, name)."""


@dataclasses.dataclass(frozen=True)
class Face:
    """The raw files of one example.

    Attributes:
      id: id of the example.
      image: path of the image file.
      mask: path of the label map, or paths of the part files in the order in which they are drawn.
      missing: error message if the image or the mask does not exist; empty if both exist.
    """

    id: int
    image: str
    mask: str | tuple[str, ...]
    missing: str = ""

    def read(self, classes: ClassSet, stored_size: int = 0) -> dict[str, bytes | int]:
        """Returns the record of the example: {"image": JPEG or PNG bytes, "mask": PNG bytes, "id": int}.

        Args:
          classes: class set of the labels or parts.
          stored_size: an image or mask whose shorter side is larger is cropped to its central square and resized to
            this side, in pixels. 0 keeps the original size, and the bytes of the image file.

        Raises:
          InputError: a file is missing, damaged or too large, the mask holds a value that is not a label, or image and
            mask differ in aspect ratio.
        """
        if self.missing:
            raise InputError(self.missing)
        image_bytes = photos.read_bytes(self.image)
        image = photos.decode_image(image_bytes, self.image, stored_size=stored_size)
        if isinstance(self.mask, str):
            mask, source = masks.read_mask_file(self.mask, classes, stored_size=stored_size), self.mask
        else:
            mask, source = masks.paint_parts(self.mask, classes), f"the mask of {self.mask[0]} and the other parts"
        (height, width), (mask_height, mask_width) = image.shape[:2], mask.shape
        # The ratios are equal up to rounding by one pixel of the mask.
        if abs(height * mask_width - width * mask_height) >= max(height, width):
            raise InputError(
                f"{self.image} is {width}x{height} pixels and {source} is {mask_width}x{mask_height}: the image and "
                "the mask of a face must have the same aspect ratio."
            )
        if side := _reduced_side(image, stored_size):
            image_bytes = photos.encode_jpeg(photos.resize_image(image, side))
        if side := _reduced_side(mask, stored_size):
            mask = masks.resize_mask(mask, side)
        return {"image": image_bytes, "mask": photos.encode_png(mask), "id": self.id}


def _reduced_side(array: np.ndarray, stored_size: int) -> int:
    """Returns the side of the square to which an array (H, W, ...) is reduced, or 0 if it is stored as it is."""
    height, width = array.shape[:2]
    # Training does not read a narrow image of too many pixels, even if its shorter side is small enough.
    is_large = min(height, width) > stored_size or height * width > photos.MAX_PIXELS
    return min(stored_size, height, width) if is_large else 0


class _File(NamedTuple):
    path: str
    stem: str
    size: int
    mtime_ns: int

    @property
    def name(self) -> str:
        return os.path.basename(self.path)


def _list_files(folder: Path, suffixes: tuple[str, ...]) -> Iterator[_File]:
    """Yields the files in a folder that have one of the suffixes. Hidden files are left out."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                stem, suffix = os.path.splitext(entry.name)
                if suffix.lower() in suffixes and not stem.startswith("."):
                    stat = entry.stat()
                    yield _File(entry.path, stem, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise InputError(f"{error.filename or folder} cannot be read: {error.strerror}.") from error


def _list_folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}.") from error


def summarize(items: Sequence[object]) -> str:
    """Returns the number of items and the first five: '3 (a, b, c)'."""
    return f"{len(items)} ({', '.join(map(str, items[:5]))}{', ...' if len(items) > 5 else ''})"


def _key(stem: str) -> _Key:
    """Returns the key of a file by its name: a number, with or without leading zeros, or any other name."""
    return (int(stem), "") if re.fullmatch("[0-9]+", stem) else (math.inf, stem)


def _by_key(files: Iterable[_File]) -> dict[_Key, _File]:
    found: dict[_Key, _File] = {}
    for file in files:
        other = found.setdefault(_key(file.stem), file)
        if other is not file:
            raise InputError(f"{other.path} and {file.path} are of the same face; keep one of them.")
    return found


def _require_numbers(files: Iterable[_File]) -> Iterator[_File]:
    for file in files:
        if _key(file.stem)[1]:
            raise InputError(
                f"{file.path} is not named by its id; expected a name such as 00012{Path(file.path).suffix}."
            )
        yield file


def _parts_by_key(folder: Path, classes: ClassSet) -> dict[_Key, dict[str, _File]]:
    found: dict[_Key, dict[str, _File]] = {}
    for subfolder in _list_folders(folder):
        for file in _list_files(subfolder, (".png",)):
            match = re.fullmatch("([0-9]+)_(.+)", file.stem)
            if match is None or classes.index.get(match[2], 0) == 0:
                raise InputError(
                    f"{file.path} is not named <id>_<part>.png, where <part> is one of {', '.join(classes.names[1:])}."
                )
            other = found.setdefault(_key(match[1]), {}).setdefault(match[2], file)
            if other is not file:
                raise InputError(f"{other.path} and {file.path} are the same part of the same face; keep one of them.")
    return found


@dataclasses.dataclass(frozen=True)
class RawFolder:
    """The contents of a raw folder, listed without opening a file.

    Attributes:
      faces: faces in order of id.
      files: all image and mask files, with their sizes and modification times.
      is_numbered: whether the ids are the names of the files. If False, they are positions in the order of the names.
      is_official: whether the folder has the layout of the download of CelebAMask-HQ.
    """

    faces: tuple[Face, ...]
    files: tuple[_File, ...]
    is_numbered: bool
    is_official: bool

    def fingerprint(self, root: Path, *others: Path) -> str:
        """Returns a hash, 10 hexadecimal digits, of the names, sizes and modification times of the raw files.

        Args:
          root: the raw folder; names are relative to it.
          *others: further files that the hash covers.
        """
        stats = [(path, path.stat()) for path in others]
        rows = [(file.path, file.size, file.mtime_ns) for file in self.files]
        rows += [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
        digest = hashlib.sha256()
        for path, size, mtime_ns in sorted(rows):
            digest.update(os.fsencode(f"{path[len(str(root)) :]}\0{size}\0{mtime_ns}\n"))
        return digest.hexdigest()[:10]


def list_raw_folder(root: Path, classes: ClassSet, *, skip_damaged: bool = False) -> RawFolder:
    """Returns the faces of a raw folder, each with its image and its mask, without opening an image or a mask.

    Args:
      root: the raw folder.
      classes: class set of the label maps; or whose names are the names of the parts, in the order in which they are
        drawn.
      skip_damaged: whether `Face.read` reports an image without a mask, a mask without an image, and an empty file. If
        False, this function raises an error for them.

    Raises:
      InputError: the folder does not exist, cannot be read, holds no faces, or has neither layout; its `classes.json`
        describes other classes than the default, and `classes` is the default; a file name does not have the expected
        form; two files are of the same image or part; or, unless `skip_damaged`, an image or a mask is missing or a
        file is empty.
    """
    image_folder, mask_folder = _layout(root)
    _require_classes(root, classes)
    is_official = mask_folder.name != "labels"
    image_files = _list_files(image_folder, photos.IMAGE_SUFFIXES)
    images = _by_key(_require_numbers(image_files) if is_official else image_files)
    if is_official:
        parts = {
            key: [files[name] for name in classes.names if name in files]
            for key, files in _parts_by_key(mask_folder, classes).items()
        }
        mask_files = [file for files in parts.values() for file in files]
        mask_names = {key: files[0].name for key, files in parts.items()}
        mask_paths = {key: tuple(file.path for file in files) for key, files in parts.items()}
    else:
        label_maps = _by_key(_list_files(mask_folder, (".png",)))
        mask_files = list(label_maps.values())
        mask_names = {key: file.name for key, file in label_maps.items()}
        mask_paths = {key: file.path for key, file in label_maps.items()}

    keys = sorted(images.keys() | mask_paths.keys())
    if not keys:
        raise InputError(f"data.root: {image_folder} and {mask_folder} hold no faces. {_OBTAIN}")
    reasons = {key: f"{mask_folder} has no mask for {images[key].name}." for key in images.keys() - mask_paths.keys()}
    reasons |= {key: f"{image_folder} has no image for {mask_names[key]}." for key in mask_paths.keys() - images.keys()}
    files = (*images.values(), *mask_files)
    if not skip_damaged:
        if without_mask := [images[key].name for key in keys if key not in mask_paths]:
            raise InputError(
                f"{mask_folder} has no mask for these files of {image_folder}: {summarize(without_mask)}. {_SKIP}"
            )
        if without_image := [mask_names[key] for key in keys if key not in images]:
            raise InputError(
                f"{image_folder} has no image for these files of {mask_folder}: {summarize(without_image)}. {_SKIP}"
            )
        if empty := sorted(file.path for file in files if file.size == 0):
            raise InputError(f"Empty files (0 bytes): {summarize(empty)}; copy or download them again. {_SKIP}")
    is_numbered = keys[-1][0] <= _MAX_ID
    faces = []
    for position, key in enumerate(keys):
        id = int(key[0]) if is_numbered else position
        missing = reasons.get(key, "")
        faces.append(Face(id, "", "", missing) if missing else Face(id, images[key].path, mask_paths[key]))
    return RawFolder(tuple(faces), files, is_numbered, is_official)


def _layout(root: Path) -> tuple[Path, Path]:
    """Returns the folders of images and of masks."""
    if not root.is_dir():
        raise InputError(f"data.root: there is no folder {root}. {_OBTAIN}")
    official = root / "CelebA-HQ-img", root / "CelebAMask-HQ-mask-anno"
    merged = root / "images", root / "labels"
    layout = official if any(folder.is_dir() for folder in official) else merged
    missing = [folder.name for folder in layout if not folder.is_dir()]
    if missing:
        nested = [root / name for name in ("CelebAMask-HQ", "train") if (root / name).is_dir()]
        hint = f" Did you mean {nested[0]}?" if nested else ""
        raise InputError(f"data.root: {root} has no {' and no '.join(missing)} folder.{hint} {_OBTAIN}")
    return layout


def _require_classes(root: Path, classes: ClassSet) -> None:
    """Raises InputError if the classes are the default, and those that the folder describes are others."""
    file = root / CLASSES_FILE
    if classes != CELEBAMASK_HQ or not file.is_file():
        return
    if dataclasses.replace(ClassSet.load(file), title=classes.title) != classes:
        raise InputError(
            f"{file} describes other classes than data.classes, which is the default, {classes.title}; "
            f"give data.classes={file}."
        )
