"""Every test runs on CPU with eight virtual devices, shape annotations checked and silent rank promotion refused."""

import contextlib
import logging
import os
import tempfile
from pathlib import Path

# Before JAX is imported: these are read once, when it or its backend starts.
os.environ["JAX_PLATFORMS"] = "cpu"
# XLA's optimisations take longer than they save; below is where they matter. Processes that tests start have this too.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
# Many tests compile the same small program: once a session is enough, in all processes that share it, those that tests
# start too. The first one makes the folder, and deletes it when it ends; the others have its environment.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="sisma_jax_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.02"

from jaxtyping import install_import_hook

install_import_hook(
    ["sisma_jax.kernels", "sisma_jax.diffusion", "sisma_jax.evaluation", "sisma_jax.models"], "beartype.beartype"
)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# Compilation makes the first example of a property slow and says nothing of the property.
hypothesis.settings.register_profile("default", deadline=None, print_blob=True)
hypothesis.settings.load_profile("default")


# One process runs all tests of a file, so the longest files come first.
_LONGEST = (
    *("test_faults.py", "test_docs.py", "test_cli.py", "test_evaluate.py", "test_loop.py", "test_own_classes.py"),
    *("test_pallas_tpu.py", "test_transforms.py"),
)
# The files of `make check`. Each takes a few seconds and tests a part that many changes touch.
_FAST = (
    "test_config.py",
    "test_docstrings.py",
    "test_files.py",
    "data/test_classes.py",
    "data/test_imports.py",
    "data/test_masks.py",
    "data/test_photos.py",
    "diffusion/test_editing.py",
    "diffusion/test_flow.py",
    "diffusion/test_guidance.py",
    "diffusion/test_solvers.py",
    "evaluation/test_charts.py",
    "evaluation/test_grids.py",
    "evaluation/test_mask_agreement.py",
    "evaluation/test_model_card.py",
    "evaluation/test_tables.py",
    "models/test_factory.py",
    "models/test_golden_mixer.py",
    "runs/test_export.py",
    "runs/test_folder.py",
    "runs/test_metrics.py",
)
_TESTS = Path(__file__).parent
assert all((_TESTS / name).is_file() for name in _FAST)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in _LONGEST)
    for item in items:
        if item.path.relative_to(_TESTS).as_posix() in _FAST and item.get_closest_marker("slow") is None:
            item.add_marker("fast")


# Where numbers, memory or speed depend on XLA's optimisations.
_OPTIMIZED_FOLDERS = ("kernels", "benchmarks", "planning")


@pytest.fixture(autouse=True, scope="module")
def _optimized_folder(request):
    jax.config.update("jax_disable_most_optimizations", request.path.parent.name not in _OPTIMIZED_FOLDERS)


@pytest.fixture(autouse=True)
def _optimized_test(request):
    """Marked so, a test runs what users run."""
    if request.node.get_closest_marker("optimized") is None:
        yield
        return
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@contextlib.contextmanager
def _logging_as_before():
    """A command that runs in this process configures logging, which no later test must see."""
    root, package = logging.getLogger(), logging.getLogger("sisma_jax")
    handlers, level, package_level = list(root.handlers), root.level, package.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        package.setLevel(package_level)


@pytest.fixture(autouse=True)
def _logging_of_its_own():
    with _logging_as_before():
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A configuration file, and the folder of the run that the whole job made of it; tests must not change it."""
    from sisma_jax import cli

    folder = tmp_path_factory.mktemp("finished")
    file = folder / "tiny.py"
    file.write_text(
        "from pathlib import Path\nfrom tests.tiny import tiny_config\n\n\n"
        f"def get_config():\n    return tiny_config(Path({str(folder / 'data')!r}))\n"
    )
    with _logging_as_before():
        cli.main(["--config", str(file), "--workdir", str(folder / "run")])
    return file, folder / "run"


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """An exported file of a tiny model with a face parser."""
    from tests.export_tiny import export_tiny

    file = tmp_path_factory.mktemp("exported") / "tiny.safetensors"
    export_tiny(file)
    return file


@pytest.fixture
def mask_file(tmp_path):
    """The file of a mask of 32 x 32 pixels."""
    from sisma_jax.data import photos
    from sisma_jax.data.drawing import draw_face

    path = tmp_path / "mask.png"
    path.write_bytes(photos.encode_png(draw_face(np.random.default_rng(3), 32)[1]))
    return path
