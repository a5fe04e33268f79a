"""Features of sets of images, by which the distances of evaluation compare them.

A `FeatureNetwork` maps images to vectors. `extract` runs it over a set of images (see `image_sets.py`), and keeps the
result in a cache, so that an interrupted evaluation resumes and the features of a reference are computed once.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from sisma_jax.data.photos import resize_image
from sisma_jax.evaluation import chunk_cache
from sisma_jax.evaluation.image_sets import ImageSet
from sisma_jax.files import AnyPath
from sisma_jax.models.autoencoder import from_uint8
from sisma_jax.models.face_parser import FaceParser
from sisma_jax.models.factory import Params
from sisma_jax.parallel import sharding
from sisma_jax.runs import flat_trees

# Images per call of a network. CPUs are slower with more, whose activations do not fit in the cache.
_BATCH_SIZE, _CPU_BATCH_SIZE = 32, 8


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
        return np.asarray(_parser_features(parser.graph, parser.params, sharding.to_local_devices(small)))

    return FeatureNetwork("parser", features, parser_checksum(parser), f"area-{parser.image_size}")


def parser_checksum(parser: FaceParser) -> str:
    """Returns the CRC-32 of the parameters of a face parser."""
    return flat_trees.crc32(flat_trees.flatten(parser.params))


@functools.partial(jax.jit, static_argnums=0)
def _parser_features(graph: nnx.GraphDef[Any], params: Params, image: UInt8[Array, "B S S 3"]) -> Float[Array, "B D"]:
    return nnx.merge(graph, params).features(from_uint8(image))


def extract(network: FeatureNetwork, images: ImageSet, cache: AnyPath | None = None) -> Float[np.ndarray, "N D"]:
    """Returns the features of all images of a set, float32.

    Args:
      network: that maps images to features.
      images: the set; its images may differ in size.
      cache: folder for the features; see `chunk_cache.compute`.

    Raises:
      InputError: an image is damaged.
    """

    def make(start: int, stop: int) -> dict[str, np.ndarray]:
        return {"features": _run(network, images.images(start, stop))}

    meaning = ("features", network.fingerprint, images.fingerprint)
    return chunk_cache.compute(meaning, len(images), make, cache=cache, title=f"{network.name} features")["features"]


def _run(network: FeatureNetwork, images: Iterator[np.ndarray]) -> np.ndarray:
    """Returns the features of images. The next batch is read while the network computes."""
    batches, features = _batches(images), []
    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        upcoming = reader.submit(next, batches, None)
        while (batch := upcoming.result()) is not None:
            upcoming = reader.submit(next, batches, None)
            filled, count = batch
            features.append(np.asarray(network.features(filled), np.float32)[:count])
    return np.concatenate(features)


def _batches(images: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, int]]:
    """Yields batches of images of equal shapes, and how many of its images each batch has."""
    size = min(_BATCH_SIZE, _CPU_BATCH_SIZE) if jax.default_backend() == "cpu" else _BATCH_SIZE
    for _, same in itertools.groupby(images, key=np.shape):
        while batch := list(itertools.islice(same, size)):
            # A batch that is not full is padded, so that one shape is compiled per size of the images.
            yield np.stack(batch + [batch[-1]] * (size - len(batch))), len(batch)
