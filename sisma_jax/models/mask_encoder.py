"""Encodes a mask of class indices into S_M, one feature per token, and keeps geometry finer than a token."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Integer

from sisma_jax.kernels.typing import Size
from sisma_jax.models.convolution import DepthwiseConv
from sisma_jax.models.patches import Grid, space_to_depth
from sisma_jax.parallel import sharding


class Stage(nnx.Module):
    """Merges each 2x2 square of positions into one: GELU(LN(Linear(square))).

    Args:
      channels: channels of the input.
      features: channels of the output.
      dtype: type of the matrix products.
      rngs: randomness of the initial parameters.
    """

    def __init__(self, channels: int, features: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.merge = nnx.Linear(4 * channels, features, dtype=dtype, rngs=rngs)
        self.norm = nnx.LayerNorm(features, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: Grid) -> Float[Array, "B h w E"]:
        """Returns the merged positions, h = H / 2 and w = W / 2."""
        return jax.nn.gelu(self.norm(self.merge(space_to_depth(x, 2))).astype(x.dtype))


class MaskEncoder(nnx.Module):
    """Embeds the label of every pixel, then merges 2x2 squares repeatedly until one feature per token remains.

    The mask is not resized. A token's feature is computed from all labels inside the token, so the positions of parts
    thinner than a token (brows, lips, earrings) are preserved. Two residual depthwise convolutions on the token grid
    then add the neighbourhood of each token.

    Args:
      downsampling: side of a token in image pixels; a power of two.
      num_classes: number of classes of a mask.
      d_label: channels of the label embedding. Every merge doubles the channels, up to `d_model`.
      d_model: channels of a mask feature.
      dtype: type of the matrix products.
      rngs: randomness of the initial parameters.

    Raises:
      ValueError: `downsampling` is not a power of two.
    """

    def __init__(
        self, downsampling: int, num_classes: int, d_label: int, d_model: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        if downsampling & (downsampling - 1):
            raise ValueError(f"downsampling {downsampling} is not a power of two; choose another patch size")
        self.downsampling = downsampling
        self.num_classes = num_classes
        self.dtype = dtype
        self.embedding = nnx.Linear(num_classes, d_label, use_bias=False, dtype=dtype, rngs=rngs)
        num_stages = downsampling.bit_length() - 1
        widths = [min(d_label * 2**i, d_model) for i in range(num_stages + 1)]
        self.stages = nnx.List([Stage(a, b, dtype=dtype, rngs=rngs) for a, b in itertools.pairwise(widths)])
        self.proj = nnx.Linear(widths[-1], d_model, dtype=dtype, rngs=rngs)
        self.context = nnx.List([DepthwiseConv(d_model, 3, rngs=rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(d_model, dtype=jnp.float32, rngs=rngs)
        self.null = nnx.Param(0.02 * jax.random.normal(rngs.params(), (d_model,), jnp.float32))

    def __call__(self, mask: Integer[Array, "B H W"]) -> Float[Array, "B h w D"]:
        """Returns one feature per token, h = H / downsampling and w = W / downsampling.

        Args:
          mask: class indices. A pixel with another label, such as the ignored label, has a zero embedding.

        Raises:
          ValueError: H or W is not a multiple of `downsampling`.
        """
        if mask.shape[1] % self.downsampling or mask.shape[2] % self.downsampling:
            raise ValueError(
                f"mask is {mask.shape[1:]}, want multiples of {self.downsampling} pixels; resize it to the model's "
                "resolution"
            )
        # A product of a one-hot vector and a matrix instead of a lookup: the gradient of a gather is a scatter, which
        # is slow on every accelerator.
        x = self.embedding(jax.nn.one_hot(mask, self.num_classes, dtype=self.dtype))
        for stage in self.stages:
            x = stage(x)
        x = self.proj(x)
        for conv in self.context:
            x = x + conv(x)
        return sharding.constrain(self.norm(x).astype(self.dtype))

    def class_shares(self, mask: Integer[Array, "B H W"]) -> Float[Array, "B h w K"]:
        """Returns the share of each token's pixels that have each of the K classes.

        Args:
          mask: class indices. A pixel with another label belongs to no class.
        """
        batch, height, width = mask.shape
        side = self.downsampling
        tokens = mask.reshape(batch, height // side, side, width // side, side)
        shares = jax.nn.one_hot(tokens, self.num_classes, dtype=jnp.float32).mean(axis=(2, 4))
        return sharding.constrain(shares.astype(self.dtype))

    def null_features(self, shape: tuple[Size, ...]) -> Float[Array, "B h w D"]:
        """Returns the learned features that stand for an absent mask.

        Args:
          shape: (batch, rows, columns, d_model) of the result.
        """
        return jnp.broadcast_to(self.null[...].astype(self.dtype)[None, None, None], shape)
