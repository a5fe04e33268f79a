"""Random weights and images that the scripts here and the tests both make, so that no file has to hold them.

They need NumPy alone, and only the uniform generator, whose stream has never changed between NumPy's versions.
"""

import zlib

import numpy as np


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers with mean 0 and variance 1 that depend on the name only."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return ((rng.random(shape) - 0.5) * np.sqrt(12)).astype(np.float32)


def random_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight by its name in PyTorch, of a size that keeps the variance of the activations through all layers."""
    noise = uniform(name, shape)
    if name.endswith("running_var"):
        return np.exp(0.3 * noise)
    if name.startswith("lin"):  # the heads of LPIPS are not negative
        return np.abs(noise)
    if len(shape) > 1:
        return noise * np.float32(np.sqrt(2 / np.prod(shape[1:])))
    return ("bn" in name and name.endswith("weight")) + 0.2 * noise


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    return {name: random_weight(name, tuple(shape)) for name, shape in shapes.items()}


def random_images(name: str, count: int, height: int, width: int) -> np.ndarray:
    """uint8 RGB images (count, height, width, 3) of blocks of 8x8 pixels, slopes and noise."""
    blocks = uniform(f"{name} blocks", (count, -(-height // 8), -(-width // 8), 3)).repeat(8, 1).repeat(8, 2)
    slopes = uniform(f"{name} slopes", (count, 1, 1, 3)) * np.linspace(-1, 1, width)[None, None, :, None]
    noise = uniform(f"{name} noise", (count, height, width, 3))
    return np.clip(127.5 + 45 * blocks[:, :height, :width] + 40 * slopes + 15 * noise, 0, 255).astype(np.uint8)
