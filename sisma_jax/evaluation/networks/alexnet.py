"""The convolutions of AlexNet (Krizhevsky, arXiv 1404.5997), as torchvision has them: features of LPIPS."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from sisma_jax.evaluation.networks.conv_stacks import ConvStack, where_to_obtain
from sisma_jax.evaluation.networks.convolution import Convolution


class AlexNet(ConvStack):
    """Five convolutions, each followed by ReLU."""

    torch_layers = (0, 3, 6, 8, 10)
    tap_channels = (64, 192, 384, 256, 256)
    obtain = where_to_obtain("AlexNet", "alexnet-owt-7be5be79.pth")

    def __init__(self):
        self.convs = nnx.List(
            [
                Convolution(3, 64, (11, 11), strides=4, padding=((2, 2), (2, 2))),
                Convolution(64, 192, (5, 5)),
                Convolution(192, 384, (3, 3)),
                Convolution(384, 256, (3, 3)),
                Convolution(256, 256, (3, 3)),
            ]
        )

    def __call__(self, x: Float[Array, "B H W 3"]) -> tuple[Float[Array, "B _ _ _"], ...]:
        """Returns the five feature maps after ReLU.

        Args:
          x: float32, RGB, as `imagenet_normalize` returns it, at least 31x31.
        """
        taps: list[jax.Array] = []
        for number, conv in enumerate(self.convs):
            if number in (1, 2):
                x = nnx.max_pool(x, (3, 3), strides=(2, 2))
            x = conv(x)
            taps.append(x)
        return tuple(taps)
