"""One update of the training state, and the loss on data that no update has seen."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Key

from sisma_jax.config import Config
from sisma_jax.diffusion.objectives import Batch, Examples, make_objective
from sisma_jax.models.factory import Params
from sisma_jax.parallel import sharding
from sisma_jax.training.optimizers import make_optimizer
from sisma_jax.training.state import TrainState

PyTree = Any
Metrics = dict[str, Float[Array, ""]]

Draw = Callable[[Batch, Key[Array, ""]], Examples]
"""Draws what is random for a batch. Every array's first axis is the batch's."""
Loss = Callable[[Params, Examples], tuple[Float[Array, ""], Metrics]]
"""The means over the examples of the loss and of further metrics."""
Update = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
"""Pure; among the metrics are loss, grad_norm and skipped."""


def make_update(config: Config) -> Update:
    """Returns the update of the denoiser."""
    objective = make_objective(config)

    def loss(params: Params, examples: Examples) -> tuple[Float[Array, ""], Metrics]:
        return objective.losses(params, examples).mean(), {}

    return build_update(
        functools.partial(objective.draw, mask_dropout=config.flow.mask_dropout),
        loss,
        make_optimizer(config),
        config.optim.ema_decay,
        config.train.accumulate_steps,
    )


def build_update(
    draw: Draw,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    accumulate_steps: int = 1,
) -> Update:
    """Returns the update that lowers a loss.

    Where the loss, the gradient or a value of the new state is not finite, parameters, EMA and optimizer state stay as
    they are; the step counts all the same, so that the next one has other data and other noise.

    Args:
      ema_decay: of the EMA parameters, in a run that is long enough.
      accumulate_steps: parts of a batch whose gradients are computed one after the other.
    """

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        examples = draw(batch, jax.random.fold_in(state.key, state.step))
        (value, metrics), grads = _mean_gradient(loss, state.params, examples, accumulate_steps)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        step = state.step + 1
        # The EMA's horizon grows with the run, so that a short run's EMA is not its initial parameters.
        count = step.astype(jnp.float32)
        decay = jnp.minimum(jnp.float32(ema_decay), count / (count + 9))
        ema = jax.tree.map(lambda average, x: average + (1 - decay) * (x - average), state.ema, params)
        old, new = (state.params, state.ema, state.opt_state), (params, ema, opt_state)
        is_finite = jnp.isfinite(value) & jnp.isfinite(grad_norm) & _all_finite(new)
        params, ema, opt_state = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), new, old)
        skipped = jnp.where(is_finite, 0, state.skipped + 1)
        metrics = {"loss": value, "grad_norm": grad_norm, "skipped": skipped, **metrics}
        new = TrainState(step=step, params=params, ema=ema, opt_state=opt_state, key=state.key, skipped=skipped)
        return new, metrics

    return update


def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Returns whether all values are finite, with one reduction for all arrays of one shape, which are placed alike.

    XLA computes the new state a second time within each reduction: one per array takes four times as long to compile as
    the whole update without them.
    """
    by_shape: dict[Any, list[Array]] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            by_shape.setdefault((x.shape, sharding.has_layer_axis(path)), []).append(jnp.isfinite(x))
    return jnp.stack([functools.reduce(jnp.logical_and, same).all() for same in by_shape.values()]).all()


def _mean_gradient(
    loss: Loss, params: Params, examples: Examples, num_parts: int
) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
    """Returns (loss, metrics) and the gradient, of the examples in so many parts of equal size."""

    def gradient(part: Examples) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
        values, grads = jax.value_and_grad(loss, has_aux=True)(params, part)
        return values, sharding.constrain_state(grads)

    if num_parts == 1:
        return gradient(examples)

    def add(total: Any, part: Examples) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(part)), None

    # Rows j, j + num_parts, ... make part j: each device's rows are in every part, and none has to move.
    parts = jax.tree.map(lambda x: x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1), examples)
    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, first))
    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda x: x / num_parts, total)


def jit_update(update: Update, state: TrainState, mesh: Mesh) -> Update:
    """Returns the compiled update, which donates its state.

    Args:
      update: as `make_update` returns it.
      state: arrays or `jax.ShapeDtypeStruct`s of its state.
      mesh: to be in context (`jax.set_mesh`) when it is called, or lowered.
    """
    shardings = sharding.of_state(state, mesh), sharding.replicated(mesh)
    return jax.jit(update, donate_argnums=0, out_shardings=shardings)


def make_held_out_loss(config: Config, mesh: Mesh) -> Callable[[Params, Batch, int], Float[Array, " B"]]:
    """Returns the compiled function (params, batch, number of the batch) -> loss of each example with its mask given.

    Times and noise follow from the number of the batch. The losses are replicated.
    """
    objective = make_objective(config)

    def held_out_loss(params: Params, batch: Batch, index: int) -> Float[Array, " B"]:
        key = jax.random.fold_in(jax.random.key(0), index)
        return objective.losses(params, objective.draw(batch, key, mask_dropout=0.0))

    return jax.jit(held_out_loss, out_shardings=sharding.replicated(mesh))
