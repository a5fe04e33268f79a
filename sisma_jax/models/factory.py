"""Creates the denoiser of a configuration, as a module or as its graph definition and its parameters."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from sisma_jax.config import Config
from sisma_jax.models.denoiser import Denoiser
from sisma_jax.models.layers import LayerParts, Stack

# Up to this depth, `train.unroll_layers` is on by default on CPUs.
_MOST_UNROLLED_LAYERS = 8

Params = dict[str, Any]
"""Nested dictionaries of arrays, without Flax types."""


def layer_parts(backbone: str) -> LayerParts:
    """Returns the layer parts of a backbone: `PARTS` of the module `sisma_jax.models.<backbone>`.

    Args:
      backbone: a value of `ModelConfig.backbone`, "sisma" or "dit".
    """
    return importlib.import_module(f"sisma_jax.models.{backbone}").PARTS


def make_denoiser(config: Config, key: Key[Array, ""]) -> Denoiser:
    """Returns the denoiser with newly initialised float32 parameters.

    Raises:
      ValueError: the side of a token in image pixels is not a power of two.
      InputError: the backbone does not support the sizes.
    """
    return Denoiser(
        config.model,
        layer_parts(config.model.backbone),
        len(config.data.classes),
        config.autoencoder.channels,
        config.autoencoder.downsampling,
        is_mean_flow=config.flow.objective == "mean_flow",
        dtype=jnp.dtype(config.train.compute_dtype),
        rngs=nnx.Rngs(key),
    )


def make_graph(config: Config, *, is_differentiated: bool = False) -> nnx.GraphDef[Denoiser]:
    """Returns the graph definition of the denoiser, which is hashable and may be static under `jax.jit`.

    `nnx.merge(graph, params)` returns the callable model.

    Args:
      config: of the run.
      is_differentiated: whether the model is for gradients, so that `train.unroll_layers` applies.

    Raises:
      ValueError, InputError: as `make_denoiser`.
    """
    model = nnx.eval_shape(lambda: make_denoiser(config, jax.random.key(0)))
    if is_differentiated and _unrolls(config):
        for _, module in nnx.iter_graph(model):
            if isinstance(module, Stack):
                module.is_unrolled = True
    return nnx.split(model)[0]


def _unrolls(config: Config) -> bool:
    choice = config.train.unroll_layers
    if choice == "auto":
        # XLA:CPU copies the residuals of all layers in every iteration of a loop. It compiles 25 layers for minutes.
        num_layers = config.model.depth + 2 * sum(config.model.level_depths)
        return jax.default_backend() == "cpu" and num_layers <= _MOST_UNROLLED_LAYERS
    return choice == "on"


def init_params(config: Config, key: Key[Array, ""]) -> Params:
    """Returns newly initialised float32 parameters of the denoiser.

    Raises:
      ValueError, InputError: as `make_denoiser`.
    """
    return nnx.to_pure_dict(nnx.split(make_denoiser(config, key))[1])
