"""One update of the training state, and the loss on data that no update has seen."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from sisma_jax.config import Config
from sisma_jax.diffusion import flow
from sisma_jax.diffusion.sampling import from_uint8
from sisma_jax.models import autoencoder
from sisma_jax.models.factory import Params, graph_of
from sisma_jax.parallel import sharding
from sisma_jax.training.state import TrainState, optimizer

Batch = dict[str, Any]
"""mask: uint8 (B, H, W); and image: uint8 (B, H, W, 3), or moments: float16 (B, h, w, 2 C), the mean and log variance
of its latent."""
Examples = dict[str, Any]
"""What a loss needs: a batch and all that is drawn at random for it. Every array's first axis is the batch's."""
Metrics = dict[str, Float[Array, ""]]

Draw = Callable[[Batch, Key[Array, ""]], Examples]
Loss = Callable[[Params, Examples], tuple[Float[Array, ""], Metrics]]
"""The mean over examples, of the loss and of further metrics."""
Update = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def _make_draw(config: Config, mask_dropout: float) -> Draw:
    """Returns the function that draws latents, noise, times, and which masks are dropped."""

    def draw(batch: Batch, key: Key[Array, ""]) -> Examples:
        time_key, noise_key, drop_key, latent_key = jax.random.split(key, 4)
        if "moments" in batch:
            x1 = autoencoder.draw(latent_key, *jnp.split(batch["moments"].astype(jnp.float32), 2, axis=-1))
        else:
            x1 = from_uint8(batch["image"])
        batch_size = x1.shape[0]
        return {
            "x0": sharding.constrain(jax.random.normal(noise_key, x1.shape)),
            "x1": sharding.constrain(x1),
            "t": flow.sample_time(time_key, batch_size, config.flow.time_mean, config.flow.time_std),
            "mask": batch["mask"],
            "is_dropped": jax.random.bernoulli(drop_key, mask_dropout, (batch_size,)),
        }

    return draw


def _make_losses(config: Config) -> Callable[[Params, Examples], Float[Array, " B"]]:
    """Returns the function from parameters and examples to the loss of each."""
    graph = graph_of(config)

    def losses(params: Params, examples: Examples) -> Float[Array, " B"]:
        model = nnx.merge(graph, params)
        x0, x1, t = examples["x0"], examples["x1"], examples["t"]
        features = model.encode_mask(examples["mask"], examples["is_dropped"])
        output = model(flow.interpolate(x0, x1, t), t, features)
        return flow.loss_per_example(output, x0, x1, t, config.flow.prediction)

    return losses


def make_update(config: Config) -> Update:
    """Returns the pure function (state, batch) -> (next state, {loss, grad_norm, skipped})."""
    losses = _make_losses(config)

    def loss(params: Params, examples: Examples) -> tuple[Float[Array, ""], Metrics]:
        return losses(params, examples).mean(), {}

    return make_update_of(
        _make_draw(config, config.flow.mask_dropout),
        loss,
        optimizer(config),
        config.optim.ema_decay,
        config.train.accumulate_steps,
    )


def make_update_of(
    draw: Draw,
    loss: Loss,
    transformation: optax.GradientTransformation,
    ema_decay: float,
    accumulate_steps: int = 1,
) -> Update:
    """Returns the update that lowers a loss.

    Where loss or gradient is not finite, parameters, average and optimiser stay as they are; the step counts all the
    same, so that the next one has other data and other noise.

    Args:
      draw: (batch, key) -> examples.
      loss: (params, examples) -> loss and further metrics, means over the examples.
      transformation: of the gradients.
      ema_decay: of the averaged parameters, in a run long enough.
      accumulate_steps: parts of a batch whose gradients are computed one after the other.
    """

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        examples = draw(batch, jax.random.fold_in(state.key, state.step))
        (value, metrics), grads = _mean_gradient(loss, state.params, examples, accumulate_steps)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = transformation.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        step = state.step + 1
        # The average's horizon grows with the run, so that a short run's average is not its initial values.
        decay = jnp.minimum(ema_decay, step / (step + 9.0))
        ema = jax.tree.map(lambda average, x: average + (1 - decay) * (x - average), state.ema, params)
        is_finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
        params, ema, opt_state = jax.tree.map(
            lambda new, old: jnp.where(is_finite, new, old),
            (params, ema, opt_state),
            (state.params, state.ema, state.opt_state),
        )
        skipped = jnp.where(is_finite, 0, state.skipped + 1)
        metrics = {"loss": value, "grad_norm": grad_norm, "skipped": skipped, **metrics}
        new = TrainState(step=step, params=params, ema=ema, opt_state=opt_state, key=state.key, skipped=skipped)
        return new, metrics

    return update


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
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, _first(parts)))
    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda x: x / num_parts, total)


def _first(parts: Examples) -> Examples:
    return jax.tree.map(lambda x: x[0], parts)


def jit_update(update: Update, state: TrainState, mesh: Mesh) -> Update:
    """Returns the compiled update, which takes the place of its state in memory.

    Args:
      update: as `make_update` returns it.
      state: arrays or `jax.ShapeDtypeStruct`s of its state.
      mesh: to be in context (`jax.set_mesh`) when it is called, or lowered.
    """
    shardings = sharding.of_state(state, mesh), sharding.replicated(mesh)
    return jax.jit(update, donate_argnums=0, out_shardings=shardings)


def make_held_out_loss(config: Config, mesh: Mesh) -> Callable[[Params, Batch, int], Float[Array, " B"]]:
    """Returns the compiled function (params, batch, number of the batch) -> loss of each example with its mask given.

    Times and noise follow from the number of the batch. The losses are whole on every device.
    """
    draw, losses = _make_draw(config, mask_dropout=0.0), _make_losses(config)

    def held_out_loss(params: Params, batch: Batch, index: int) -> Float[Array, " B"]:
        return losses(params, draw(batch, jax.random.fold_in(jax.random.key(0), index)))

    return jax.jit(held_out_loss, out_shardings=sharding.replicated(mesh))
