"""Features of sets of images, by which the distances of evaluation compare them.

A `FeatureNetwork` maps images to vectors. An `ImageSet` is anything that yields images in batches: a folder, the test
split of a data set, or an array. `extract` runs the network over a set, and keeps the result in a cache, so that an
interrupted evaluation resumes and the features of a reference are computed once.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import logging
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

from sisma_jax.data.dataset import DataSet
from sisma_jax.data.image_files import PHOTO_SUFFIXES, list_images
from sisma_jax.data.photos import read_bytes, read_image_file, resize_image
from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, to_path, write_atomically
from sisma_jax.models.autoencoder import from_uint8
from sisma_jax.models.face_parser import FaceParser
from sisma_jax.models.factory import Params
from sisma_jax.runs import flat_trees

logger = logging.getLogger(__name__)

# Images per call of a network, and per file of the cache: an interruption loses at most the work of one file.
_BATCH_SIZE = 32
_IMAGES_PER_CHUNK = 512


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """A network that describes an image by a vector.

    Attributes:
      name: what the metrics are named by, such as "parser" for fd_parser.
      features: maps uint8 images (B, H, W, 3), RGB, to float32 features (B, D); any H and W.
      checksum: of the weights.
      resize: how images are brought to the network's resolution.
    """

    name: str
    features: Callable[[np.ndarray], np.ndarray]
    checksum: str
    resize: str

    @property
    def fingerprint(self) -> str:
        """Identifies the values of the features."""
        return f"{self.name}-{self.checksum}-{self.resize}"


def parser_network(parser: FaceParser) -> FeatureNetwork:
    """Returns the network of the distances fd_parser: the coarsest level of a run's own face parser.

    Args:
      parser: with a `FaceUNet` as its network.
    """

    def features(images: np.ndarray) -> np.ndarray:
        small = np.stack([resize_image(image, parser.image_size) for image in images])
        return np.asarray(_parser_features(parser.graph, parser.params, small))

    checksum = flat_trees.crc32(flat_trees.flatten(parser.params))
    return FeatureNetwork("parser", features, checksum, f"area-{parser.image_size}")


@functools.partial(jax.jit, static_argnums=0)
def _parser_features(graph: nnx.GraphDef[Any], params: Params, image: UInt8[Array, "B S S 3"]) -> Float[Array, "B D"]:
    return nnx.merge(graph, params).features(from_uint8(image))


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
        files, hashed = tuple(list_images(path, PHOTO_SUFFIXES, "image")), hashlib.sha256()
        for file in files:
            hashed.update(file.name.encode() + b"\0" + hashlib.sha256(read_bytes(file)).digest())
        return cls(files, path, hashed.hexdigest()[:16])

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
        for batch in self.dataset.eval_batches(self.split, _BATCH_SIZE, start=start, limit=stop - start):
            yield from batch["image"]


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


def extract(network: FeatureNetwork, images: ImageSet, cache: AnyPath | None = None) -> Float[np.ndarray, "N D"]:
    """Returns the features of all images of a set, float32.

    Args:
      network: that maps images to features.
      images: the set; its images may differ in size.
      cache: folder for the features, which is created; None: nothing is kept.

    Raises:
      InputError: an image is damaged.
      OSError: the cache cannot be written.
    """
    chunks = []
    with tqdm(total=len(images), desc=f"{network.name} features", unit="image", disable=None) as progress:
        for start in range(0, len(images), _IMAGES_PER_CHUNK):
            stop = min(start + _IMAGES_PER_CHUNK, len(images))
            file = None if cache is None else cache / _chunk_name(network, images, start, stop)
            chunk = None if file is None else _read_chunk(file, stop - start)
            if chunk is None:
                chunk = _run(network, images.images(start, stop))
                if file is not None:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    buffer = io.BytesIO()
                    np.savez(buffer, features=chunk)
                    write_atomically(file, buffer.getvalue())
            chunks.append(chunk)
            progress.update(stop - start)
    return np.concatenate(chunks)


def _chunk_name(network: FeatureNetwork, images: ImageSet, start: int, stop: int) -> str:
    meaning = repr((network.fingerprint, images.fingerprint, start, stop))
    return f"{network.name}-{hashlib.sha256(meaning.encode()).hexdigest()[:20]}.npz"


def _read_chunk(file: AnyPath, count: int) -> np.ndarray | None:
    """Returns the features in a file of the cache; None if there is no such file, or it is damaged."""
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as content:
            features = content["features"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        logger.warning("%s is damaged (%s); the features are computed again.", file, error)
        return None
    return features if len(features) == count else None


def _run(network: FeatureNetwork, images: Iterator[np.ndarray]) -> np.ndarray:
    """Returns the features of images, which are batched as long as their shapes are equal."""
    features = []
    for _, same in itertools.groupby(images, key=np.shape):
        while batch := list(itertools.islice(same, _BATCH_SIZE)):
            # A batch that is not full is padded, so that one shape is compiled per size of the images.
            filled = np.stack(batch + [batch[-1]] * (_BATCH_SIZE - len(batch)))
            features.append(np.asarray(network.features(filled), np.float32)[: len(batch)])
    return np.concatenate(features)
