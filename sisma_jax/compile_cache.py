"""JAX's persistent compilation cache: a run that restarts does not compile its programs again."""

import os.path

import jax

NONE = "none"


def enable(folder: str = "") -> None:
    """Turns the cache on, or off.

    Args:
      folder: folder of the cache, on a disk or in a bucket. "none" turns the cache off. If empty, the cache is where
        the environment variable JAX_COMPILATION_CACHE_DIR says, or else in ~/.cache/sisma_jax.
    """
    if folder == NONE:
        jax.config.update("jax_compilation_cache_dir", None)
    elif folder or _is_unset():
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder or "~/.cache/sisma_jax"))


def _is_unset() -> bool:
    options = jax.config
    return options.jax_compilation_cache_dir is None  # pyright: ignore[reportAttributeAccessIssue] set at run time
