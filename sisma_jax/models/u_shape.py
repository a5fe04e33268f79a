"""What makes a U of layers (U-Shape Mamba, arXiv 2504.13499): resolutions, and connections across them."""

import itertools
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sisma_jax.config import ModelConfig
from sisma_jax.models.condition import CoarserCondition, Condition, unread
from sisma_jax.models.layers import Block, Stack
from sisma_jax.models.patches import Grid, depth_to_space, space_to_depth
from sisma_jax.models.scan_orders import Paths


class SkipBlock(nnx.Module):
    """A block that first takes in the output of an encoder's block at its resolution: Linear([x, skip])."""

    def __init__(self, block: Block, d_model: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.merge = nnx.Linear(2 * d_model, d_model, dtype=dtype, rngs=rngs)
        self.block = block

    def __call__(self, x: Grid, embedding: Float[Array, "B D"], condition: Condition, paths: Paths, skip: Grid) -> Grid:
        return self.block(self.merge(jnp.concatenate([x, skip], axis=-1)), embedding, condition, paths)


class Level(nnx.Module):
    """One resolution of the U: layers on the way down and as many on the way up, and the way to half of it.

    Args:
      config: of the model.
      make_block: one layer, with fresh parameters.
      down, up: numbers of the layers on each side.
    """

    def __init__(
        self,
        config: ModelConfig,
        make_block: Callable[[nnx.Rngs], Block],
        down: range,
        up: range,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        d_model, options = config.d_model, {"dtype": dtype, "rngs": rngs}

        def make_skip_block(rngs: nnx.Rngs) -> SkipBlock:
            return SkipBlock(make_block(rngs), d_model, dtype=dtype, rngs=rngs)

        self.encoder = Stack(config, make_block, down, rngs=rngs)
        self.down = nnx.Linear(4 * d_model, d_model, **options)
        self.coarsen = unread if config.mask_conditioning == "concat" else CoarserCondition(d_model, **options)
        self.up = nnx.Linear(d_model, 4 * d_model, **options)
        self.decoder = Stack(config, make_skip_block, up, rngs=rngs)

    def to_coarser(self, x: Grid) -> Float[Array, "B H/2 W/2 D"]:
        """A strided 2x2 convolution."""
        return self.down(space_to_depth(x, 2))

    def to_finer(self, x: Grid) -> Float[Array, "B 2*H 2*W D"]:
        """A transposed 2x2 convolution of stride 2."""
        return depth_to_space(self.up(x), 2)


class UShape(nnx.Module):
    """Layers as a U: the same signature as `Stack`.

    Args:
      config: of the model; `level_depths` and `depth` say how many layers there are.
      make_block: one layer, with fresh parameters.
    """

    def __init__(
        self, config: ModelConfig, make_block: Callable[[nnx.Rngs], Block], *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        depths = [*config.level_depths, config.depth, *reversed(config.level_depths)]
        ends = list(itertools.accumulate(depths))
        layers = [range(end - depth, end) for depth, end in zip(depths, ends, strict=True)]
        num_levels = len(config.level_depths)
        self.bottom = Stack(config, make_block, layers[num_levels], rngs=rngs)
        self.levels = nnx.List(
            Level(config, make_block, layers[i], layers[-1 - i], dtype=dtype, rngs=rngs) for i in range(num_levels)
        )

    def __call__(self, x: Grid, embedding: Float[Array, "B D"], condition: Condition) -> Grid:
        """Returns the output of the last layer."""
        encoded = []
        for level in self.levels:
            x, outputs = level.encoder.run(x, embedding, condition, keep=True)
            encoded.append((outputs, condition))
            x, condition = level.to_coarser(x), level.coarsen(condition)
        x = self.bottom(x, embedding, condition)
        for level, (outputs, condition) in zip(reversed(self.levels), reversed(encoded), strict=True):
            # The last block of the encoder meets the first of the decoder.
            x, _ = level.decoder.run(level.to_finer(x), embedding, condition, outputs[::-1])
        return x
