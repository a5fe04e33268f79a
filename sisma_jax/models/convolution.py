"""The depthwise convolution by which mixers and the mask encoder let a token see its neighbours."""

import jax
import jax.numpy as jnp
from flax import nnx

from sisma_jax.kernels import depthwise_conv2d
from sisma_jax.models.patches import Grid


class DepthwiseConv(nnx.Module):
    """3x3 (or `kernel_size`) depthwise convolution with a bias, followed by SiLU."""

    def __init__(self, channels: int, kernel_size: int, *, rngs: nnx.Rngs):
        bound = 1 / kernel_size  # PyTorch's default for a fan-in of kernel_size ** 2, which Mamba keeps
        shape = (kernel_size, kernel_size, channels)
        self.kernel = nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, minval=-bound, maxval=bound))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))

    def __call__(self, x: Grid) -> Grid:
        y = depthwise_conv2d(x, self.kernel[...].astype(x.dtype))
        return jax.nn.silu(y + self.bias[...].astype(x.dtype)[None, None, None])
