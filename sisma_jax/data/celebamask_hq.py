"""Converts the raw files of CelebAMask-HQ (Lee et al., arXiv 1907.11922) to records of array_record shards.

The raw files have one of two layouts. The first is that of the official download:

    CelebA-HQ-img/<id>.jpg
    CelebAMask-HQ-mask-anno/<id // 2000>/<id>_<part>.png      white where the part is; no file if there is no such part

The second holds label maps, which are merged parts or the masks of another data set:

    images/<id>.jpg (or .png)
    labels/<id>.png                                           one channel of class indices

A record holds the image, the label map as a PNG, and the id. The image is the unchanged content of its JPEG or PNG
file, unless `config.stored_size` requires a smaller one.
"""

import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from sisma_jax.config import DataConfig
from sisma_jax.data import masks, photos, shards
from sisma_jax.data.classes import CELEBAMASK_HQ, ClassSet
from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, bucket_errors

NAME = "celebamask_hq"
MAPPING_FILE = "CelebA-HQ-to-CelebA-mapping.txt"

# CelebA partitions its images by index (list_eval_partition.txt): train, then val, then test.
CELEBA_FIRST_VAL = 162771
CELEBA_FIRST_TEST = 182638

# About 60 MB of full-size faces. An interruption loses at most one shard per writing process.
FACES_PER_SHARD = 512

