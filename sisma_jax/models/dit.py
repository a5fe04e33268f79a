"""A diffusion transformer (DiT, arXiv 2212.09748): what SISMA's blocks stand in for. Quadratic in the tokens."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sisma_jax.config import ModelConfig
from sisma_jax.models.mamba import Grid, Paths
from sisma_jax.models.sisma import Sisma

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
      d_model: channels of a token, a multiple of `d_head`.
      d_head: channels of a head.
    """

    def __init__(self, d_model: int, d_head: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.d_head = d_head
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

    def __call__(self, x: Grid, paths: Paths) -> Grid:
        return self.attend(x, x)


class CrossAttention(Attention):
    """Lets every image token read the mask features of all."""

    def __call__(self, x: Grid, mask_features: Grid, paths: Paths) -> Grid:
        return self.attend(x, mask_features)


class Dit(Sisma):
    """The denoiser with self-attention for Self-Mamba and cross-attention for Cross-Mamba; all else is SISMA's."""

    @staticmethod
    def make_mixer(config: ModelConfig, **options: Any) -> nnx.Module:
        return SelfAttention(config.d_model, config.d_head, **options)

    @staticmethod
    def make_cross_reader(config: ModelConfig, **options: Any) -> nnx.Module:
        return CrossAttention(config.d_model, config.d_head, **options)


def matched_dit(config: ModelConfig, mask_conditioning: str | None = None) -> ModelConfig:
    """Returns the DiT of the same width whose depth brings it nearest to the parameters of `config`'s SISMA.

    Args:
      mask_conditioning: the DiT's, if not that of `config`: "concat" leaves it with self-attention alone.
    """
    baseline = dataclasses.replace(
        config, backbone="dit", mask_conditioning=mask_conditioning or config.mask_conditioning
    )

    def block_size(cls: type[Sisma], config: ModelConfig) -> int:
        block = nnx.eval_shape(lambda: cls.make_block(config, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)))
        return sum(x.size for x in jax.tree.leaves(nnx.state(block, nnx.Param)))

    depth = max(round(config.depth * block_size(Sisma, config) / block_size(Dit, baseline)), 1)
    return dataclasses.replace(baseline, depth=depth)
