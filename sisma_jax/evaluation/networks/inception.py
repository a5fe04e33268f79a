"""The Inception-v3 (Szegedy et al., arXiv 1512.00567) of the Fréchet Inception distance (arXiv 1706.08500).

Its 2048 features are the means of the last feature map, which TensorFlow's graph calls pool3. The network differs from
torchvision's Inception in its weights and in three points: average pooling leaves out the padding, the last block pools
by the maximum, and there are 1008 classes, which the features do not need.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sisma_jax.errors import InputError
from sisma_jax.evaluation.features import FeatureNetwork
from sisma_jax.evaluation.networks import weights as torch_weights
from sisma_jax.evaluation.networks.convolution import Convolution
from sisma_jax.evaluation.networks.resizing import Resize, check_resize, resize_for_inception
from sisma_jax.evaluation.networks.weights import Params, Weights
from sisma_jax.parallel import sharding

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"

_OBTAIN = f"Give the weights of FID's Inception-v3, which can be downloaded from {URL}"
_NORM_EPSILON = 1e-3
_NORM = ("weight", "bias", "running_mean", "running_var")
_NUM_CLASSES = 1008


def _conv(inputs: int, outputs: int, height: int, width: int, strides: int = 1, padding: str = "") -> Convolution:
    """Returns a convolution whose batch normalisation is folded in; "VALID" if it is strided, else "SAME"."""
    return Convolution(inputs, outputs, (height, width), strides, padding or ("SAME" if strides == 1 else "VALID"))


# Windows of 3x3 are pooled along one axis after the other: on CPUs, XLA takes several times as long for both at once.


def _average_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Returns the means of windows of 3x3, without the padding at the borders.

    The numbers of pixels per window are constants: XLA takes seconds to fold the program that counts them.
    """
    counts = [1 + np.minimum(np.arange(size), 1) + np.minimum(np.arange(size)[::-1], 1) for size in x.shape[1:3]]
    columns = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 1, 1), (1, 1, 1, 1), "SAME")
    sums = jax.lax.reduce_window(columns, 0.0, jax.lax.add, (1, 1, 3, 1), (1, 1, 1, 1), "SAME")
    return sums / np.multiply.outer(*counts).astype(np.float32)[None, :, :, None]


def _max_pool(x: Float[Array, "B H W C"], strides: int, padding: str) -> Float[Array, "B H2 W2 C"]:
    columns = nnx.max_pool(x, (3, 1), strides=(strides, 1), padding=padding)
    return nnx.max_pool(columns, (1, 3), strides=(1, strides), padding=padding)


def _halving_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
    return _max_pool(x, strides=2, padding="VALID")


class _BlockA(nnx.Module):
    """Branches 1x1, 5x5, two 3x3, and average pooling, at 35x35."""

    def __init__(self, inputs: int, pool_features: int):
        self.branch1x1 = _conv(inputs, 64, 1, 1)
        self.branch5x5_1 = _conv(inputs, 48, 1, 1)
        self.branch5x5_2 = _conv(48, 64, 5, 5)
        self.branch3x3dbl_1 = _conv(inputs, 64, 1, 1)
        self.branch3x3dbl_2 = _conv(64, 96, 3, 3)
        self.branch3x3dbl_3 = _conv(96, 96, 3, 3)
        self.branch_pool = _conv(inputs, pool_features, 1, 1)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C2"]:
        branches = (
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(_average_pool(x)),
        )
        return jnp.concatenate(branches, axis=-1)


class _BlockB(nnx.Module):
    """From 35x35 to 17x17."""

    def __init__(self, inputs: int):
        self.branch3x3 = _conv(inputs, 384, 3, 3, 2)
        self.branch3x3dbl_1 = _conv(inputs, 64, 1, 1)
        self.branch3x3dbl_2 = _conv(64, 96, 3, 3)
        self.branch3x3dbl_3 = _conv(96, 96, 3, 3, 2)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C2"]:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return jnp.concatenate([self.branch3x3(x), double, _halving_pool(x)], axis=-1)


