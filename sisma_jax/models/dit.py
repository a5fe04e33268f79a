"""The layer's parts of a diffusion transformer (DiT, arXiv 2212.09748): attention, quadratic in the tokens.

The baseline that SISMA is compared with: all else is the same.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sisma_jax.config import ModelConfig
from sisma_jax.errors import InputError
from sisma_jax.models.condition import Condition
from sisma_jax.models.layers import LayerParts
from sisma_jax.models.patches import Grid
from sisma_jax.models.scan_orders import Paths

# Channels of an attention head, or all channels of a narrower model.
HEAD_CHANNELS = 64

# Queries that attend at a time. All of 16,384 at once would need their logits in memory, 13 GB at 12 heads; and a CPU
# is quicker at a few, whose logits stay in its caches.
QUERY_BLOCK = 256

Heads = Float[Array, "B L heads d_head"]


def attention(query: Heads, key: Heads, value: Heads) -> Heads:
    """Softmax attention (`jax.nn.dot_product_attention`), a block of queries after the other."""
    batch, length, *head = query.shape
    if length <= QUERY_BLOCK:
        return jax.nn.dot_product_attention(query, key, value)
    num_blocks = -(-length // QUERY_BLOCK)
    padded = jnp.pad(query, ((0, 0), (0, num_blocks * QUERY_BLOCK - length), (0, 0), (0, 0)))
    blocks = jnp.moveaxis(padded.reshape(batch, num_blocks, QUERY_BLOCK, *head), 1, 0)
    # Recomputed, since the logits of all blocks would be kept for the gradient.
    attend = jax.checkpoint(lambda block: jax.nn.dot_product_attention(block, key, value), prevent_cse=False)
    y = jnp.moveaxis(jax.lax.map(attend, blocks), 0, 1)
    return y.reshape(padded.shape)[:, :length]


class Attention(nnx.Module):
    """Multi-head softmax attention of the tokens of `x` to those of `context`.

    Args:
      d_model: channels of a token, a multiple of `HEAD_CHANNELS` or fewer than those.

    Raises:
      InputError: heads do not divide the channels.
    """

    def __init__(self, d_model: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.d_head = min(HEAD_CHANNELS, d_model)
        if d_model % self.d_head:
            raise InputError(
                f"model.d_model must be a multiple of {HEAD_CHANNELS}, the channels of an attention head, or less; "
                f"got {d_model}."
            )
        self.query_proj = nnx.Linear(d_model, d_model, dtype=dtype, rngs=rngs)
        self.key_value_proj = nnx.Linear(d_model, 2 * d_model, dtype=dtype, rngs=rngs)
        self.out_proj = nnx.Linear(d_model, d_model, dtype=dtype, rngs=rngs)

    def attend(self, x: Grid, context: Grid) -> Grid:
        key, value = jnp.split(self.key_value_proj(context), 2, axis=-1)
        y = attention(*(self._heads(a) for a in (self.query_proj(x), key, value)))
        return self.out_proj(y.reshape(x.shape))

    def _heads(self, x: Grid) -> Heads:
        return x.reshape(x.shape[0], x.shape[1] * x.shape[2], -1, self.d_head)


class SelfAttention(Attention):
    """Mixes the image tokens; paths mean nothing to it."""

    def __call__(self, x: Grid, condition: Condition, paths: Paths) -> Grid:
        return self.attend(x, x)


class CrossAttention(Attention):
    """Lets every image token read the mask features of all."""

    def __call__(self, x: Grid, condition: Condition, paths: Paths) -> Grid:
        return self.attend(x, condition.mask)


def _mixer(config: ModelConfig, **options: Any) -> SelfAttention:
    return SelfAttention(config.d_model, **options)


def _cross_reader(config: ModelConfig, **options: Any) -> CrossAttention:
    return CrossAttention(config.d_model, **options)


PARTS = LayerParts(mixer=_mixer, cross_reader=_cross_reader)
