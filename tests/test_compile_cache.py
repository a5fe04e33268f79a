"""Where compiled programs are kept."""

import jax
import pytest

from sisma_jax import compile_cache


@pytest.fixture(autouse=True)
def no_cache(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("HOME", str(tmp_path))
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_it_is_in_the_home_folder_unless_told_otherwise(tmp_path):
    compile_cache.enable()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / ".cache/sisma_jax")


def test_the_environments_folder_stays():
    jax.config.update("jax_compilation_cache_dir", "/somewhere")  # as JAX_COMPILATION_CACHE_DIR does
    compile_cache.enable()
    assert jax.config.jax_compilation_cache_dir == "/somewhere"
    compile_cache.enable("gs://bucket/compiled")
    assert jax.config.jax_compilation_cache_dir == "gs://bucket/compiled"
    compile_cache.enable("none")
    assert jax.config.jax_compilation_cache_dir is None
