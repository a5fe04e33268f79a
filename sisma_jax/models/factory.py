"""From a configuration to the denoiser, split into graph definition and parameters."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from sisma_jax.config import Config
from sisma_jax.models.denoiser import Denoiser
from sisma_jax.models.layers import LayerParts

Params = dict[str, Any]
"""Nested dictionaries of arrays, without Flax types."""


def layer_parts(backbone: str) -> LayerParts:
    """Returns a backbone's parts, which the module of its name here has as `PARTS`."""
    return importlib.import_module(f"sisma_jax.models.{backbone}").PARTS


def make_denoiser(config: Config, key: Key[Array, ""]) -> Denoiser:
    """Returns the denoiser with freshly initialised float32 parameters."""
    return Denoiser(
        config.model,
        layer_parts(config.model.backbone),
        len(config.data.classes),
        config.autoencoder.channels,
        config.autoencoder.downsampling,
        dtype=jnp.dtype(config.train.compute_dtype),
        rngs=nnx.Rngs(key),
    )


def make_graph(config: Config) -> nnx.GraphDef:
    """Returns the denoiser without its parameters: hashable, so it may be static under `jax.jit`.

    `nnx.merge(graph, params)` is the callable model.
    """
    return nnx.split(nnx.eval_shape(lambda: make_denoiser(config, jax.random.key(0))))[0]


def init_params(config: Config, key: Key[Array, ""]) -> Params:
    """Returns freshly initialised float32 parameters."""
    return nnx.to_pure_dict(nnx.split(make_denoiser(config, key))[1])
