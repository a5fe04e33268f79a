"""The denoiser: patchify, condition, layers, depatchify. A backbone gives the layers their parts."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from sisma_jax.config import ModelConfig
from sisma_jax.models.condition import ConcatenatedMask, Condition, ConditionEncoder, unmerged
from sisma_jax.models.embeddings import FixedPositions, LearnedPositions, TimeEmbedding
from sisma_jax.models.layers import Block, LayerParts, Stack, layer_norm, make_block, modulate
from sisma_jax.models.patches import Grid, depth_to_space, space_to_depth
from sisma_jax.models.u_shape import UShape
from sisma_jax.parallel import sharding


class Head(nnx.Module):
    """Modulated LayerNorm and a linear map to the values of a patch, both zero at first."""

    def __init__(self, d_model: int, d_patch: int, *, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros
        self.modulation = nnx.Linear(d_model, 2 * d_model, kernel_init=zeros, bias_init=zeros, rngs=rngs)
        self.out_proj = nnx.Linear(d_model, d_patch, kernel_init=zeros, bias_init=zeros, rngs=rngs)

    def __call__(self, x: Grid, embedding: Float[Array, "B D"]) -> Float[Array, "B H W P"]:
        shift, scale = jnp.split(self.modulation(jax.nn.silu(embedding)), 2, axis=-1)
        return self.out_proj(modulate(layer_norm(x), shift, scale)).astype(jnp.float32)


class Denoiser(nnx.Module):
    """Noisy latent, time and condition in, one value per latent element out.

    `encode` is a method of its own because a sampler needs the condition once, not once per step.

    Args:
      config: sizes and wiring.
      parts: the backbone's.
      num_classes: of a mask's labels.
      latent_channels: channels of the latent.
      latent_downsampling: image pixels along the side of a latent position (1 for pixels, 8 for f8 latents).
      dtype: type of the matrix products; parameters, norms and scan carries stay float32.
      rngs: initialisation randomness; none is kept.
    """

    def __init__(
        self,
        config: ModelConfig,
        parts: LayerParts,
        num_classes: int,
        latent_channels: int,
        latent_downsampling: int,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        d_model, d_patch = config.d_model, config.patch_size**2 * latent_channels
        options = {"dtype": dtype, "rngs": rngs}

        def make_layer(rngs: nnx.Rngs) -> Block:
            return make_block(config, parts, dtype=dtype, rngs=rngs)

        self.patch_size = config.patch_size
        self.num_halvings = len(config.level_depths)
        self.dtype = dtype
        self.condition_encoder = ConditionEncoder(
            config, num_classes, config.patch_size * latent_downsampling, **options
        )
        self.embed = nnx.Linear(d_patch, d_model, **options)
        self.time = TimeEmbedding(d_model, rngs=rngs)
        self.merge = ConcatenatedMask(d_model, **options) if config.mask_conditioning == "concat" else unmerged
        side = config.learned_positions
        self.positions = LearnedPositions(side, d_model) if side else FixedPositions()
        if config.level_depths:
            self.layers = UShape(config, make_layer, **options)
        else:
            self.layers = Stack(config, make_layer, range(config.depth), rngs=rngs)
        self.head = Head(d_model, d_patch, rngs=rngs)

    def encode(self, inputs: Mapping[str, Array], is_dropped: Bool[Array, " B"] | None = None) -> Condition:
        """Returns the encoded inputs: see `ConditionEncoder`."""
        return self.condition_encoder(inputs, is_dropped)

    def null(self, condition: Condition) -> Condition:
        """Returns the condition of "nothing given", in the same shapes."""
        return self.condition_encoder.null(condition)

    def __call__(
        self, xt: Float[Array, "B H W C"], t: Float[Array, " B"], condition: Condition
    ) -> Float[Array, "B H W C"]:
        """Returns the network's prediction at (xt, t), float32: see `FlowConfig.prediction` for its meaning.

        Args:
          xt: latent between noise (t = 0) and data (t = 1); H and W multiples of the patch size.
          t: in [0, 1].
          condition: of `encode`.

        Raises:
          ValueError: the latent is not tiled by patches or, in a U, by those of its coarsest resolution; it has not
            the size of learned positions; the condition is of another grid.
        """
        multiple = self.patch_size * 2**self.num_halvings
        if xt.shape[1] % multiple or xt.shape[2] % multiple:
            halved = f", halved {self.num_halvings} times" if self.num_halvings else ""
            raise ValueError(
                f"xt is {xt.shape[1:3]}, want multiples of {multiple} (the patch size {self.patch_size}{halved})"
            )
        x = self.embed(space_to_depth(sharding.constrain(xt).astype(self.dtype), self.patch_size))
        if condition.mask.shape[:3] != x.shape[:3]:
            raise ValueError(f"the mask's features are {condition.mask.shape[:3]}, want the token grid {x.shape[:3]}")
        x = self.positions(self.merge(x, condition))
        embedding = condition.embedding(self.time(t))
        return depth_to_space(self.head(self.layers(x, embedding, condition), embedding), self.patch_size)
