"""Sets of images in a fixed order, which evaluation reads piece by piece: folders, splits of data sets, and arrays."""

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from sisma_jax.data.classes import ClassSet
from sisma_jax.data.dataset import DataSet
from sisma_jax.data.image_files import PHOTO_SUFFIXES, list_images
from sisma_jax.data.mask_files import MaskFile, find_masks
from sisma_jax.data.photos import read_bytes, read_image_file
from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, to_path

# Examples of a data set that are read at once.
_BATCH_SIZE = 32


@runtime_checkable
class ImageSet(Protocol):
    """Images in a fixed order."""

    @property
    def name(self) -> str:
        """What messages call the set."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identifies the images and their order."""
        ...

    def __len__(self) -> int: ...

    def images(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yields the images from `start` to before `stop`, uint8 (H, W, 3), RGB."""
        ...


@dataclasses.dataclass(frozen=True)
class FolderImages:
    """The image files of a folder, in order of their names.

    Attributes:
      files: paths of the images.
      folder: that they are in.
      fingerprint: a hash of the names and the contents of the files.
    """

    files: tuple[AnyPath, ...]
    folder: AnyPath
    fingerprint: str

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "FolderImages":
        """Returns the images of a folder.

        Raises:
          InputError: the folder does not exist or contains no images.
        """
        path = to_path(folder)
        if path.is_file():
            raise InputError(f"{path} is a file; name a folder of images.")
        return _of_files(tuple(list_images(path, PHOTO_SUFFIXES, "image")), path)

    def matching(self, others: "FolderImages") -> "FolderImages":
        """Returns the images of another folder that have the names of these, in the same order.

        Args:
          others: the other folder; its other images are left out.

        Raises:
          InputError: an image has no counterpart.
        """
        found = {file.stem: file for file in others.files}
        missing = [file.stem for file in self.files if file.stem not in found]
        if missing:
            raise InputError(
                f"{others.folder} has no image for {len(missing)} of {len(self)} images of {self.folder}, such as "
                f"{missing[0]}; pairs have the same names."
            )
        return _of_files(tuple(found[file.stem] for file in self.files), others.folder)

    @property
    def name(self) -> str:
        """The folder."""
        return str(self.folder)

    def __len__(self) -> int:
        return len(self.files)

    def images(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yields the images from `start` to before `stop`, uint8 (H, W, 3), RGB.

        Raises:
          InputError: a file is damaged.
        """
        return map(read_image_file, self.files[start:stop])


def _of_files(files: tuple[AnyPath, ...], folder: AnyPath) -> FolderImages:
    hashed = hashlib.sha256()
    for file in files:
        hashed.update(file.name.encode() + b"\0" + hashlib.sha256(read_bytes(file)).digest())
    return FolderImages(files, folder, hashed.hexdigest()[:16])


@dataclasses.dataclass(frozen=True)
class SplitImages:
    """Images of one split of a data set, in order of their ids, at its resolution.

    Attributes:
      dataset: the data set.
      split: name of the split.
      count: number of images.
    """

    dataset: DataSet
    split: str
    count: int

    @property
    def name(self) -> str:
        """The data set and its split."""
        return f"{self.dataset.config.name}, {self.split}"

    @property
    def fingerprint(self) -> str:
        """Names the shards, the split and the resolution."""
        return f"{self.dataset.path.name}-{self.split}-{self.count}-{self.dataset.config.image_size}"

    def __len__(self) -> int:
        return self.count

    def images(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yields the images from `start` to before `stop`, uint8 (S, S, 3), RGB."""
        return self._read("image", start, stop)

    def masks(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yields the masks of the images from `start` to before `stop`, uint8 (S, S)."""
        return self._read("mask", start, stop)

    def _read(self, key: str, start: int, stop: int) -> Iterator[np.ndarray]:
        if start < stop:
            for batch in self.dataset.eval_batches(self.split, _BATCH_SIZE, start=start, limit=stop - start):
                yield from batch[key]


@runtime_checkable
class MaskSet(Protocol):
    """Masks in a fixed order, in one class set."""

    @property
    def fingerprint(self) -> str:
        """Identifies the masks and their order."""
        ...

    def __len__(self) -> int: ...

    def masks(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yields the masks from `start` to before `stop`, uint8 (H, W), class indices or the ignored label."""
        ...


@dataclasses.dataclass(frozen=True)
class FolderMasks:
    """The mask files of a folder that belong to the images of another one.

    Attributes:
      files: one per image.
      classes: of the masks.
      fingerprint: a hash of the contents of the files.
    """

    files: tuple[MaskFile, ...]
    classes: ClassSet
    fingerprint: str

    @classmethod
    def open(cls, folder: str | os.PathLike[str], images: FolderImages, classes: ClassSet) -> "FolderMasks":
        """Returns the masks that have the names of the images.

        Args:
          folder: of the masks; others in it are not used.
          images: whose names are looked for.
          classes: of the masks.

        Raises:
          InputError: the folder contains no masks, or an image has none.
        """
        found = {file.name: file for file in find_masks(folder, classes)}
        names = [file.stem for file in images.files]
        missing = [name for name in names if name not in found]
        if missing:
            raise InputError(f"{folder} has no mask for {len(missing)} of {len(names)} images, such as {missing[0]}.")
        files, hashed = tuple(found[name] for name in names), hashlib.sha256()
        for file in files:
            for path in file.files:
                hashed.update(hashlib.sha256(read_bytes(path)).digest())
        return cls(files, classes, hashed.hexdigest()[:16])

    def __len__(self) -> int:
        return len(self.files)

    def masks(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yields the masks from `start` to before `stop`, uint8 (H, W).

        Raises:
          InputError: a file is damaged, or is not a mask of the classes.
        """
        return (file.read(self.classes) for file in self.files[start:stop])


def cyclic_masks(masks: MaskSet, start: int, count: int) -> Iterator[np.ndarray]:
    """Yields `count` masks from `start` on, and again from the first one after the last.

    Args:
      masks: the masks.
      start: non-negative.
      count: at most the number of masks.
    """
    total = len(masks)
    first = start % total
    last = min(first + count, total)
    return itertools.chain(masks.masks(first, last), masks.masks(0, count - (last - first)))


@dataclasses.dataclass(frozen=True)
class ArrayImages:
    """Images in memory.

    Attributes:
      array: uint8 (N, H, W, 3), RGB.
      name: what messages call the set.
    """

    array: UInt8[np.ndarray, "N H W 3"]
    name: str

    @property
    def fingerprint(self) -> str:
        """A hash of all pixels."""
        return hashlib.sha256(np.ascontiguousarray(self.array).data).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.array)

    def images(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yields the images from `start` to before `stop`, uint8 (H, W, 3), RGB."""
        return iter(self.array[start:stop])
