"""The one form of a network that maps images to features, with what a Fréchet distance must know of it."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """A network that maps each image to one vector of features.

    Attributes:
      name: of the network, such as "inception".
      features: compiled function of uint8 RGB images (B, H, W, 3) that returns float32 features (B, D). It is compiled
        once per shape; `extract` calls it with batches of one size.
      dimensions: of the features, D.
      checksum: of the weights, hexadecimal digits. It does not depend on the file format.
      resize: name of the method that resizes the images; see `resizing`.
    """

    name: str
    features: Callable[[UInt8[Array, "B H W 3"]], Float[Array, "B D"]]
    dimensions: int
    checksum: str
    resize: str

    @property
    def fingerprint(self) -> str:
        """Names everything that decides the features of an image. Features of different fingerprints do not compare."""
        return f"{self.name}, weights {self.checksum}, resize {self.resize}"

    def extract(self, images: np.ndarray, *, batch_size: int = 32) -> np.ndarray:
        """Returns the features of any number of images, float32 (N, D).

        Args:
          images: uint8 (N, H, W, 3), RGB.
          batch_size: images per call of the compiled network. The last batch is padded, so that only one shape is
            compiled.

        Raises:
          ValueError: `images` has another dtype or shape, or `batch_size` is not positive.
        """
        images = checked_images(images, "images")
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}.")
        features = np.empty((len(images), self.dimensions), np.float32)
        for start in range(0, len(images), batch_size):
            chunk = images[start : start + batch_size]
            result = self.features(jnp.asarray(padded(chunk, batch_size)))
            features[start : start + len(chunk)] = np.asarray(result)[: len(chunk)]
        return features


def checked_images(images: np.ndarray, name: str) -> np.ndarray:
    """Returns `images` as an array, after checking that it is uint8 (N, H, W, 3).

    Args:
      images: the array to check.
      name: of the argument, for the error message.

    Raises:
      ValueError: the array has another dtype or shape, or no pixels.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape[1:3]:
        raise ValueError(f"{name} must be uint8 (N, H, W, 3), got {images.dtype} {images.shape}.")
    return images


def padded(images: np.ndarray, batch_size: int) -> np.ndarray:
    """Returns the images followed by zeros, `batch_size` images in all.

    Args:
      images: (N, H, W, 3) with N at most `batch_size`.
      batch_size: number of images to return.
    """
    missing = batch_size - len(images)
    return np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)]) if missing else images
