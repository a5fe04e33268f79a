"""Resizes images as the reference implementations of the Fréchet Inception distance do.

The method matters: the same images give visibly different distances (Parmar et al., arXiv 2104.11222). All methods are
linear and separable, except that Pillow's values are clipped. So each is a matrix per axis, computed here in NumPy.
"""

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from sisma_jax.errors import InputError

Resize = Literal["pytorch-fid", "torch-fidelity", "clean-fid"]
"""The package whose resizing and normalisation are reproduced."""

# The parameter a of the cubic kernel in Pillow (Keys, 1981).
_CUBIC = -0.5


def check_resize(name: str) -> None:
    """Checks the name of a method.

    Args:
      name: one of `Resize`.

    Raises:
      InputError: there is no such method.
    """
    if name not in get_args(Resize):
        raise InputError(f"resize is {name!r}, want one of {', '.join(get_args(Resize))}.")


def resize_for_inception(images: UInt8[Array, "B H W 3"], resize: Resize, size: int = 299) -> Float[Array, "B S S 3"]:
    """Returns the images as the FID Inception network receives them, float32 in about [-1, 1].

    - "pytorch-fid": bilinear between pixel centres without antialiasing, then 2 x / 255 - 1.
    - "torch-fidelity": bilinear as in TensorFlow 1, which aligns the top left corners of the pixels, without
      antialiasing, then (x - 128) / 128.
    - "clean-fid": bicubic with antialiasing as in Pillow, clipped but not rounded to integers, then (x - 128) / 128.

    Args:
      images: uint8, RGB.
      resize: the method.
      size: height and width of the result, S.
    """
    pixels = images.astype(jnp.float32)
    if resize == "pytorch-fid":
        return 2 * _apply(pixels / 255, bilinear_matrix, size) - 1
    if resize == "torch-fidelity":
        return (_apply(pixels, tensorflow1_matrix, size) - 128) / 128
    return (bicubic(images, size) - 128) / 128


def bicubic(images: UInt8[Array, "B H W 3"], size: int) -> Float[Array, "B S S 3"]:
    """Returns the images resized as by Pillow's bicubic filter on float32 channels, clipped to [0, 255], not rounded.

    Args:
      images: uint8.
      size: height and width of the result, S.
    """
    return jnp.clip(_apply(images.astype(jnp.float32), bicubic_matrix, size), 0, 255)


def _apply(
    pixels: Float[Array, "B H W 3"], matrix: Callable[[int, int], np.ndarray], size: int
) -> Float[Array, "B S S 3"]:
    _, height, width, _ = pixels.shape
    # The default precision of a TPU or GPU would round the pixels to bfloat16 or TF32.
    precision = jax.lax.Precision.HIGHEST
    rows = jnp.einsum("sw,bhwc->bhsc", matrix(width, size), pixels, precision=precision)
    return jnp.einsum("sh,bhwc->bswc", matrix(height, size), rows, precision=precision)


def bilinear_matrix(length: int, size: int) -> np.ndarray:
    """Returns the matrix (size, length) of bilinear interpolation between pixel centres, without antialiasing.

    Positions are rounded to float32, as PyTorch's `interpolate(align_corners=False)` does.

    Args:
      length: pixels of the image along the axis.
      size: pixels of the result.
    """
    step = np.float32(length) / np.float32(size)
    positions = step * (np.arange(size, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    return _linear(np.maximum(positions, 0), length)


def tensorflow1_matrix(length: int, size: int) -> np.ndarray:
    """Returns the matrix (size, length) of bilinear interpolation in TensorFlow 1, without half-pixel centres.

    Args:
      length: pixels of the image along the axis.
      size: pixels of the result.
    """
    return _linear(np.arange(size, dtype=np.float32) * np.float32(length / size), length)


def _linear(positions: np.ndarray, length: int) -> np.ndarray:
    """Returns the matrix that interpolates linearly at the positions; beyond the last pixel, it repeats that pixel."""
    low = np.minimum(positions.astype(np.int64), length - 1)
    high = np.minimum(low + 1, length - 1)
    fraction = positions - low.astype(np.float32)
    rows = np.arange(len(positions))
    matrix = np.zeros((len(positions), length), np.float32)
    np.add.at(matrix, (rows, low), 1 - fraction)
    np.add.at(matrix, (rows, high), fraction)
    return matrix


def bicubic_matrix(length: int, size: int) -> np.ndarray:
    """Returns the matrix (size, length) of bicubic resizing with antialiasing, as Pillow does.

    If the image shrinks, the kernel is stretched by the same factor. At the borders the kernel is cut off, and its
    weights are divided by their sum.

    Args:
      length: pixels of the image along the axis.
      size: pixels of the result.
    """
    step = length / size
    stretch = max(step, 1.0)
    centres = (np.arange(size)[:, None] + 0.5) * step
    distance = np.abs(np.arange(length)[None, :] + 0.5 - centres) / stretch
    near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
    far = _CUBIC * (((distance - 5) * distance + 8) * distance - 4)
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
