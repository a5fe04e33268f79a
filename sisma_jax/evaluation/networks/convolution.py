"""The convolution of the feature networks."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Padding = str | tuple[tuple[int, int], tuple[int, int]]


class Convolution(nnx.Module):
    """Convolution with a bias, followed by ReLU. The parameters are zeros until weights are loaded.

    Unlike `nnx.Conv` it needs no random numbers, so that a network of a hundred layers is built in no time. The sums
    are computed in float32 on every platform: the default of TPUs and GPUs, bfloat16 or TF32, changes the distances.

    Args:
      inputs: channels of the input.
      outputs: channels of the result.
      size: height and width of the kernel.
      strides: step along both axes.
      padding: "SAME", "VALID", or pixels before and after along each axis.
    """

    def __init__(self, inputs: int, outputs: int, size: tuple[int, int], strides: int = 1, padding: Padding = "SAME"):
        self.kernel = nnx.Param(jnp.zeros((*size, inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32))
        self.strides = strides
        self.padding = padding

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C2"]:
        """Returns ReLU(conv(x) + bias).

        Args:
          x: float32.
        """
        kernel = self.kernel[...]
        if kernel.shape[:2] == (1, 1) and self.strides == 1:
            y = jnp.matmul(x, kernel[0, 0], precision=jax.lax.Precision.HIGHEST)  # faster on CPUs
        elif self.padding == "VALID":
            y = jax.lax.platform_dependent(
                x,
                kernel,
                cpu=functools.partial(_unpadded_on_cpu, strides=self.strides),
                default=functools.partial(_convolve, strides=self.strides, padding="VALID"),
            )
        else:
            y = _convolve(x, kernel, self.strides, self.padding)
        return jax.nn.relu(y + self.bias[...][None, None, None])


def _convolve(
    x: Float[Array, "B H W C"], kernel: Float[Array, "KH KW C C2"], strides: int, padding: Padding
) -> Float[Array, "B H2 W2 C2"]:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (strides, strides),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )


def _unpadded_on_cpu(
    x: Float[Array, "B H W C"], kernel: Float[Array, "KH KW C C2"], strides: int
) -> Float[Array, "B H2 W2 C2"]:
    """Returns the convolution with padding "VALID".

    XLA's CPU backend calls Eigen, whose code for images without any padding is up to seven times slower than its code
    for padded images. So a row of zeros is added, and the row of the result that it may add is removed.
    """
    rows = (x.shape[1] - kernel.shape[0]) // strides + 1
    return _convolve(x, kernel, strides, ((0, 1), (0, 0)))[:, :rows]
