"""What conditions the denoiser, from the user's inputs to the layers: today a mask.

A further condition is one more field of `Condition`, made by `ConditionEncoder`: features of tokens travel as `mask`,
a vector per image joins the embedding of the time in `Condition.embedding`.
"""

import dataclasses
import typing
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from sisma_jax.config import ModelConfig
from sisma_jax.models.mask_encoder import MaskEncoder, Stage
from sisma_jax.models.patches import Grid


# Unchecked, since JAX also makes pytrees of shapes and of shardings.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Condition:
    """The encoded inputs: a pytree whose arrays all have the batch as their first axis.

    Attributes:
      mask: S_M, one feature per token.
    """

    mask: Float[Array, "B h w D"]

    def embedding(self, time: Float[Array, "B D"]) -> Float[Array, "B D"]:
        """Returns what modulates the layers: the embedding of the time, plus conditions that are a vector per image."""
        return time


class ConditionEncoder(nnx.Module):
    """Encodes what a user gives, once for all function evaluations of a sampler.

    Args:
      config: sizes.
      num_classes: of a mask's labels.
      downsampling: image pixels along the side of a token; a power of two.
      dtype: type of the matrix products.
    """

    def __init__(self, config: ModelConfig, num_classes: int, downsampling: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.mask_encoder = MaskEncoder(
            downsampling, num_classes, config.d_label, config.d_model, dtype=dtype, rngs=rngs
        )

    @staticmethod
    def input_shapes(image_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shape and type of what is given for one image."""
        return {"mask": jax.ShapeDtypeStruct((image_size, image_size), jnp.uint8)}

    def __call__(self, inputs: Mapping[str, Array], is_dropped: Bool[Array, " B"] | None = None) -> Condition:
        """Returns the encoded inputs.

        Args:
          inputs: "mask", class indices (B, H, W).
          is_dropped: examples that become `null`.
        """
        condition = Condition(mask=self.mask_encoder(inputs["mask"]))
        if is_dropped is None:
            return condition

        def drop(null: Array, x: Array) -> Array:
            return jnp.where(jnp.expand_dims(is_dropped, range(1, x.ndim)), null, x)

        return jax.tree.map(drop, self.null(condition), condition)

    def null(self, condition: Condition) -> Condition:
        """Returns the condition of "nothing given", in the same shapes."""
        return Condition(mask=self.mask_encoder.null_features(condition.mask.shape))


class CoarserCondition(nnx.Module):
    """The condition at the next resolution of a U."""

    def __init__(self, d_model: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.mask = Stage(d_model, d_model, dtype=dtype, rngs=rngs)

    def __call__(self, condition: Condition) -> Condition:
        return dataclasses.replace(condition, mask=self.mask(condition.mask))


class ConcatenatedMask(nnx.Module):
    """Lets the mask in before the first layer, in place of layers that read it: Linear([x, S_M])."""

    def __init__(self, d_model: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.proj = nnx.Linear(2 * d_model, d_model, dtype=dtype, rngs=rngs)

    def __call__(self, x: Grid, condition: Condition) -> Grid:
        return self.proj(jnp.concatenate([x, condition.mask.astype(x.dtype)], axis=-1))


def unread(condition: Condition) -> Condition:
    """Stands for `CoarserCondition` where no layer reads the condition."""
    return condition


def unmerged(x: Grid, condition: Condition) -> Grid:
    """Stands for `ConcatenatedMask` where the layers read the mask."""
    return x
