"""From a configuration to the denoiser, split into what is static and what is trained."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from sisma_jax.config import Config
from sisma_jax.models.dit import Dit
from sisma_jax.models.sisma import Sisma

BACKBONES = {"sisma": Sisma, "dit": Dit}

Params = dict[str, Any]
"""Nested dictionaries of arrays, without Flax types."""


def _make(config: Config, key: Key[Array, ""]) -> Sisma:
    return BACKBONES[config.model.backbone](
        config.model,
        config.autoencoder.channels,
        config.autoencoder.downsampling,
        dtype=jnp.dtype(config.train.compute_dtype),
        rngs=nnx.Rngs(key),
    )


def graph_of(config: Config) -> nnx.GraphDef:
    """Returns the denoiser without its parameters: hashable, so it may be static under `jax.jit`.

    `nnx.merge(graph, params)` is the callable model.
    """
    return nnx.split(nnx.eval_shape(lambda: _make(config, jax.random.key(0))))[0]


def init_params(config: Config, key: Key[Array, ""]) -> Params:
    """Returns freshly initialised float32 parameters."""
    return nnx.to_pure_dict(nnx.split(_make(config, key))[1])
