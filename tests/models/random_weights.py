"""Weights for comparisons with other implementations, which are made anew from names and shapes wherever needed."""

import zlib
from collections.abc import Mapping

import numpy as np


def random_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Returns float32 arrays that keep the scale of activations, with statistics for batch normalisation.

    Args:
      shapes: by PyTorch's names. Counters of batches are left out.
    """
    weights = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if len(shape) > 1:
            weights[name] = rng.normal(size=shape) * np.sqrt(1.5 / np.prod(shape[1:]))
        elif name.endswith(("running_var", "weight")):
            weights[name] = rng.uniform(0.5, 1.5, shape)
        elif not name.endswith("num_batches_tracked"):
            weights[name] = rng.normal(size=shape) * 0.1
    return {name: array.astype(np.float32) for name, array in weights.items()}
