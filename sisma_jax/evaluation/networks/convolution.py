"""The convolution of the feature networks."""

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
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...],
            (self.strides, self.strides),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        return jax.nn.relu(y + self.bias[...][None, None, None])
