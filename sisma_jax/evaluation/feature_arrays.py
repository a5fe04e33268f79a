"""Checks the features of images, which are the input of the Fréchet distance, KID, precision and recall."""

import numpy as np

from sisma_jax.errors import InputError


def checked(features: np.ndarray, name: str, *, least: int = 0) -> np.ndarray:
    """Returns the features of images as float64, (N, D).

    Args:
      features: real numbers (N, D), one row per image.
      name: of the argument, for the message.
      least: smallest number of images.

    Raises:
      ValueError: the array has another shape, or does not contain real numbers.
      InputError: there are too few images, or a value is not finite.
    """
    features = np.asarray(features)
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"{name} must be (N, D), one row per image, got shape {features.shape}.")
    if features.dtype.kind not in "iuf" and features.dtype.name != "bfloat16":
        raise ValueError(f"{name} must contain real numbers, got {features.dtype}.")
    features = features.astype(np.float64, copy=False)
    if len(features) < least:
        raise InputError(f"{name} has {len(features)} images; at least {least} are necessary.")
    # The sum is finite unless a value is not, or the values are so large that every metric overflows.
    if not np.isfinite(features.sum()):
        row = int(np.argmin(np.isfinite(features).all(axis=1)))
        raise InputError(f"{name} has values that are not finite or too large, such as those of image {row}.")
    return features


def checked_pair(
    first: np.ndarray, second: np.ndarray, names: tuple[str, str], *, least: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the features of two sets of images, as `checked` does.

    Args:
      first: real numbers (N, D).
      second: real numbers (M, D).
      names: of the two arguments.
      least: smallest number of images of each set.

    Raises:
      ValueError: as `checked`, or D differs.
      InputError: as `checked`.
    """
    first, second = checked(first, names[0], least=least), checked(second, names[1], least=least)
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"{names[0]} has {first.shape[1]} dimensions, {names[1]} has {second.shape[1]}; "
            "take both from the same feature network."
        )
    return first, second
