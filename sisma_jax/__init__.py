"""Semantic face image synthesis with Mamba (SISMA, arXiv 2509.17651), in JAX."""

from typing import TYPE_CHECKING, Any

from sisma_jax.errors import InputError

if TYPE_CHECKING:
    from sisma_jax.pipeline import Pipeline, load

__all__ = ["InputError", "Pipeline", "load"]


def __getattr__(name: str) -> Any:
    """Imports the pipeline, and with it JAX, only when it is asked for: data preparation needs neither."""
    if name in ("Pipeline", "load"):
        from sisma_jax import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
