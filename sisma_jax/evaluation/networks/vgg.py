"""The convolutions of VGG16 (Simonyan and Zisserman, arXiv 1409.1556): features of LPIPS and of FD-VGG16."""

import functools
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from sisma_jax.evaluation.features import FeatureNetwork
from sisma_jax.evaluation.networks import weights as torch_weights
from sisma_jax.evaluation.networks.conv_stacks import (
    ConvStack,
    imagenet_normalize,
    load_params,
    weight_shapes,
    where_to_obtain,
)
from sisma_jax.evaluation.networks.convolution import Convolution
from sisma_jax.evaluation.networks.resizing import bicubic
from sisma_jax.evaluation.networks.weights import Params, Weights
from sisma_jax.parallel import sharding

_CHANNELS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
_FIRST_OF_STAGE = (2, 4, 7, 10)
_LAST_OF_STAGE = (1, 3, 6, 9, 12)
_SIZE = 224


class Vgg16(ConvStack):
    """Thirteen convolutions in five stages, with ReLU after each and max pooling between the stages."""

    torch_layers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    tap_channels = (64, 128, 256, 512, 512)
    obtain = where_to_obtain("VGG16", "vgg16-397923af.pth")

    def __init__(self):
        channels = _CHANNELS[: len(self.torch_layers)]
        pairs = zip((3, *channels[:-1]), channels, strict=True)
        self.convs = nnx.List([Convolution(*pair, (3, 3)) for pair in pairs])

    def __call__(self, x: Float[Array, "B H W 3"]) -> tuple[Float[Array, "B _ _ _"], ...]:
        """Returns the last feature map of each stage after ReLU: relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3.

        Args:
          x: float32, RGB, as `imagenet_normalize` returns it, at least 16x16.
        """
        taps: list[jax.Array] = []
        for number, conv in enumerate(self.convs):
            if number in _FIRST_OF_STAGE:
                x = nnx.max_pool(x, (2, 2), strides=(2, 2))
            x = conv(x)
            if number in _LAST_OF_STAGE:
                taps.append(x)
        return tuple(taps)


class Vgg16ToRelu33(Vgg16):
    """The first three stages of VGG16, which end with relu3_3."""

    torch_layers = Vgg16.torch_layers[:7]
    tap_channels = Vgg16.tap_channels[:3]


@functools.partial(jax.jit, static_argnames="graph")
def _features(graph: nnx.GraphDef[Any], params: Params, images: UInt8[Array, "B H W 3"]) -> Float[Array, "B 256"]:
    pixels = bicubic(images, _SIZE) / 127.5 - 1
    return nnx.merge(graph, params)(imagenet_normalize(pixels))[-1].std(axis=(1, 2))


def vgg16_from_weights(weights: Weights, source: str) -> FeatureNetwork:
    """Returns the network "vgg16" of the Fréchet distance fd_vgg16, 256 dimensions, with the given weights.

    Images are resized to 224x224 as by clean-fid (Pillow's bicubic filter with antialiasing, not rounded) and
    normalised by ImageNet's mean and standard deviation. The features are the standard deviations of the channels of
    relu3_3 over its 56x56 positions. Such statistics describe an image's texture (Huang and Belongie,
    arXiv 1703.06868), in which generated faces differ most from photographs. The usual means of the last feature map
    describe what an image shows. That is a face in every case, and their distance prefers the mean of several samples
    to a sample.

    The distance is not an FID, and there are no published values. It compares models that are evaluated in the same
    way.

    Args:
      weights: arrays by torchvision's names ("features.0.weight"); those of the classifier are ignored.
      source: where the weights come from, for error messages.

    Raises:
      InputError: an array is missing or has a wrong shape.
    """
    graph, params = load_params(Vgg16ToRelu33, weights, source)

    def features(images: np.ndarray) -> np.ndarray:
        return np.asarray(_features(graph, params, sharding.to_local_devices(images)))

    checksum = torch_weights.checksum(weights, weight_shapes(Vgg16ToRelu33))
    return FeatureNetwork("vgg16", features, checksum, f"clean-fid-{_SIZE}")
