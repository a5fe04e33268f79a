"""The depthwise convolution of the mixers and of the mask encoder, which mixes a token with its neighbours."""

import jax
import jax.numpy as jnp
from flax import nnx

from sisma_jax.kernels import depthwise_conv2d
from sisma_jax.models.patches import Grid


class DepthwiseConv(nnx.Module):
    """Square depthwise convolution with a bias, followed by SiLU.

    Args:
      channels: number of channels.
      kernel_size: side of the kernel; odd.
      rngs: randomness of the initial kernel.
    """

    def __init__(self, channels: int, kernel_size: int, *, rngs: nnx.Rngs):
        bound = 1 / kernel_size  # PyTorch's default for a fan-in of kernel_size ** 2, which Mamba uses
        shape = (kernel_size, kernel_size, channels)
        self.kernel = nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, minval=-bound, maxval=bound))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))

    def __call__(self, x: Grid) -> Grid:
        """Returns SiLU(conv(x) + bias), with the shape and dtype of x."""
        y = depthwise_conv2d(x, self.kernel[...].astype(x.dtype))
        return jax.nn.silu(y + self.bias[...].astype(x.dtype)[None, None, None])
