"""Keeps compiled programs on the disk, so that a run that starts again does not compile again."""

import os.path

import jax

NONE = "none"


def enable(folder: str = "") -> None:
    """Turns the cache on.

    Args:
      folder: where it is, on a disk or in a bucket; "none": nowhere. If empty, where JAX has it already (by the
        environment's JAX_COMPILATION_CACHE_DIR), or else ~/.cache/sisma_jax.
    """
    if folder == NONE:
        jax.config.update("jax_compilation_cache_dir", None)
    elif folder or jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder or "~/.cache/sisma_jax"))
