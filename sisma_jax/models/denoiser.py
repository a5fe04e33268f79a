"""The denoiser: patchify, condition, layers, unpatchify. A backbone supplies the parts of the layers."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from sisma_jax.config import ModelConfig
from sisma_jax.models.condition import ConcatenatedMask, Condition, ConditionEncoder, unmerged
from sisma_jax.models.embeddings import FixedPositions, LearnedPositions, ScalarEmbedding
from sisma_jax.models.layers import (
    Block,
    LayerParts,
    Modulation,
    Stack,
    layer_norm,
    make_block,
    modulate,
    modulation_size,
)
from sisma_jax.models.patches import Grid, overlap_add, windows
from sisma_jax.models.u_shape import UShape
from sisma_jax.parallel import sharding


class Head(nnx.Module):
    """Modulated LayerNorm and a linear map to the values of a patch, whose parameters are initially zero.

    Args:
      d_model: channels of a token.
      d_patch: values of a patch, over all channels of the latent.
      rngs: randomness of the initial parameters.
    """

    def __init__(self, d_model: int, d_patch: int, *, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros
        self.modulation = Modulation(d_model, 2 * d_model, rngs=rngs)
        self.out_proj = nnx.Linear(d_model, d_patch, kernel_init=zeros, bias_init=zeros, rngs=rngs)

    def __call__(self, x: Grid, embedding: Float[Array, "#B D"]) -> Float[Array, "B H W P"]:
        """Returns the values of each token's patch, float32.

        Args:
          x: tokens after the last layer.
          embedding: of the time and of conditions per image; it gives shift and scale.
        """
        shift, scale = jnp.split(self.modulation(embedding), 2, axis=-1)
        return self.out_proj(modulate(layer_norm(x), shift, scale)).astype(jnp.float32)


class Denoiser(nnx.Module):
    """Predicts one value per latent element from a noisy latent, its time and the condition.

    `encode` computes the condition. It is separate from `__call__`, so that a sampler encodes the inputs only once and
    not in every step.

    Args:
      config: sizes and wiring.
      parts: layer parts of the backbone.
      num_classes: number of classes of a mask.
      latent_channels: channels of the latent.
      latent_downsampling: side of a latent position in image pixels (1 for pixels, 8 for f8 latents).
      is_mean_flow: whether the network also predicts for intervals of time, and takes the guidance as a condition.
      dtype: type of the matrix products; parameters, norms and scan carries stay float32.
      rngs: randomness of the initial parameters; the module does not store it.

    Raises:
      ValueError: the side of a token in image pixels is not a power of two.
      InputError: the backbone does not support the sizes.
    """

    def __init__(
        self,
        config: ModelConfig,
        parts: LayerParts,
        num_classes: int,
        latent_channels: int,
        latent_downsampling: int,
        *,
        is_mean_flow: bool = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        d_model, d_patch = config.d_model, (config.patch_size + 2 * config.patch_overlap) ** 2 * latent_channels

        def make_layer(rngs: nnx.Rngs) -> Block:
            return make_block(config, parts, dtype=dtype, rngs=rngs)

        self.patch_size = config.patch_size
        self.patch_overlap = config.patch_overlap
        self.num_halvings = len(config.level_depths)
        self.dtype = dtype
        self.condition_encoder = ConditionEncoder(
            config,
            num_classes,
            config.patch_size * latent_downsampling,
            is_guided=is_mean_flow,
            dtype=dtype,
            rngs=rngs,
        )
        self.embed = nnx.Linear(d_patch, d_model, dtype=dtype, rngs=rngs)
        self.time = ScalarEmbedding(d_model, frequencies=config.time_frequencies, rngs=rngs)
        self.duration = ScalarEmbedding(d_model, is_zero=True, rngs=rngs) if is_mean_flow else None
        is_concatenated = config.mask_conditioning == "concat"
        self.merge = ConcatenatedMask(d_model, dtype=dtype, rngs=rngs) if is_concatenated else unmerged
        side = config.learned_positions
        self.positions = LearnedPositions(side, d_model) if side else FixedPositions()
        if config.level_depths:
            self.layers = UShape(config, make_layer, dtype=dtype, rngs=rngs)
        else:
            self.layers = Stack(config, make_layer, range(config.depth), rngs=rngs)
        is_shared = config.modulation == "shared"
        self.modulation = Modulation(d_model, modulation_size(config), rngs=rngs) if is_shared else _same
        self.head = Head(d_model, d_patch, rngs=rngs)

    def encode(self, inputs: Mapping[str, Array], is_dropped: Bool[Array, " B"] | None = None) -> Condition:
        """Returns the encoded inputs.

        Args:
          inputs: {"mask": integer class indices (B, H, W)}, at the resolution of the image, and for a mean flow the
            guidance; see `ConditionEncoder`.
          is_dropped: examples whose condition is replaced by `null`; None replaces none.

        Raises:
          ValueError: a side of the mask is not a multiple of the side of a token in pixels.
        """
        return self.condition_encoder(inputs, is_dropped)

    def read(self, condition: Condition) -> Condition:
        """Returns the condition with what the layers read from it, which `__call__` then need not compute again.

        It takes memory: Cross-Mamba reads two sequences of `expand * d_model` channels per layer and image.

        Args:
          condition: result of `encode` or `null`.
        """
        return dataclasses.replace(condition, read=self.layers.read(condition))

    def null(self, condition: Condition) -> Condition:
        """Returns the learned condition that stands for absent inputs, with the shapes of the given condition."""
        return self.condition_encoder.null(condition)

    def with_guidance(self, condition: Condition, guidance: Float[Array, "#B 3"]) -> Condition:
        """Returns the condition of a mean flow with another guidance.

        Args:
          condition: result of `encode`.
          guidance: as for `ConditionEncoder`; one row for all examples, or one per example.
        """
        return self.condition_encoder.with_guidance(condition, guidance)

    def __call__(
        self,
        xt: Float[Array, "B H W C"],
        t: Float[Array, " #B"],
        condition: Condition,
        duration: Float[Array, " #B"] | None = None,
    ) -> Float[Array, "B H W C"]:
        """Returns the network's prediction at (xt, t), float32. `FlowConfig.prediction` says what is predicted.

        Args:
          xt: latent between noise (t = 0) and data (t = 1). H and W are multiples of the patch size and, in a U with n
            levels above its coarsest resolution, of 2^n times the patch size.
          t: time of each latent, or one row for all of them, in [0, 1]. With one row, the products that depend on the
            time alone are computed once, and do not depend on the size of the batch.
          condition: result of `encode`.
          duration: for a mean flow, the length of the interval that begins at t, in [0, 1 - t]; None is zero.

        Raises:
          ValueError: H or W is not such a multiple, the token grid differs from that of the learned positions, the
            condition belongs to another token grid, or there is a duration and the model is no mean flow.
        """
        multiple = self.patch_size * 2**self.num_halvings
        if xt.shape[1] % multiple or xt.shape[2] % multiple:
            halved = f", halved {self.num_halvings} times" if self.num_halvings else ""
            raise ValueError(
                f"xt is {xt.shape[1:3]}, want multiples of {multiple} (the patch size {self.patch_size}{halved})"
            )
        x = self.embed(windows(sharding.constrain(xt).astype(self.dtype), self.patch_size, self.patch_overlap))
        if condition.mask.shape[:3] != x.shape[:3]:
            raise ValueError(
                f"condition has mask features {condition.mask.shape[:3]}, want the token grid {x.shape[:3]}; encode a "
                "mask of the image's size"
            )
        x = self.positions(self.merge(x, condition))
        embedding = condition.embedding(self._of_interval(t, duration))
        x = self.layers(x, self.modulation(embedding), condition)
        return overlap_add(self.head(x, embedding), self.patch_size, self.patch_overlap)

    def _of_interval(self, t: Float[Array, " #B"], duration: Float[Array, " #B"] | None) -> Float[Array, "#B D"]:
        if self.duration is None:
            if duration is not None:
                raise ValueError("a duration was given, but only mean flows predict for intervals of time")
            return self.time(t)
        return self.time(t) + self.duration(jnp.zeros_like(t) if duration is None else duration)


def _same(embedding: Float[Array, "#B D"]) -> Float[Array, "#B D"]:
    """Returns the embedding unchanged; every layer then has a modulation of its own."""
    return embedding
