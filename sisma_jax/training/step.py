"""One update of the training state, and the loss on data that no update has seen."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Key

from sisma_jax.config import Config
from sisma_jax.diffusion import flow
from sisma_jax.diffusion.sampling import from_uint8
from sisma_jax.models.autoencoder import draw
from sisma_jax.models.factory import Params, graph_of
from sisma_jax.training.state import TrainState, optimizer

Batch = dict[str, Any]
"""mask: uint8 (B, H, W); and image: uint8 (B, H, W, 3), or moments: float16 (B, h, w, 2 C), the mean and log variance
of its latent."""
Metrics = dict[str, Float[Array, ""]]


def _make_losses(config: Config, mask_dropout: float) -> Callable[[Params, Batch, Key[Array, ""]], Float[Array, " B"]]:
    """Returns the function from parameters, a batch and a key to the loss of each example."""
    graph = graph_of(config)

    def losses(params: Params, batch: Batch, key: Key[Array, ""]) -> Float[Array, " B"]:
        model = nnx.merge(graph, params)
        time_key, noise_key, drop_key, latent_key = jax.random.split(key, 4)
        if "moments" in batch:
            x1 = draw(latent_key, *jnp.split(batch["moments"].astype(jnp.float32), 2, axis=-1))
        else:
            x1 = from_uint8(batch["image"])
        x0 = jax.random.normal(noise_key, x1.shape)
        t = flow.sample_time(time_key, x1.shape[0], config.flow.time_mean, config.flow.time_std)
        is_dropped = jax.random.bernoulli(drop_key, mask_dropout, (x1.shape[0],))
        features = model.encode_mask(batch["mask"], is_dropped)
        output = model(flow.interpolate(x0, x1, t), t, features)
        return flow.loss_per_example(output, x0, x1, t, config.flow.prediction)

    return losses


def make_update(config: Config) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the pure function (state, batch) -> (next state, {loss, grad_norm}), for `jax.jit`."""
    losses = _make_losses(config, config.flow.mask_dropout)

    def loss(params: Params, batch: Batch, key: Key[Array, ""]) -> tuple[Float[Array, ""], Metrics]:
        return losses(params, batch, key).mean(), {}

    return make_update_of(loss, optimizer(config.optim), config.optim.ema_decay)


def make_update_of(
    loss: Callable[[Params, Batch, Key[Array, ""]], tuple[Float[Array, ""], Metrics]],
    transformation: optax.GradientTransformation,
    ema_decay: float,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the update that lowers a loss.

    Args:
      loss: (params, batch, key) -> loss and further metrics.
      transformation: of the gradients.
      ema_decay: of the averaged parameters, in a run long enough.
    """

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params, batch, key)
        updates, opt_state = transformation.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        step = state.step + 1
        # The average's horizon grows with the run, so that a short run's average is not its initial values.
        decay = jnp.minimum(ema_decay, step / (step + 9.0))
        ema = jax.tree.map(lambda average, x: average + (1 - decay) * (x - average), state.ema, params)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads), **metrics}
        return TrainState(step=step, params=params, ema=ema, opt_state=opt_state, key=state.key), metrics

    return update


def make_held_out_loss(config: Config) -> Callable[[Params, Batch, Key[Array, ""]], Float[Array, " B"]]:
    """Returns the pure function (params, batch, key) -> loss of each example with its mask given."""
    return _make_losses(config, mask_dropout=0.0)
