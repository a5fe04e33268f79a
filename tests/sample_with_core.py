"""Samples from an exported file, as `make core-check` and a test do with nothing but the core installed.

    python -I tests/sample_with_core.py FILE

It is run with -I, so that only the installed package can be imported. Prints the seconds that importing takes.
"""

import importlib.util
import logging
import sys
import time

# What only training needs. Flax depends on Orbax, so that it is installed with the core; it must not be imported.
TRAINING = (
    "array_record",
    "grain",
    "matplotlib",
    "orbax",
    "tensorboardX",
    "tensorflow",
    "tensorflow_datasets",
    "tqdm",
    "tyro",
)


def main(file: str) -> None:
    """Raises AssertionError, or what the package raises, unless the core alone is enough."""
    sys.modules.update(dict.fromkeys(TRAINING))  # importing one of them raises ModuleNotFoundError
    handlers, level = list(logging.root.handlers), logging.root.level
    start = time.perf_counter()
    import jax

    after_jax = time.perf_counter()
    import sisma_jax

    pipe = sisma_jax.load  # imports the pipeline
    imported = time.perf_counter()
    assert importlib.util.find_spec("kernels") is None, "the package left a top-level module named kernels"
    assert (list(logging.root.handlers), logging.root.level) == (handlers, level), "importing changed global logging"

    import numpy as np

    from sisma_jax.kernels import selective_scan

    assert selective_scan.__module__.startswith("sisma_jax.kernels")
    size = 16
    mask = np.zeros((size, size), np.uint8)
    mask[4:12, 4:12] = 1
    faces = pipe(file)(mask, key=jax.random.key(0), num_samples=2)
    assert faces.shape == (2, size, size, 3), faces.shape
    assert faces.dtype == np.uint8
    assert not set(TRAINING) & {name for name, module in sys.modules.items() if module is not None}
    print(f"sampled {faces.shape}; imports: jax {after_jax - start:.1f} s, sisma_jax {imported - after_jax:.1f} s more")


if __name__ == "__main__":
    main(sys.argv[1])
