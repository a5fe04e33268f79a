"""Every test runs on CPU with eight virtual devices, shape annotations checked and silent rank promotion refused."""

import os
import tempfile

# Before JAX is imported: both are read once, when the backend starts.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

from jaxtyping import install_import_hook

install_import_hook(["kernels", "sisma_jax.diffusion", "sisma_jax.evaluation", "sisma_jax.models"], "beartype.beartype")

import hypothesis  # noqa: E402
import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# Many tests compile the same small program: once a session is enough.
_cache = tempfile.TemporaryDirectory(prefix="sisma_jax_compiled_")
jax.config.update("jax_compilation_cache_dir", _cache.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
# Compilation makes the first example of a property slow and says nothing of the property.
hypothesis.settings.register_profile("default", deadline=None, print_blob=True)
hypothesis.settings.load_profile("default")
