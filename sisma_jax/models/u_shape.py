"""Arranges layers as a U (U-Shape Mamba, arXiv 2504.13499): levels of different resolution with skip connections."""

import functools
import itertools
from collections.abc import Callable, Mapping

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from sisma_jax.config import ModelConfig
from sisma_jax.models.condition import CoarserCondition, Condition, unread
from sisma_jax.models.layers import Block, Stack
from sisma_jax.models.patches import Grid, depth_to_space, space_to_depth
from sisma_jax.models.scan_orders import Paths


class SkipBlock(nnx.Module):
    """A block of the decoder, which first merges the output of a block of the encoder: Linear([x, skip]).

    Args:
      block: the block that follows the merge.
      d_model: channels of a token.
      dtype: type of the matrix products.
      rngs: randomness of the initial parameters of the merge.
    """

    def __init__(self, block: Block, d_model: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.merge = nnx.Linear(2 * d_model, d_model, dtype=dtype, rngs=rngs)
        self.block = block

    def read(self, condition: Condition, paths: Paths) -> dict[str, PyTree[Array]]:
        """Returns what the block reads from the `condition` along its `paths`; see `Block.read`."""
        return self.block.read(condition, paths)

    def __call__(
        self,
        x: Grid,
        embedding: Float[Array, "#B E"],
        read: Mapping[str, PyTree[Array]],
        paths: Paths,
        skip: Grid,
    ) -> Grid:
        """Returns the tokens after the merge and the block.

        Args:
          x: tokens.
          embedding: of the time and of conditions per image.
          read: result of `read`.
          paths: scan paths of the block.
          skip: output of the encoder's block on the same token grid.
        """
        return self.block(self.merge(jnp.concatenate([x, skip], axis=-1)), embedding, read, paths)


class Level(nnx.Module):
    """One level of the U: encoder, decoder, and the maps to and from the next coarser level.

    Args:
      config: configuration of the model.
      make_block: returns one layer with newly initialised parameters.
      down: numbers of the encoder's layers in the model.
      up: numbers of the decoder's layers in the model, as many as the encoder's.
      dtype: type of the matrix products.
      rngs: randomness of the initial parameters.
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
        d_model = config.d_model
        linear = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)

        def make_skip_block(rngs: nnx.Rngs) -> SkipBlock:
            return SkipBlock(make_block(rngs), d_model, dtype=dtype, rngs=rngs)

        self.encoder = Stack(config, make_block, down, rngs=rngs)
        self.down = linear(4 * d_model, d_model)
        is_read = config.mask_conditioning != "concat"
        self.coarsen = CoarserCondition(d_model, dtype=dtype, rngs=rngs) if is_read else unread
        self.up = linear(d_model, 4 * d_model)
        self.decoder = Stack(config, make_skip_block, up, rngs=rngs)

    def to_coarser(self, x: Grid) -> Float[Array, "B H/2 W/2 D"]:
        """Returns the tokens at half the height and width, by a 2x2 convolution of stride 2."""
        return self.down(space_to_depth(x, 2))

    def to_finer(self, x: Grid) -> Float[Array, "B 2*H 2*W D"]:
        """Returns the tokens at twice the height and width, by a transposed 2x2 convolution of stride 2."""
        return depth_to_space(self.up(x), 2)


class UShape(nnx.Module):
    """All layers of a model as a U. It is called like a `Stack`.

    Args:
      config: configuration of the model; `level_depths` and `depth` give the numbers of layers.
      make_block: returns one layer with newly initialised parameters.
      dtype: type of the matrix products.
      rngs: randomness of the initial parameters.
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

    def __call__(self, x: Grid, embedding: Float[Array, "#B E"], condition: Condition) -> Grid:
        """Returns the output of the last layer.

        Args:
          x: tokens. Every level halves the token grid, so n levels need multiples of 2^n rows and columns.
          embedding: of the time and of conditions per image.
          condition: with mask features on the token grid of x.
        """
        of_levels, of_bottom = condition.read or ([(None, None)] * len(self.levels), None)
        encoded = []
        for level, (of_encoder, of_decoder) in zip(self.levels, of_levels, strict=True):
            x, outputs = level.encoder.run(x, embedding, condition, of_encoder, keep=True)
            encoded.append((outputs, condition, of_decoder))
            x, condition = level.to_coarser(x), level.coarsen(condition)
        x, _ = self.bottom.run(x, embedding, condition, of_bottom)
        for level, (outputs, condition, of_decoder) in zip(reversed(self.levels), reversed(encoded), strict=True):
            # The first block of the decoder merges the output of the encoder's last block.
            x, _ = level.decoder.run(level.to_finer(x), embedding, condition, of_decoder, outputs[::-1])
        return x

    def read(self, condition: Condition) -> PyTree[Array]:
        """Returns what the layers read from the condition: of each level's encoder and decoder, and of the bottom.

        Args:
          condition: with mask features on the token grid.
        """
        of_levels = []
        for level in self.levels:
            of_levels.append((level.encoder.read(condition), level.decoder.read(condition)))
            condition = level.coarsen(condition)
        return of_levels, self.bottom.read(condition)
