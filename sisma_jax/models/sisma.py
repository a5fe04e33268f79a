"""The layer parts of SISMA (arXiv 2509.17651): Self-Mamba mixes the tokens, and Cross-Mamba reads the mask."""

import jax.numpy as jnp
from flax import nnx

from sisma_jax.config import ModelConfig
from sisma_jax.models.layers import LayerParts
from sisma_jax.models.mamba import CrossMamba, MixerSizes, SelfMamba, SkippingSelfMamba


def _mixer(config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> SelfMamba:
    mixer = SkippingSelfMamba if config.mixer_skip else SelfMamba
    return mixer(config.d_model, **_sizes(config), dtype=dtype, rngs=rngs)


def _cross_reader(config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> CrossMamba:
    return CrossMamba(config.d_model, wiring=config.cross_wiring, **_sizes(config), dtype=dtype, rngs=rngs)


def _sizes(config: ModelConfig) -> MixerSizes:
    return {
        "d_state": config.d_state,
        "expand": config.expand,
        "d_conv": config.d_conv,
        "num_orders": config.orders_per_layer,
        "ssd_head": config.d_head if config.mixer == "ssd" else None,
        "scan_implementation": None if config.scan_implementation == "auto" else config.scan_implementation,
    }


PARTS = LayerParts(mixer=_mixer, cross_reader=_cross_reader)
