"""Training objectives: random draws for a batch, and the loss of what is drawn.

An objective has the methods `draw` and `loss`, and `held_out_losses`, by which all objectives can be compared.
`training/step.py` differentiates the loss of a draw. Each objective is a class in this module.
"""

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from sisma_jax.config import Config
from sisma_jax.diffusion import flow
from sisma_jax.diffusion.guidance import jointly
from sisma_jax.diffusion.solvers import Point
from sisma_jax.models import autoencoder
from sisma_jax.models.condition import Condition
from sisma_jax.models.factory import Params, make_graph
from sisma_jax.parallel import sharding

Batch = dict[str, Any]
"""Keys: "image", uint8 (B, H, W, 3), or "moments", float16 (B, h, w, 2 C), mean and log variance of its latent; and the
conditions, "mask", uint8 (B, H, W)."""
Examples = dict[str, Any]
"""Inputs of a loss: the conditions of a batch and the random draws. The first axis of every array is the batch."""
# The c in the adaptive weights; the errors of an untrained network are about 1.
_WEIGHT_OFFSET = 1e-3


class FlowMatching:
    """Flow matching: the mean squared error of the velocity at a random time (arXiv 2210.02747, 2209.03003).

    Args:
      config: configuration of the run, which gives the denoiser and the distribution of times.
    """

    def __init__(self, config: Config):
        self._config = config.flow
        self._graph = make_graph(config, is_differentiated=True)

    def draw(self, batch: Batch, key: Key[Array, ""], mask_dropout: float) -> Examples:
        """Returns the conditions, latents x1, noise x0, times t, and which examples train with the null condition.

        Args:
          batch: arrays on the device; images are converted to [-1, 1], and latents are drawn from their moments.
          key: random key of this batch.
          mask_dropout: probability of the null condition, in [0, 1].
        """
        time_key, noise_key, drop_key, latent_key = jax.random.split(key, 4)
        conditions = {name: x for name, x in batch.items() if name not in ("image", "moments")}
        if "moments" in batch:
            x1 = autoencoder.draw(latent_key, *jnp.split(batch["moments"].astype(jnp.float32), 2, axis=-1))
        else:
            x1 = autoencoder.from_uint8(batch["image"])
        batch_size = x1.shape[0]
        return conditions | {
            "x0": sharding.constrain(jax.random.normal(noise_key, x1.shape, jnp.float32)),
            "x1": sharding.constrain(x1),
            "t": flow.sample_time(time_key, batch_size, self._config.time_mean, self._config.time_std),
            "is_dropped": jax.random.bernoulli(drop_key, jnp.float32(mask_dropout), (batch_size,)),
        }

    def loss(self, params: Params, examples: Examples) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the loss to minimise and further metrics, averaged over the examples, float32.

        Args:
          params: parameters of the denoiser.
          examples: what `draw` returned.
        """
        errors = self.held_out_losses(params, examples)
        return _adaptively_weighted(errors) if self._config.adaptive_weights else (errors.mean(), {})

    def held_out_losses(self, params: Params, examples: Examples) -> Float[Array, " B"]:
        """Returns the mean squared error of each example's velocity, without guidance, float32.

        Args:
          params: parameters of the denoiser.
          examples: what `draw` returned.
        """
        model = nnx.merge(self._graph, params)
        x0, x1, t = examples["x0"], examples["x1"], examples["t"]
        condition = model.encode({"mask": examples["mask"]}, examples["is_dropped"])
        output = model(flow.interpolate(x0, x1, t), t, condition)
        return flow.loss_per_example(output, x0, x1, t, self._config.prediction)


class MeanFlow(FlowMatching):
    """Mean flows (arXiv 2505.13447) in their improved form (arXiv 2512.02012), with guidance inside the network.

    The network gives the average velocity u(x, t, h) between the times t and t + h on the path through x at t. From
    h u = ∫ v follows, for a fixed end t + h, that the velocity at t is

        v = u - h du/dt,    du/dt = ∂u/∂x v + ∂u/∂t - ∂u/∂h,

    where du/dt is a derivative in forward mode (`jax.jvp`), without gradient. The loss is the squared error of this
    velocity. For h = 0, u is the velocity itself, which is the v in du/dt. The target of the velocity is

        x1 - x0 + (1 - 1/w) (u(x, t, 0) - u_null(x, t, 0))

    at a time in the guidance interval, and else x1 - x0. Its fixed point is the velocity with guidance of scale w. The
    scale and the interval are inputs of the network. Guidance therefore costs nothing when a face is sampled.

    The weight of an example is 1 / (error + c) (arXiv 2505.13447, eq. 22, with p = 1). Without it, the training
    collapses to the mean face of each mask.

    If at least half of the examples have h = 0, the first of every two is always one of them. Its loss needs neither
    the derivative nor a second evaluation for the velocity, hence 4 times the operations of an evaluation, not 6.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        self._num_parts = config.train.accumulate_steps
        self._is_paired = self._config.same_time >= 0.5

    def draw(self, batch: Batch, key: Key[Array, ""], mask_dropout: float) -> Examples:
        """Returns what flow matching draws, and for each example the "duration" h and its "guidance" (w, low, high).

        Two times are drawn. The earlier one is t, and the later one t + h; in a share `flow.same_time` of the examples,
        h is 0. 1 / w is uniform in [1 / max_guidance, 1]. The interval is [0, 1] at each end for half of the examples,
        and else ends uniformly within the next half.

        Args:
          batch: as for `FlowMatching.draw`.
          key: random key of this batch.
          mask_dropout: probability of the null condition, in [0, 1].
        """
        flow_key, time_key, same_key, scale_key, interval_key = jax.random.split(key, 5)
        examples = super().draw(batch, flow_key, mask_dropout)
        first, (size,) = examples["t"], examples["t"].shape
        second = flow.sample_time(time_key, size, self._config.time_mean, self._config.time_std)
        same = jnp.full(size, self._config.same_time)
        if self._is_paired:
            # The training step gives example i to the part i % num_parts, in which it has this position.
            position = jnp.arange(size) // self._num_parts
            same = jnp.where(position % 2 == 0, 1, 2 * same - 1)
        is_same = jax.random.bernoulli(same_key, same)
        t = jnp.where(is_same, first, jnp.minimum(first, second))
        share = jax.random.uniform(scale_key, (size,), jnp.float32, maxval=1 - 1 / self._config.max_guidance)
        low, high = jax.random.uniform(interval_key, (2, size), jnp.float32, minval=-0.5, maxval=0.5)
        return examples | {
            "t": t,
            "duration": jnp.where(is_same, 0.0, jnp.maximum(first, second) - t),
            "guidance": jnp.stack([1 / (1 - share), jnp.maximum(low, 0), jnp.minimum(high + 1, 1)], axis=-1),
        }

    def loss(self, params: Params, examples: Examples) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the weighted loss, and the "velocity_error" without weights, averaged over the examples, float32.

        Args:
          params: parameters of the denoiser.
          examples: what `draw` returned.
        """
        x0, x1 = examples["x0"], examples["x1"]
        model, frozen = (nnx.merge(self._graph, p) for p in (params, jax.lax.stop_gradient(params)))
        frozen_condition = frozen.encode(examples, examples["is_dropped"])
        rows = _Rows(
            xt=flow.interpolate(x0, x1, examples["t"]),
            t=examples["t"],
            duration=examples["duration"],
            difference=x1 - x0,
            guidance=examples["guidance"],
            condition=model.encode(examples, examples["is_dropped"]),
            frozen_condition=frozen_condition,
            null=frozen.null(frozen_condition),
        )
        if self._is_paired and len(x0) % 2 == 0:
            errors = jnp.stack(self._errors_of_pairs(model, frozen, *_pairs(rows)))
        else:
            errors = self._errors(model, frozen, rows)
        return _adaptively_weighted(errors)

    def _errors(self, model: nnx.Module, frozen: nnx.Module, rows: "_Rows") -> Float[Array, " B"]:
        """Returns the squared error of the velocity of each row, for any duration."""
        points = (rows.xt, rows.t), (rows.xt, rows.t)
        velocity, null = jointly(self._velocity(frozen), rows.frozen_condition, rows.null)(*points)
        return self._error_of_average(model, rows, velocity, null)

    def _errors_of_pairs(
        self, model: nnx.Module, frozen: nnx.Module, instants: "_Rows", intervals: "_Rows"
    ) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        """Returns the squared errors of rows with h = 0, and of as many with any duration."""
        at_instants, in_intervals = (instants.xt, instants.t), (intervals.xt, intervals.t)
        evaluate = jointly(self._velocity(frozen), intervals.frozen_condition, intervals.null, instants.null)
        velocity, null, null_at_instants = evaluate(in_intervals, in_intervals, at_instants)
        at_once = self._velocity(model)(*at_instants, instants.condition)
        target = instants.target(jax.lax.stop_gradient(at_once), null_at_instants)
        return _squared_error(at_once, target), self._error_of_average(model, intervals, velocity, null)

    def _error_of_average(self, model: nnx.Module, rows: "_Rows", velocity: Point, null: Point) -> Float[Array, " B"]:
        """Returns the squared error of the velocity that follows from the average velocity and its derivative."""

        def average(x: Point, t: Float[Array, " B"], duration: Float[Array, " B"]) -> Point:
            return self._to_velocity(model(x, t, rows.condition, duration), x, t)

        ones = jnp.ones_like(rows.t)
        u, change = jax.jvp(average, (rows.xt, rows.t, rows.duration), (velocity, ones, -ones))
        estimate = u - rows.duration[:, None, None, None] * jax.lax.stop_gradient(change)
        return _squared_error(estimate, rows.target(velocity, null))

    def _velocity(self, model: nnx.Module) -> Callable[[Point, Float[Array, " B"], Condition], Point]:
        def velocity(x: Point, t: Float[Array, " B"], condition: Condition) -> Point:
            return self._to_velocity(model(x, t, condition), x, t)

        return velocity

    def _to_velocity(self, output: Point, x: Point, t: Float[Array, " B"]) -> Point:
        return flow.to_velocity(output, x, t, self._config.prediction, flow.MIN_REMAINING_IN_LOSS)


@typing.no_type_check  # JAX also builds this pytree from other leaves.
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rows:
    """What the loss of a mean flow needs of each example."""

    xt: Point
    t: Float[Array, " B"]
    duration: Float[Array, " B"]
    difference: Point
    guidance: Float[Array, "B 3"]
    condition: Condition
    frozen_condition: Condition
    null: Condition

    def target(self, velocity: Point, null: Point) -> Point:
        """Returns the target of the velocity, with guidance at times in the interval of the guidance.

        Args:
          velocity: of the network with the condition. An example whose condition was dropped has the null condition
            here, too, hence no guidance.
          null: with the null condition.
        """
        scale, low, high = self.guidance.T
        share = jnp.where((low <= self.t) & (self.t < high), 1 - 1 / scale, 0)
        return self.difference + share[:, None, None, None] * (velocity - null)


def _pairs(rows: _Rows) -> tuple[_Rows, _Rows]:
    """Returns the first and the second of every two rows. A sharded batch has both on one device and moves no data."""
    pairs = jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), rows)
    return tuple(jax.tree.map(lambda x, i=i: x[:, i], pairs) for i in (0, 1))


def _adaptively_weighted(errors: Float[Array, "..."]) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the mean of the errors with weights that are constants for the gradient, and the mean without them."""
    return jnp.mean(errors / (jax.lax.stop_gradient(errors) + _WEIGHT_OFFSET)), {"velocity_error": errors.mean()}


def _squared_error(estimate: Point, target: Point) -> Float[Array, " B"]:
    return jnp.mean((estimate - target) ** 2, axis=(1, 2, 3))


_OBJECTIVES: dict[str, type[FlowMatching]] = {"flow_matching": FlowMatching, "mean_flow": MeanFlow}


def make_objective(config: Config) -> FlowMatching:
    """Returns the training objective of a configuration."""
    return _OBJECTIVES[config.flow.objective](config)
