"""Encodes the user's inputs, currently a mask, into the condition that the layers of the denoiser read.

To add a condition, add a field to `Condition` and compute it in `ConditionEncoder`. Features per token follow the
example of `mask`. A vector per image is added to the time embedding in `Condition.embedding`.
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PyTree

from sisma_jax.config import ModelConfig
from sisma_jax.models.embeddings import ScalarEmbedding
from sisma_jax.models.mask_encoder import MaskEncoder, Stage
from sisma_jax.models.patches import Grid


# Annotations are not checked at run time, because JAX also builds this pytree from shapes and shardings.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Condition:
    """The encoded inputs, as a pytree. The first axis of every array is the batch.

    Attributes:
      mask: mask features S_M, one per token.
      regions: for region pooling, the share of each token's pixels that have each class.
      read: what the layers of the denoiser have read from the condition, so that they need not read it again: arrays
        (layers, B, ...); None if they have not.
      guidance: embedding of the guidance that a mean flow contains, one row per image or one for all of them; None in
        other models.
    """

    mask: Float[Array, "B h w D"]
    guidance: Float[Array, "#B D"] | None = None
    regions: Float[Array, "B h w K"] | None = None
    read: PyTree[Array] = None

    def embedding(self, time: Float[Array, "#B D"]) -> Float[Array, "#B D"]:
        """Returns the vector per image that modulates the layers.

        Args:
          time: time embedding of each image.
        """
        return time if self.guidance is None else time + self.guidance


def interleaved(*conditions: Condition) -> Condition:
    """Returns the rows of the conditions in turn. A sharded batch has rows that belong together on one device.

    Args:
      conditions: each of B examples, or of one, which is repeated; at least one of B.
    """

    def in_turn(axis: int) -> Callable[..., Array]:
        def stacked(*arrays: Array) -> Array:
            shape = jnp.broadcast_shapes(*(x.shape for x in arrays))
            rows = jnp.stack([jnp.broadcast_to(x, shape) for x in arrays], axis=axis + 1)
            return rows.reshape(*shape[:axis], -1, *shape[axis + 1 :])

        return stacked

    # The first axis of what the layers have read is that of the layers.
    read = jax.tree.map(in_turn(1), *(condition.read for condition in conditions))
    rest = jax.tree.map(in_turn(0), *(dataclasses.replace(condition, read=None) for condition in conditions))
    return dataclasses.replace(rest, read=read)


class ConditionEncoder(nnx.Module):
    """Encodes the user's inputs. A sampler calls it once and uses the result in all function evaluations.

    Args:
      config: sizes of the model.
      num_classes: number of classes of a mask.
      downsampling: side of a token in image pixels; a power of two.
      is_guided: whether guidance is a condition, as in mean flows.
      dtype: type of the matrix products.
      rngs: randomness of the initial parameters.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_classes: int,
        downsampling: int,
        *,
        is_guided: bool = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.mask_encoder = MaskEncoder(
            downsampling, num_classes, config.d_label, config.d_model, dtype=dtype, rngs=rngs
        )
        self.has_regions = config.region_pooling
        self.guidance = ScalarEmbedding(config.d_model, 3, is_zero=True, rngs=rngs) if is_guided else None

    @staticmethod
    def input_shapes(image_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shape and dtype of each input for one image.

        Args:
          image_size: height and width of the image in pixels.
        """
        return {"mask": jax.ShapeDtypeStruct((image_size, image_size), jnp.uint8)}

    def __call__(self, inputs: Mapping[str, Array], is_dropped: Bool[Array, " B"] | None = None) -> Condition:
        """Returns the encoded inputs.

        Args:
          inputs: {"mask": integer class indices (B, H, W)}, and for a mean flow {"guidance": (B, 3)}, the scale, at
            least 1, and the times between which it applies; without it, there is no guidance.
          is_dropped: examples whose condition is replaced by `null`; None replaces none.

        Raises:
          ValueError: a side of the mask is not a multiple of `downsampling`.
        """
        mask = self.mask_encoder(inputs["mask"])
        condition = Condition(mask, self._guidance(inputs.get("guidance"), mask))
        if self.has_regions:
            condition = dataclasses.replace(condition, regions=self.mask_encoder.class_shares(inputs["mask"]))
        if is_dropped is None:
            return condition

        def drop(null: Array, x: Array) -> Array:
            return jnp.where(jnp.expand_dims(is_dropped, range(1, x.ndim)), null, x)

        return jax.tree.map(drop, self.null(condition), condition)

    def null(self, condition: Condition) -> Condition:
        """Returns the learned condition that stands for absent inputs, with the shapes of the given condition."""
        shape = condition.mask.shape
        regions = None if condition.regions is None else jnp.zeros_like(condition.regions)
        return Condition(self.mask_encoder.null_features(shape), self._guidance(None, condition.mask), regions)

    def with_guidance(self, condition: Condition, guidance: Float[Array, "#B 3"]) -> Condition:
        """Returns the condition of a mean flow with another guidance.

        Args:
          condition: what `__call__` returned.
          guidance: as for `__call__`; one row for all examples, or one per example.
        """
        return dataclasses.replace(condition, guidance=self._guidance(guidance, condition.mask))

    def _guidance(self, given: Float[Array, "#B 3"] | None, mask: Float[Array, "B ..."]) -> Float[Array, "#B D"] | None:
        if self.guidance is None:
            return None
        if given is None:
            given = jnp.broadcast_to(jnp.asarray([[1.0, 0.0, 1.0]], jnp.float32), (mask.shape[0], 3))
        scale, low, high = given.T
        # The share of the guided velocity that is guidance is 1 - 1 / scale, which is in [0, 1); see `MeanFlow`.
        return self.guidance(1 - 1 / scale, low, high)


class CoarserCondition(nnx.Module):
    """Maps the condition to the next coarser level of a U.

    Args:
      d_model: channels of a mask feature.
      dtype: type of the matrix products.
      rngs: randomness of the initial parameters.
    """

    def __init__(self, d_model: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.mask = Stage(d_model, d_model, dtype=dtype, rngs=rngs)

    def __call__(self, condition: Condition) -> Condition:
        """Returns the condition at half the height and width."""
        regions = condition.regions
        if regions is not None:
            b, h, w, k = regions.shape
            regions = regions.reshape(b, h // 2, 2, w // 2, 2, k).mean(axis=(2, 4))
        return dataclasses.replace(condition, mask=self.mask(condition.mask), regions=regions)


class ConcatenatedMask(nnx.Module):
    """Adds the mask to the tokens before the first layer, Linear([x, S_M]), for layers that do not read the mask.

    Args:
      d_model: channels of a token and of a mask feature.
      dtype: type of the matrix products.
      rngs: randomness of the initial parameters.
    """

    def __init__(self, d_model: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.proj = nnx.Linear(2 * d_model, d_model, dtype=dtype, rngs=rngs)

    def __call__(self, x: Grid, condition: Condition) -> Grid:
        """Returns the tokens, merged with the mask features of the same grid."""
        return self.proj(jnp.concatenate([x, condition.mask.astype(x.dtype)], axis=-1))


def unread(condition: Condition) -> Condition:
    """Returns the condition unchanged; replaces `CoarserCondition` if no layer reads the condition."""
    return condition


def unmerged(x: Grid, condition: Condition) -> Grid:
    """Returns the tokens `x` unchanged; replaces `ConcatenatedMask` if the layers read the mask."""
    return x
