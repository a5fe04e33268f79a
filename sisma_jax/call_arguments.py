"""Checks and converts the arguments of calls of the pipeline, so that each wrong one gets an error that names it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from sisma_jax.errors import InputError

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


def as_photo(value: Any, name: str) -> np.ndarray:
    """Returns a photograph that a caller gives.

    Args:
      value: uint8 or uint16 (H, W, 3), RGB.
      name: of the argument, for the message.

    Raises:
      InputError: the value has another dtype or shape, or no pixels.
    """
    photo = np.asarray(value)
    if photo.dtype not in (np.uint8, np.uint16) or photo.ndim != 3 or photo.shape[2] != 3 or photo.size == 0:
        raise InputError(f"{name} must be uint8 or uint16 (H, W, 3), got {photo.dtype} {photo.shape}.")
    return photo


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
