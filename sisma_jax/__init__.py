"""Semantic face image synthesis with Mamba (SISMA, arXiv 2509.17651), in JAX."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sisma_jax.errors import InputError

if TYPE_CHECKING:
    from sisma_jax.pipeline import Pipeline, load

__all__ = ["InputError", "Pipeline", "load"]

# `sisma_jax.kernels` is the folder `kernels/` at the top of the repository. A wheel contains its files, and a clone has
# a link to it. On a file system without links that is a text file; then the top of the repository is searched too.
_HERE = Path(__file__).parent
if not (_HERE / "kernels").is_dir():
    __path__.append(str(_HERE.parent))


def __getattr__(name: str) -> Any:
    """Imports the pipeline, and with it JAX, only on first use: data preparation needs neither."""
    if name in ("Pipeline", "load"):
        from sisma_jax import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