_OBTAIN = (
    "The folder must hold CelebA-HQ-img/<id>.jpg and CelebAMask-HQ-mask-anno/<id // 2000>/<id>_<part>.png (the "
    "unpacked official download), or images/<id>.jpg and labels/<id>.png. The data set is available, for "
    "non-commercial research only, from the Google Drive link at https://github.com/switchablenorms/CelebAMask-HQ."
)
_SKIP = "data.skip_damaged leaves out such faces."


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
          InputError: a file is missing or damaged, the mask holds a value that is not a label, or image and mask differ
            in aspect ratio.
        """
        if self.missing:
            raise InputError(self.missing)
        image_bytes = photos.read_bytes(self.image)
        image = photos.decode_image(image_bytes, self.image)
        if isinstance(self.mask, str):
            mask, source = masks.read_mask_file(self.mask, classes), self.mask
        else:
            mask, source = masks.paint_parts(self.mask, classes), f"the mask of {self.mask[0]} and the other parts"
        (height, width), (mask_height, mask_width) = image.shape[:2], mask.shape
        # The ratios are equal up to rounding by one pixel of the mask.
        if abs(height * mask_width - width * mask_height) >= max(height, width):
            raise InputError(
                f"{self.image} is {width}x{height} pixels and {source} is {mask_width}x{mask_height}: the image and "
                "the mask of a face must have the same aspect ratio."
            )
        if stored_size and min(height, width) > stored_size:
            image_bytes = photos.encode_jpeg(photos.resize_image(image, stored_size))
        if stored_size and min(mask_height, mask_width) > stored_size:
            mask = masks.resize_mask(mask, stored_size)
        return {"image": image_bytes, "mask": photos.encode_png(mask), "id": self.id}


class _File(NamedTuple):
    path: str
    stem: str
    size: int
    mtime_ns: int


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


def _count(items: Sequence[object]) -> str:
    """Returns the number of items and the first five: '3 (a, b, c)'."""
    return f"{len(items)} ({', '.join(map(str, items[:5]))}{', ...' if len(items) > 5 else ''})"


def _by_id(files: Iterable[_File]) -> dict[int, _File]:
    found: dict[int, _File] = {}
    for file in files:
        if not re.fullmatch("[0-9]+", file.stem):
            raise InputError(
                f"{file.path} is not named by its id; expected a name such as 00012{Path(file.path).suffix}."
            )
        other = found.setdefault(int(file.stem), file)
        if other is not file:
            raise InputError(f"{other.path} and {file.path} have the same id; keep one of them.")
    return found


def _parts_by_id(folder: Path, classes: ClassSet) -> dict[int, dict[str, _File]]:
    found: dict[int, dict[str, _File]] = {}
    for subfolder in _list_folders(folder):
        for file in _list_files(subfolder, (".png",)):
            match = re.fullmatch("([0-9]+)_(.+)", file.stem)
            if match is None or classes.index.get(match[2], 0) == 0:
                raise InputError(
                    f"{file.path} is not named <id>_<part>.png, where <part> is one of {', '.join(classes.names[1:])}."
                )
            other = found.setdefault(int(match[1]), {}).setdefault(match[2], file)
            if other is not file:
                raise InputError(f"{other.path} and {file.path} are the same part of the same face; keep one of them.")
    return found


@dataclasses.dataclass(frozen=True)
class RawFolder:
    """The contents of a raw folder, listed without opening a file.

    Attributes:
      faces: faces in order of id.
      files: all image and mask files, with their sizes and modification times.
    """

    faces: tuple[Face, ...]
    files: tuple[_File, ...]

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
            digest.update(f"{path[len(str(root)) :]}\0{size}\0{mtime_ns}\n".encode())
        return digest.hexdigest()[:10]


def list_raw_folder(root: Path, classes: ClassSet, *, skip_damaged: bool = False) -> RawFolder:
    """Returns the faces of a raw folder, each with its image and its mask, without opening a file.

    Args:
      root: the raw folder.
      classes: class set whose names are the names of the parts, in the order in which they are drawn.
      skip_damaged: whether `Face.read` reports an image without a mask, a mask without an image, and an empty file. If
        False, this function raises an error for them.

    Raises:
      InputError: the folder does not exist, cannot be read, holds no faces, or has neither layout; a file name does not
        have the expected form; two files are of the same image or part; or, unless `skip_damaged`, an image or a mask
        is missing or a file is empty.
    """
    if not root.is_dir():
        raise InputError(f"data.root: there is no folder {root}. {_OBTAIN}")
    official = root / "CelebA-HQ-img", root / "CelebAMask-HQ-mask-anno"
    merged = root / "images", root / "labels"
    layout = official if any(folder.is_dir() for folder in official) else merged
    missing = [folder.name for folder in layout if not folder.is_dir()]
    if missing:
        nested = root / "CelebAMask-HQ"
        hint = f" Did you mean {nested}?" if nested.is_dir() else ""
        raise InputError(f"data.root: {root} has no {' and no '.join(missing)} folder.{hint} {_OBTAIN}")

    image_folder, mask_folder = layout
    image_files = _by_id(_list_files(image_folder, photos.IMAGE_SUFFIXES))
    if layout is official:
        parts = {
            id: [files[name] for name in classes.names if name in files]
            for id, files in _parts_by_id(mask_folder, classes).items()
        }
        mask_files = [file for files in parts.values() for file in files]
        mask_paths = {id: tuple(file.path for file in files) for id, files in parts.items()}
    else:
        label_maps = _by_id(_list_files(mask_folder, (".png",)))
        mask_files = list(label_maps.values())
        mask_paths = {id: file.path for id, file in label_maps.items()}

    if not image_files and not mask_paths:
        raise InputError(f"data.root: {image_folder} and {mask_folder} hold no faces. {_OBTAIN}")
    without_mask, without_image = image_files.keys() - mask_paths.keys(), mask_paths.keys() - image_files.keys()
    files = (*image_files.values(), *mask_files)
    if not skip_damaged:
        if without_mask:
            raise InputError(
                f"{mask_folder} has no mask for these ids of {image_folder}: {_count(sorted(without_mask))}. {_SKIP}"
            )
        if without_image:
            raise InputError(
                f"{image_folder} has no image for these ids of {mask_folder}: {_count(sorted(without_image))}. {_SKIP}"
            )
        if empty := sorted(file.path for file in files if file.size == 0):
            raise InputError(f"Empty files (0 bytes): {_count(empty)}; copy or download them again. {_SKIP}")
    reasons = {id: f"{mask_folder} has no mask for id {id}." for id in without_mask}
    reasons |= {id: f"{image_folder} has no image for id {id}." for id in without_image}
    faces = [Face(id, image_files[id].path, mask_paths[id]) for id in image_files.keys() & mask_paths.keys()]
    faces += [Face(id, "", "", reason) for id, reason in reasons.items()]
    return RawFolder(tuple(sorted(faces, key=lambda face: face.id)), files)


def split_by_id(faces: Sequence[Face], num_test: int) -> dict[str, Sequence[Face]]:
    """Returns the splits that papers on mask-to-image synthesis use: the last ids are the test split.

    Args:
      faces: all faces, in order of id.
      num_test: number of test faces, at least 1; 2000 for the full data set (ids 28000-29999).

    Returns:
      {"train": faces, "test": faces}.

    Raises:
      InputError: no face would be left for training.
    """
    if num_test >= len(faces):
        raise InputError(
            f"data.num_test {num_test} leaves no face for training: data.root holds {len(faces)}; choose a smaller "
            "number."
        )
    return {"train": faces[:-num_test], "test": faces[-num_test:]}


def split_by_celeba(faces: Sequence[Face], mapping_file: Path) -> dict[str, Sequence[Face]]:
    """Returns the splits that papers on face parsing use: the partition of CelebA.

    Args:
      faces: all faces, in order of id.
      mapping_file: file that maps each id to an index of CelebA, as `read_mapping` reads it.

    Returns:
      {"train": faces, "val": faces, "test": faces}, without "val" if it has no faces.

    Raises:
      InputError: the mapping file is missing, malformed or incomplete, or the train or test split would be empty.
    """
    original = read_mapping(mapping_file)
    if unknown := [face.id for face in faces if face.id not in original]:
        raise InputError(f"{mapping_file} has no row for these ids: {_count(unknown)}. Use the file of the download.")
    splits: dict[str, list[Face]] = {"train": [], "val": [], "test": []}
    for face in faces:
        index = original[face.id]
        name = "train" if index < CELEBA_FIRST_VAL else "val" if index < CELEBA_FIRST_TEST else "test"
        splits[name].append(face)
    for name in ("train", "test"):
        if not splits[name]:
            raise InputError(
                f"data.split celeba: according to {mapping_file}, none of the {len(faces)} faces is in the {name} "
                "split; use data.split by_id for a subset of the data set."
            )
    return {name: members for name, members in splits.items() if members}


def read_mapping(file: Path) -> dict[int, int]:
    """Returns {id: index in CelebA} from a file with rows `idx orig_idx orig_file`, with or without a header row.

    Raises:
      InputError: the file does not exist or cannot be read, or a row does not have this form.
    """
    if not file.is_file():
        raise InputError(
            f"data.split celeba needs {file}, which is part of the download; data.split by_id does not need it."
        )
    mapping = {}
    for number, line in enumerate(photos.read_bytes(file).decode(errors="replace").splitlines(), 1):
        fields = line.split()
        if not fields or (number == 1 and fields[0] == "idx"):
            continue
        if len(fields) != 3 or not (fields[0].isdecimal() and fields[1].isdecimal()):
            raise InputError(f"{file}, line {number}: expected `idx orig_idx orig_file`, got {line!r}.")
        mapping[int(fields[0])] = int(fields[1])
    return mapping


def read_faces(
    faces: Sequence[Face], classes: ClassSet, stored_size: int
) -> Iterator[dict[str, bytes | int] | InputError]:
    """Yields the record of each face, as `Face.read` returns it, or its InputError if the face cannot be read.

    Args:
      faces: faces of one shard.
      classes: class set of the labels or parts.
      stored_size: maximum side of images and masks in pixels; 0 keeps the original size.
    """
    for face in faces:
        try:
            yield face.read(classes, stored_size)
        except InputError as error:
            yield error


def find_copy(config: DataConfig, cache_dir: AnyPath) -> AnyPath | None:
    """Returns the folder of copied shards on a host without the raw folder, which cannot compute the fingerprint.

    Returns:
      The folder of the complete shards; None if the raw folder exists, or if there is no copy.

    Raises:
      InputError: `cache_dir` holds shards of several raw folders.
      OSError: `cache_dir` cannot be listed.
    """
    if Path(config.root).expanduser().exists():
        return None
    pattern = re.compile(_variant(config, "[0-9a-f]{10}"))
    with bucket_errors(cache_dir):
        folder = cache_dir / NAME
        variants = [path for path in folder.iterdir() if pattern.fullmatch(path.name)] if folder.exists() else []
    found = [path / shards.VERSION for path in variants if shards.exist(path / shards.VERSION)]
    if len(found) > 1:
        raise InputError(
            f"{folder} holds shards of several raw folders ({', '.join(sorted(path.parent.name for path in found))}), "
            f"and data.root {config.root} is not present to select one; delete all but one."
        )
    return found[0] if found else None


def _variant(config: DataConfig, fingerprint: str) -> str:
    selection = "celeba" if config.split == "celeba" else f"by_id-{config.num_test}"
    size = f"-{config.stored_size}px" if config.stored_size else ""
    meaning = config.classes.fingerprint
    return f"{selection}-{fingerprint}{size}" + ("" if meaning == CELEBAMASK_HQ.fingerprint else f"-{meaning}")


def recipe(config: DataConfig) -> shards.ShardRecipe:
    """Returns the recipe of the shards of the raw files in `config.root`. Lists the raw folder but opens no image.

    The name of the variant contains the split, a fingerprint of the raw files, the stored size, and a fingerprint of
    the classes if they are not the default. After the raw folder changes, its shards are therefore built again.

    Raises:
      InputError: the raw folder is missing or malformed, or cannot be split; see `list_raw_folder`, `split_by_id` and
        `split_by_celeba`.
    """
    root = Path(config.root).expanduser()
    raw = list_raw_folder(root, config.classes, skip_damaged=config.skip_damaged)
    if config.split == "celeba":
        splits = split_by_celeba(raw.faces, root / MAPPING_FILE)
        fingerprint = raw.fingerprint(root, root / MAPPING_FILE)
    else:
        splits = split_by_id(raw.faces, config.num_test)
        fingerprint = raw.fingerprint(root)
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
        "id": np.int64,
    }
    return shards.ShardRecipe(
        name=NAME,
        variant=_variant(config, fingerprint),
        features=tfds.features.FeaturesDict(features),
        jobs={
            name: [
                functools.partial(
                    read_faces, faces[start : start + FACES_PER_SHARD], config.classes, config.stored_size
                )
                for start in range(0, len(faces), FACES_PER_SHARD)
            ]
            for name, faces in splits.items()
        },
        num_records=sum(map(len, splits.values())),
        information={
            "description": f"Faces with masks of {len(config.classes)} classes.",
            "homepage": "https://github.com/switchablenorms/CelebAMask-HQ",
            "license": "Non-commercial research only; no redistribution.",
        },
    )
