"""Semantic face image synthesis with Mamba (SISMA, arXiv 2509.17651), in JAX."""

from sisma_jax.errors import InputError
from sisma_jax.pipeline import Pipeline, load

__all__ = ["InputError", "Pipeline", "load"]
