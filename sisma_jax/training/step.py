"""The training step, and the loss on held-out data."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Key, Num

from sisma_jax.config import Config
from sisma_jax.diffusion.objectives import Batch, Examples, make_objective
from sisma_jax.models.factory import Params
from sisma_jax.parallel import compiler, sharding
from sisma_jax.training.optimizers import make_optimizer
from sisma_jax.training.state import TrainState

PyTree = Any
Metrics = dict[str, Num[Array, ""]]
"""Scalars by name."""

Draw = Callable[[Batch, Key[Array, ""]], Examples]
"""Adds what is random, such as noise and times, to a batch. The first axis of every array is the batch axis."""
Loss = Callable[[Params, Examples], tuple[Float[Array, ""], Metrics]]
"""Returns the loss and further metrics, each averaged over the examples."""
Update = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
"""A training step, a pure function. Its metrics include loss, grad_norm and skipped (see `TrainState.skipped`)."""


def make_update(config: Config) -> Update:
    """Returns the training step of the denoiser, which is not yet compiled; see `jit_update`."""
    objective = make_objective(config)

    return build_update(
        functools.partial(objective.draw, mask_dropout=config.flow.mask_dropout),
        objective.loss,
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
    """Returns a training step that minimises a loss.

    If the loss, the gradient or a value of the new state is not finite, the step leaves the parameters, the EMA
    parameters and the optimizer state unchanged. It still increments `step`, so the next step uses other data and
    noise.

    Args:
      draw: adds what is random to a batch.
      loss: of the parameters for such a batch.
      optimizer: of the parameters.
      ema_decay: decay of the EMA parameters. At step n, counted from 1, it is at most n / (n + 9).
      accumulate_steps: parts of a batch whose gradients are computed in sequence and averaged.
    """

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        examples = draw(batch, jax.random.fold_in(state.key, state.step))
        (value, metrics), grads = _mean_gradient(loss, state.params, examples, accumulate_steps)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        step = state.step + 1
        # The decay rises with the step, so that the EMA of a short run is not dominated by its initial parameters.
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
    """Returns whether all values are finite.

    There is one reduction for all arrays of the same shape, which have the same sharding. XLA recomputes the new state
    within each reduction: with one reduction per array, the update takes four times as long to compile.
    """
    by_shape: dict[Any, list[Array]] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            by_shape.setdefault((x.shape, sharding.has_layer_axis(path)), []).append(jnp.isfinite(x))
    return jnp.stack([functools.reduce(jnp.logical_and, same).all() for same in by_shape.values()]).all()


def _mean_gradient(
    loss: Loss, params: Params, examples: Examples, num_parts: int
) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
    """Returns (loss, metrics) and the gradient, each averaged over equal parts that are computed in sequence."""

    def gradient(part: Examples) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
        values, grads = jax.value_and_grad(loss, has_aux=True)(params, part)
        return values, sharding.constrain_state(grads)

    if num_parts == 1:
        return gradient(examples)

    def add(total: Any, part: Examples) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(part)), None

    # Part j consists of rows j, j + num_parts, ... Hence every part has rows of each device, and no row moves.
    parts = jax.tree.map(lambda x: x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1), examples)
    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, first))
    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda x: x / num_parts, total)


def jit_update(update: Update, state: TrainState, mesh: Mesh) -> Update:
    """Returns the jitted training step, which donates its state.

    Args:
      update: the training step, from `make_update` or `build_update`.
      state: arrays or `jax.ShapeDtypeStruct`s of the training state, which determine the shardings.
      mesh: of all devices. It must be in context (`jax.set_mesh`) when the step is called or lowered.
    """
    shardings = sharding.of_state(state, mesh), sharding.replicated(mesh)
    return jax.jit(update, donate_argnums=0, out_shardings=shardings, compiler_options=compiler.options(mesh))


def make_held_out_loss(config: Config, mesh: Mesh) -> Callable[[Params, Batch, int], Float[Array, " B"]]:
    """Returns the jitted function (params, batch, index of the batch) -> loss per example, without mask dropout.

    The index of the batch determines times and noise. The losses are replicated.

    Args:
      config: of the run.
      mesh: of all devices; it must be in context when the function is called.
    """
    objective = make_objective(config)

    def held_out_loss(params: Params, batch: Batch, index: int) -> Float[Array, " B"]:
        key = jax.random.fold_in(jax.random.key(0), index)
        return objective.held_out_losses(params, objective.draw(batch, key, mask_dropout=0.0))

    return jax.jit(held_out_loss, out_shardings=sharding.replicated(mesh))
