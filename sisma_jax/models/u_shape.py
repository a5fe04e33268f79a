"""What makes a U of a stack of blocks (U-Shape Mamba, arXiv 2504.13499): resolutions, and connections across them."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sisma_jax.models.layers import Block, stacked
from sisma_jax.models.mamba import Grid, Paths
from sisma_jax.models.mask_encoder import Stage
from sisma_jax.models.patches import depth_to_space, space_to_depth


class SkipBlock(nnx.Module):
    """A block that first takes in what an encoder block of its resolution put out: Linear([x, skip])."""

    def __init__(self, block: Block, d_model: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.merge = nnx.Linear(2 * d_model, d_model, dtype=dtype, rngs=rngs)
        self.block = block

    def __call__(self, x: Grid, skip: Grid, condition: Float[Array, "B D"], mask_features: Grid, paths: Paths) -> Grid:
        return self.block(self.merge(jnp.concatenate([x, skip], axis=-1)), condition, mask_features, paths)


class Level(nnx.Module):
    """One resolution of the U: blocks on the way down and as many on the way up, and the way to half of it.

    Args:
      make_block: one layer, of fresh parameters.
      depth: blocks on each side.
      d_model: channels of a token, the same at all resolutions.
      blocks_read_mask: whether the next resolution needs mask features.
    """

    def __init__(
        self,
        make_block: Callable[[nnx.Rngs], Block],
        depth: int,
        d_model: int,
        *,
        blocks_read_mask: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "rngs": rngs}
        self.depth = depth
        self.encoder_blocks = stacked(make_block, depth, rngs)
        self.down = nnx.Linear(4 * d_model, d_model, **options)
        self.merge_mask = Stage(d_model, d_model, **options) if blocks_read_mask else None
        self.up = nnx.Linear(d_model, 4 * d_model, **options)
        self.decoder_blocks = stacked(
            lambda rngs: SkipBlock(make_block(rngs), d_model, dtype=dtype, rngs=rngs), depth, rngs
        )

    def to_coarser(self, x: Grid) -> Float[Array, "B H/2 W/2 D"]:
        """A strided 2x2 convolution."""
        return self.down(space_to_depth(x, 2))

    def to_finer(self, x: Grid) -> Float[Array, "B 2*H 2*W D"]:
        """A transposed 2x2 convolution of stride 2."""
        return depth_to_space(self.up(x), 2)

    def coarser_mask(self, mask_features: Grid) -> Float[Array, "B h w D"]:
        """Returns the mask features of the next resolution."""
        if self.merge_mask is None:
            return mask_features[:, ::2, ::2]  # of the right shape; nothing reads them
        return self.merge_mask(mask_features)
