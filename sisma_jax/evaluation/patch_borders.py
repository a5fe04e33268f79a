"""Visible patches: how much more neighbouring pixels differ across the borders of patches than inside of patches."""

import numpy as np


def border_ratio(images: np.ndarray, patch: int) -> np.ndarray:
    """Returns, for each image, the mean absolute difference of neighbours across borders over that inside of patches.

    The result is float64 (N,): 1 where no grid is visible, and more where patches do not fit together. An image without
    any difference has the ratio 1.

    Args:
      images: uint8 (N, H, W, C).
      patch: side of a patch in pixels, at least 2; the first patch begins at the first pixel.

    Raises:
      ValueError: the images have another form, or a side is not longer than a patch.
    """
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"images must be uint8 (N, H, W, C), got {images.dtype} {images.shape}.")
    if patch < 2 or min(images.shape[1:3]) <= patch:
        raise ValueError(f"patch must be 2 or more and less than the sides {images.shape[1:3]}, got {patch}.")
    across, inside = np.zeros((2, len(images)))
    num_across = num_inside = 0
    for axis in (1, 2):
        difference = np.abs(np.diff(images.astype(np.int16), axis=axis)).mean(
            axis=(3 - axis, 3)
        )  # (N, rows or columns)
        is_border = (np.arange(difference.shape[1]) + 1) % patch == 0
        across += difference[:, is_border].sum(axis=1)
        inside += difference[:, ~is_border].sum(axis=1)
        num_across += int(is_border.sum())
        num_inside += int((~is_border).sum())
    across, inside = across / num_across, inside / num_inside
    ratio = np.divide(across, inside, out=np.full(len(images), np.inf), where=inside > 0)
    return np.where((across == 0) & (inside == 0), 1.0, ratio)