class _BlockC(nnx.Module):
    """Branches 1x1, 7x7, two 7x7 as pairs of 1x7 and 7x1, and average pooling, at 17x17."""

    def __init__(self, inputs: int, width: int):
        self.branch1x1 = _conv(inputs, 192, 1, 1)
        self.branch7x7_1 = _conv(inputs, width, 1, 1)
        self.branch7x7_2 = _conv(width, width, 1, 7)
        self.branch7x7_3 = _conv(width, 192, 7, 1)
        self.branch7x7dbl_1 = _conv(inputs, width, 1, 1)
        self.branch7x7dbl_2 = _conv(width, width, 7, 1)
        self.branch7x7dbl_3 = _conv(width, width, 1, 7)
        self.branch7x7dbl_4 = _conv(width, width, 7, 1)
        self.branch7x7dbl_5 = _conv(width, 192, 1, 7)
        self.branch_pool = _conv(inputs, 192, 1, 1)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C2"]:
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branches = (
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(_average_pool(x)),
        )
        return jnp.concatenate(branches, axis=-1)


class _BlockD(nnx.Module):
    """From 17x17 to 8x8."""

    def __init__(self, inputs: int):
        self.branch3x3_1 = _conv(inputs, 192, 1, 1)
        self.branch3x3_2 = _conv(192, 320, 3, 3, 2)
        self.branch7x7x3_1 = _conv(inputs, 192, 1, 1)
        self.branch7x7x3_2 = _conv(192, 192, 1, 7)
        self.branch7x7x3_3 = _conv(192, 192, 7, 1)
        self.branch7x7x3_4 = _conv(192, 192, 3, 3, 2)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C2"]:
        factored = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        branches = (self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(factored), _halving_pool(x))
        return jnp.concatenate(branches, axis=-1)


class _BlockE(nnx.Module):
    """Branches 1x1, 3x3 and two 3x3, each split into 1x3 beside 3x1, and pooling, at 8x8.

    Args:
      inputs: channels of the input.
      pools_maximum: pool by the maximum instead of the average. The last block of FID's network does, perhaps by
        mistake.
    """

    def __init__(self, inputs: int, pools_maximum: bool):
        self.pools_maximum = pools_maximum
        self.branch1x1 = _conv(inputs, 320, 1, 1)
        self.branch3x3_1 = _conv(inputs, 384, 1, 1)
        self.branch3x3_2a = _conv(384, 384, 1, 3)
        self.branch3x3_2b = _conv(384, 384, 3, 1)
        self.branch3x3dbl_1 = _conv(inputs, 448, 1, 1)
        self.branch3x3dbl_2 = _conv(448, 384, 3, 3)
        self.branch3x3dbl_3a = _conv(384, 384, 1, 3)
        self.branch3x3dbl_3b = _conv(384, 384, 3, 1)
        self.branch_pool = _conv(inputs, 192, 1, 1)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C2"]:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = _max_pool(x, strides=1, padding="SAME") if self.pools_maximum else _average_pool(x)
        branches = (
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        )
        return jnp.concatenate(branches, axis=-1)


