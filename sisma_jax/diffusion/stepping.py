"""Sampling in parts: start, read, any number of evaluations. `sampling.sample` is the same as one program.

The loop over the evaluations has bounds that are arguments. One compiled program therefore serves all solvers and
numbers of steps, and a trajectory has the same bits if it is computed in one call or in several.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from sisma_jax.config import FlowConfig, Sampling
from sisma_jax.diffusion import editing
from sisma_jax.diffusion.flow import MIN_REMAINING_IN_LOSS, to_velocity
from sisma_jax.diffusion.guidance import guided
from sisma_jax.diffusion.sampling import read_once
from sisma_jax.diffusion.solvers import AverageVelocity, Point
from sisma_jax.models.autoencoder import IdentityAutoencoder, KlAutoencoder, from_uint8
from sisma_jax.models.condition import Condition
from sisma_jax.models.denoiser import Denoiser
from sisma_jax.parallel import sharding

MAX_EVALUATIONS = 256
"""Columns of the table that `advance` takes. A longer trajectory takes several calls."""


# Annotations are not checked at run time, because JAX also builds these pytrees from shapes and shardings.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Given:
    """What stays the same in all evaluations, as a pytree. The first axis of every array is the batch.

    Attributes:
      condition: the encoded inputs.
      is_generated: latent positions that are sampled: all of them, except in an edit.
      of_kept: velocity at the other positions, see `editing.keeping`.
      null: the null condition of one image, for all of them; None before `read`.
    """

    condition: Condition
    is_generated: Bool[Array, "B h w 1"]
    of_kept: Point
    null: Condition | None = None


class Carry(NamedTuple):
    """What an evaluation updates: the point of the next evaluation, the base, and the predicted data."""

    point: Point
    base: Point
    data: Point


class Guidance(NamedTuple):
    """The traced settings of guidance; see `Sampling`."""

    scale: Float[Array, ""] | float
    low: Float[Array, ""] | float
    high: Float[Array, ""] | float
    rescale: Float[Array, ""] | float

    @classmethod
    def of(cls, settings: Sampling, flow: FlowConfig) -> "Guidance | None":
        """Returns the settings of guidance; None if the network is evaluated with the mask alone.

        A mean flow always has them, because guidance is an input of its network.
        """
        if not settings.is_guided and flow.objective != "mean_flow":
            return None
        values = settings.guidance, settings.guidance_low, settings.guidance_high, settings.guidance_rescale
        return cls(*map(float, values))


def start(
    model: Denoiser,
    keys: Key[Array, " B"],
    inputs: Mapping[str, Array],
    *,
    autoencoder: IdentityAutoencoder | KlAutoencoder,
    image: UInt8[Array, "#B H W 3"] | None = None,
    region: Bool[Array, "B H W"] | None = None,
) -> tuple[Given, Carry]:
    """Returns the encoded inputs and the noise; the arguments are those of `sampling.sample`.

    Raises:
      ValueError: `image` is given without `region`, or `region` without `image`.
    """
    if (image is None) != (region is None):
        raise ValueError("image and region go together: the photograph, and its pixels to generate.")
    side, (_, height, width) = autoencoder.downsampling, inputs["mask"].shape
    shape = (height // side, width // side, autoencoder.channels)
    x0 = sharding.constrain(jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys))
    # Without a photograph, the arrays have the same shapes, so that `advance` is one program for both.
    is_generated, of_kept = jnp.ones((*x0.shape[:3], 1), bool), 0 * x0
    if image is not None and region is not None:
        is_generated = editing.to_latent_grid(region, side)
        of_kept = autoencoder.encode(from_uint8(image)) - x0
    given = Given(model.encode(inputs), sharding.constrain(is_generated), sharding.constrain(of_kept))
    # Copies, because the loop donates its carry.
    return given, jax.tree.map(sharding.constrain, Carry(x0, x0 + 0, x0 + 0))


def read(model: Denoiser, given: Given) -> Given:
    """Returns what stays the same, with the null condition, and with what the layers read from both (`read_once`).

    Args:
      model: the denoiser with its parameters.
      given: of `start`, of one example or more. Those of several calls may be concatenated.
    """
    condition = read_once(model, given.condition)
    # That of one image, because all have the same.
    null = model.null(jax.tree.map(lambda x: x[:1], given.condition))
    return dataclasses.replace(given, condition=condition, null=null if condition.read is None else model.read(null))


def advance(
    model: Denoiser,
    given: Given,
    carry: Carry,
    table: Float[Array, "3 E"],
    guidance: Guidance | None,
    first: Int[Array, ""],
    stop: Int[Array, ""],
    *,
    flow: FlowConfig,
) -> Carry:
    """Returns the carry after the evaluations from `first` to `stop` - 1 of a solver's table; see `solvers.integrate`.

    Args:
      model: the denoiser with its parameters.
      given: of `read`.
      carry: of `start` or of the evaluations before.
      table: `solvers.evaluations`, of MAX_EVALUATIONS columns; for a mean flow, that of "euler".
      guidance: settings of guidance, which a mean flow needs; None for none.
      first: column of the first evaluation.
      stop: column behind the last one.
      flow: the objective with which the model was trained, and what the network predicts.
    """
    velocity = (_average if flow.objective == "mean_flow" else _instantaneous)(model, given, guidance, flow)

    def evaluate(i: Int[Array, ""], carry: Carry) -> Carry:
        time, to_point, to_base = jax.lax.dynamic_index_in_dim(table, i, axis=1, keepdims=False)
        slope = jnp.where(given.is_generated, velocity(carry.point, time[None], to_point[None]), given.of_kept)
        return Carry(carry.base + to_point * slope, carry.base + to_base * slope, carry.point + (1 - time) * slope)

    # The same sharding as the carry of `start`, so that the next call needs no other program.
    return jax.tree.map(sharding.constrain, jax.lax.fori_loop(first, stop, evaluate, carry))


def _average(model: Denoiser, given: Given, guidance: Guidance | None, flow: FlowConfig) -> AverageVelocity:
    """Returns the average velocity of a mean flow. Euler's factor of the point is the duration of a step."""
    assert guidance is not None
    # One row for all images, as for the time.
    one = jnp.stack([jnp.asarray(value, jnp.float32) for value in (guidance.scale, guidance.low, guidance.high)])
    condition = model.with_guidance(given.condition, one[None])

    def velocity(x: Point, t: Float[Array, " #B"], duration: Float[Array, " #B"]) -> Point:
        # With the divisor of the loss, which is part of what the network was trained to predict.
        return to_velocity(model(x, t, condition, duration), x, t, flow.prediction, MIN_REMAINING_IN_LOSS)

    return velocity


def _instantaneous(model: Denoiser, given: Given, guidance: Guidance | None, flow: FlowConfig) -> AverageVelocity:
    """Returns the velocity, which does not depend on the duration."""

    def denoise(x: Point, t: Float[Array, " #B"], condition: Condition) -> Point:
        return to_velocity(model(x, t, condition), x, t, flow.prediction)

    if guidance is None:
        return lambda x, t, _: denoise(x, t, given.condition)
    assert given.null is not None, "`read` gives the null condition"
    scale, low, high, rescale = (jnp.asarray(value, jnp.float32) for value in guidance)
    # One program for all intervals, which skips the null condition outside of them.
    velocity = guided(denoise, given.condition, given.null, scale, interval=(low, high), rescale=rescale, skips=True)
    return lambda x, t, _: velocity(x, t)
