"""Training objectives: random draws for a batch, and the loss of each example.

An objective has the methods `draw` and `losses`. `training/step.py` differentiates their composition. Each objective is
a class in this module.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from sisma_jax.config import Config
from sisma_jax.diffusion import flow
from sisma_jax.models import autoencoder
from sisma_jax.models.factory import Params, make_graph
from sisma_jax.parallel import sharding

Batch = dict[str, Any]
"""Keys: "image", uint8 (B, H, W, 3), or "moments", float16 (B, h, w, 2 C), mean and log variance of its latent; and the
conditions, "mask", uint8 (B, H, W)."""
Examples = dict[str, Any]
"""Inputs of a loss: the conditions of a batch and the random draws. The first axis of every array is the batch."""


class FlowMatching:
    """Flow matching: the mean squared error of the velocity at a random time (arXiv 2210.02747, 2209.03003).

    Args:
      config: configuration of the run, which gives the denoiser and the distribution of times.
    """

    def __init__(self, config: Config):
        self._config = config.flow
        self._graph = make_graph(config)

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

    def losses(self, params: Params, examples: Examples) -> Float[Array, " B"]:
        """Returns the loss of each example, float32.

        Args:
          params: parameters of the denoiser.
          examples: what `draw` returned.
        """
        model = nnx.merge(self._graph, params)
        x0, x1, t = examples["x0"], examples["x1"], examples["t"]
        condition = model.encode(examples, examples["is_dropped"])
        output = model(flow.interpolate(x0, x1, t), t, condition)
        return flow.loss_per_example(output, x0, x1, t, self._config.prediction)


def make_objective(config: Config) -> FlowMatching:
    """Returns the training objective of a configuration."""
    return FlowMatching(config)