class Inception(nnx.Module):
    """The network up to its last feature map. The names are those of torchvision and pytorch-fid."""

    def __init__(self):
        self.Conv2d_1a_3x3 = _conv(3, 32, 3, 3, 2)
        self.Conv2d_2a_3x3 = _conv(32, 32, 3, 3, padding="VALID")
        self.Conv2d_2b_3x3 = _conv(32, 64, 3, 3)
        self.Conv2d_3b_1x1 = _conv(64, 80, 1, 1)
        self.Conv2d_4a_3x3 = _conv(80, 192, 3, 3, padding="VALID")
        self.Mixed_5b = _BlockA(192, 32)
        self.Mixed_5c = _BlockA(256, 64)
        self.Mixed_5d = _BlockA(288, 64)
        self.Mixed_6a = _BlockB(288)
        self.Mixed_6b = _BlockC(768, 128)
        self.Mixed_6c = _BlockC(768, 160)
        self.Mixed_6d = _BlockC(768, 160)
        self.Mixed_6e = _BlockC(768, 192)
        self.Mixed_7a = _BlockD(768)
        self.Mixed_7b = _BlockE(1280, False)
        self.Mixed_7c = _BlockE(2048, True)

    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B 2048"]:
        """Returns the means of the last feature map.

        Args:
          x: float32 in about [-1, 1], RGB, 299x299.
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_halving_pool(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_halving_pool(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(axis=(1, 2))


_resize = jax.jit(resize_for_inception, static_argnames="resize")


@functools.partial(jax.jit, static_argnames="graph")
def _apply(graph: nnx.GraphDef[Any], params: Params, x: Float[Array, "B H W 3"]) -> Float[Array, "B 2048"]:
    return nnx.merge(graph, params)(x)


def inception_from_weights(weights: Weights, source: str, *, resize: Resize = "pytorch-fid") -> FeatureNetwork:
    """Returns the network "inception" of the Fréchet Inception distance, 2048 dimensions, with the given weights.

    pytorch-fid and torch-fidelity publish the same file under two names, so one layout serves both.

    Args:
      weights: the arrays of the file at `URL`, by its names. Those of the classifier are ignored.
      source: where the weights come from, for error messages.
      resize: the package whose resizing and normalisation are reproduced; see `resizing.resize_for_inception`.

    Raises:
      InputError: an array is missing or has a wrong shape, the weights are those of torchvision's Inception, or there
        is no such `resize`.
    """
    check_resize(resize)
    # torchvision's Inception has arrays of the same names and shapes, except for its classifiers.
    has_other_classes = "fc.weight" in weights and weights["fc.weight"].shape[0] != _NUM_CLASSES
    if has_other_classes or any(name.startswith("AuxLogits.") for name in weights):
        raise InputError(f"{source} holds another Inception-v3, such as torchvision's, not FID's. {_OBTAIN}")
    graph, abstract = torch_weights.abstract_params(Inception)
    shapes = _torch_shapes(abstract)
    torch_weights.require(weights, shapes, source, _OBTAIN)
    folded: dict[str, np.ndarray] = {}
    for name in {path.rpartition(".")[0] for path in torch_weights.shapes_by_path(abstract)}:
        folded[f"{name}.kernel"], folded[f"{name}.bias"] = _fold(weights, name)
    params = torch_weights.fill(abstract, folded.__getitem__)

    def features(images: np.ndarray) -> np.ndarray:
        # Two programs: the second, which takes long to compile, serves all sizes of images.
        return np.asarray(_apply(graph, params, _resize(sharding.to_local_devices(images), resize=resize)))

    return FeatureNetwork("inception", features, torch_weights.checksum(weights, shapes), resize)


def _torch_shapes(abstract: Params) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the arrays of a file, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, shape in torch_weights.shapes_by_path(abstract).items():
        name, _, parameter = path.rpartition(".")
        if parameter == "kernel":
            shapes[f"{name}.conv.weight"] = torch_weights.weight_shape(shape)
            shapes |= {f"{name}.bn.{array}": shape[-1:] for array in _NORM}
    return shapes


def _fold(weights: Weights, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns kernel and bias of a convolution followed by batch normalisation, float32, computed in float64."""
    scale, shift, mean, variance = (weights[f"{name}.bn.{array}"].astype(np.float64) for array in _NORM)
    scale = scale / np.sqrt(variance + _NORM_EPSILON)
    kernel = weights[f"{name}.conv.weight"].astype(np.float64) * scale[:, None, None, None]
    return torch_weights.to_kernel(kernel), (shift - mean * scale).astype(np.float32)
