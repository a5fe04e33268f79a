"""The layer parts of a diffusion transformer (DiT, arXiv 2212.09748): softmax attention, quadratic in the tokens.

This is the baseline for SISMA. All other parts of the model are the same.
"""

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
from sisma_jax.models.sublayer import Sublayer

# Channels of an attention head. A narrower model has one head.
HEAD_CHANNELS = 64

# Queries that are computed at once. For all 16,384 queries of a large image, the logits of 12 heads would need 13 GB.
# Small blocks are also faster on a CPU, because their logits stay in its caches.
QUERY_BLOCK = 256

Heads = Float[Array, "B L heads d_head"]


def attention(query: Heads, key: Heads, value: Heads) -> Heads:
    """Returns softmax attention (`jax.nn.dot_product_attention`), computed one block of queries at a time."""
    batch, length, *head = query.shape
    if length <= QUERY_BLOCK:
        return jax.nn.dot_product_attention(query, key, value)
    num_blocks = -(-length // QUERY_BLOCK)
    padded = jnp.pad(query, ((0, 0), (0, num_blocks * QUERY_BLOCK - length), (0, 0), (0, 0)))
    blocks = jnp.moveaxis(padded.reshape(batch, num_blocks, QUERY_BLOCK, *head), 1, 0)
    # The backward pass recomputes each block. Otherwise the logits of all blocks would be kept for it.
    attend = jax.checkpoint(lambda block: jax.nn.dot_product_attention(block, key, value), prevent_cse=False)
    y = jnp.moveaxis(jax.lax.map(attend, blocks), 0, 1)
    return y.reshape(padded.shape)[:, :length]


class Attention(Sublayer):
    """Multi-head softmax attention, with queries from one grid of tokens and keys and values from another.

    Args:
      d_model: channels of a token; a multiple of `HEAD_CHANNELS`, or less than it.
      dtype: type of the matrix products.
      rngs: randomness of the initial parameters.

    Raises:
      InputError: `d_model` is neither a multiple of `HEAD_CHANNELS` nor less than it.
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

    def keys_and_values(self, context: Grid) -> tuple[Heads, Heads]:
        """Returns keys and values of the tokens of `context`."""
        key, value = jnp.split(self.key_value_proj(context), 2, axis=-1)
        return self._heads(key), self._heads(value)

    def attend(self, x: Grid, key: Heads, value: Heads) -> Grid:
        """Returns the attention of every token of `x` to the tokens with `key` and `value`, with the shape of `x`."""
        return self.out_proj(attention(self._heads(self.query_proj(x)), key, value).reshape(x.shape))

    def _heads(self, x: Grid) -> Heads:
        return x.reshape(x.shape[0], x.shape[1] * x.shape[2], -1, self.d_head)


class SelfAttention(Attention):
    """Mixes the image tokens by self-attention."""

    def __call__(self, x: Grid, read: None, paths: Paths) -> Grid:
        """Returns the attention of the tokens `x` to each other; `read` and `paths` are not used."""
        return self.attend(x, *self.keys_and_values(x))


class CrossAttention(Attention):
    """Conditions the image tokens on the mask by cross-attention."""

    def read(self, condition: Condition, paths: Paths) -> tuple[Heads, Heads]:
        """Returns keys and values of the mask features in `condition`; `paths` is not used."""
        return self.keys_and_values(condition.mask)

    def __call__(self, x: Grid, read: tuple[Heads, Heads], paths: Paths) -> Grid:
        """Returns the attention of the tokens `x` to the mask features that were `read`; see `Sublayer`."""
        return self.attend(x, *read)


def _mixer(config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> SelfAttention:
    return SelfAttention(config.d_model, dtype=dtype, rngs=rngs)


def _cross_reader(config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> CrossAttention:
    return CrossAttention(config.d_model, dtype=dtype, rngs=rngs)


PARTS = LayerParts(mixer=_mixer, cross_reader=_cross_reader)
