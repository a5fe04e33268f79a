"""Checks and converts the arguments of calls of the pipeline, so that each wrong one gets an error that names it."""

import math
import os
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key
from PIL import Image, ImageOps

from sisma_jax.data.photo_files import read_photo
from sisma_jax.errors import InputError

Photograph = np.ndarray | Image.Image | str | os.PathLike[str]
"""A photograph in any form that `as_photo` takes."""

Output = Literal["array", "pil"]
"""The form of results: arrays, or lists of PIL images."""

# Those of 8 bits that have one conversion to RGB; 16 bits would be clipped.
_PHOTO_MODES = ("L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")

# Words of the data of a legacy key, by which its implementation is known.
_LEGACY_IMPLEMENTATIONS = {2: "threefry2x32", 4: "rbg"}


def whole_number(value: Any, name: str, *, least: int) -> int:
    """Returns a number without fraction as an int.

    Args:
      value: an int, or a number of another type without fraction, such as `np.int64(2)` or 2.0.
      name: of the argument, for the message.
      least: smallest value allowed.

    Raises:
      InputError: the value is no whole number, or too small.
    """
    is_whole = isinstance(value, int | np.integer) or (isinstance(value, float | np.floating) and value % 1 == 0)
    if not is_whole or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    return int(value)


def finite_number(value: Any, name: str) -> float:
    """Returns a non-negative, finite number as a float.

    Args:
      value: a number.
      name: of the argument, for the message.

    Raises:
      InputError: the value is no such number.
    """
    if not isinstance(value, int | float | np.number) or not math.isfinite(value) or value < 0:
        raise InputError(f"{name} must be a non-negative number, got {value!r}.")
    return float(value)


def as_photo(value: Photograph, name: str) -> np.ndarray:
    """Returns a photograph that a caller gives: uint8 or uint16 (H, W, 3), RGB, as it is to be seen.

    Args:
      value: uint8 or uint16 (H, W, 3), RGB; a PIL image, without its transparency; or the path of a file, as for
        `read_photo`.
      name: of the argument, for the message.

    Raises:
      InputError: the value has another dtype or shape, or no pixels; or the file cannot be read.
    """
    if isinstance(value, str | os.PathLike):
        return read_photo(value).pixels
    if isinstance(value, Image.Image):
        if value.mode not in _PHOTO_MODES:
            modes = ", ".join(_PHOTO_MODES)
            raise InputError(f"{name} is a PIL image of mode {value.mode}; convert it to one of the modes {modes}.")
        # A file may say how its image is to be turned.
        value = np.asarray(ImageOps.exif_transpose(value).convert("RGB"))
    photo = np.asarray(value)
    if photo.dtype not in (np.uint8, np.uint16) or photo.ndim != 3 or photo.shape[2] != 3 or photo.size == 0:
        raise InputError(f"{name} must be uint8 or uint16 (H, W, 3), got {photo.dtype} {photo.shape}.")
    return photo


def is_pil(output: Any) -> bool:
    """Returns whether a caller wants PIL images.

    Args:
      output: "array" or "pil".

    Raises:
      InputError: the value is another one.
    """
    if output not in ("array", "pil"):
        raise InputError(f"output must be 'array' or 'pil', got {output!r}.")
    return output == "pil"


def random_keys(key: Any, total: int) -> Key[Array, " N"]:
    """Returns one key per face.

    Args:
      key: one key, from which a key per face is folded, or an array of `total` keys; new-style keys (`jax.random.key`)
        or legacy ones (`jax.random.PRNGKey`).
      total: number of faces.

    Raises:
      InputError: `key` is no key, or the number of keys is wrong.
    """
    is_array = isinstance(key, jax.Array | np.ndarray)
    if is_array and key.dtype == np.uint32 and key.ndim in (1, 2) and key.shape[-1] in _LEGACY_IMPLEMENTATIONS:
        key = jax.random.wrap_key_data(jnp.asarray(key), impl=_LEGACY_IMPLEMENTATIONS[key.shape[-1]])
    elif not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise InputError(f"key must be a key such as jax.random.key(0), got {key!r}.")
    keys: jax.Array = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, np.arange(total)) if key.ndim == 0 else key
    if keys.shape != (total,):
        raise InputError(f"key has shape {key.shape}; give one key, or {total} keys, one for each face.")
    return keys
