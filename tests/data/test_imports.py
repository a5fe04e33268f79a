"""What importing the data package brings along."""

import pkgutil
import subprocess
import sys

import sisma_jax.data
from tests.processes import ROOT

MODULES = sorted(module.name for module in pkgutil.walk_packages(sisma_jax.data.__path__, "sisma_jax.data."))
# Grain imports JAX by itself where it is installed, and does without where it is not.
WITH_GRAIN = {"sisma_jax.data.dataset", "sisma_jax.data.latents"}
CORE = ("sisma_jax.data.classes", "sisma_jax.data.masks", "sisma_jax.data.photos")


def run(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def importing(modules, before: str = "") -> str:
    return f"import importlib, sys\n{before}\nfor name in {list(modules)!r}: importlib.import_module(name)\n"


def test_data_does_not_import_jax():
    assert set(MODULES) > WITH_GRAIN | set(CORE)
    run(importing(set(MODULES) - WITH_GRAIN) + "assert 'jax' not in sys.modules")


def test_data_needs_no_jax():
    run(importing(MODULES, "sys.modules['jax'] = None"))


def test_files_are_read_without_the_libraries_of_training():
    absent = (
        "jax",
        "tensorflow",
        "tensorflow_datasets",
        "grain",
        "array_record",
        "orbax",
        "tensorboardX",
        "matplotlib",
    )
    run(importing(CORE, "".join(f"sys.modules[{name!r}] = None\n" for name in absent)))
    run(importing(CORE) + f"assert not {set(absent)!r} & set(sys.modules)")
