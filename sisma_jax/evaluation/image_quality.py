"""Similarity of two images pixel by pixel: PSNR, and SSIM (Wang et al., IEEE TIP 13(4), 2004).

They measure reconstructions, such as those of the autoencoder or of an edit outside its region. They do not measure
samples: many faces that differ from a photograph fit its mask equally well.
"""

from collections.abc import Iterator

import cv2
import numpy as np

from sisma_jax.errors import InputError

_RANGE = 255.0
_MOST_DECIBELS = 100.0
# The constants of the paper. Its window of 11 pixels holds 3.5 standard deviations of 1.5 pixels.
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * _RANGE) ** 2, (0.03 * _RANGE) ** 2


def psnr(images: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Returns the peak signal-to-noise ratio of each image in dB, float64 (N,).

    10 log10(255^2 / MSE), with the mean over pixels and channels; at most 100 dB, the value of an image that equals its
    original, so that the mean over images exists.

    Args:
      images: uint8 (N, H, W, C).
      originals: uint8 (N, H, W, C).

    Raises:
      ValueError: the shapes differ or are wrong, or a dtype is not uint8.
    """
    _check(images, originals)
    with np.errstate(divide="ignore"):
        ratios = _RANGE**2 / np.array([_mean_squared_error(*pair) for pair in _pairs(images, originals)])
        return np.minimum(10 * np.log10(ratios), _MOST_DECIBELS)


def _mean_squared_error(image: np.ndarray, original: np.ndarray) -> float:
    return float(np.mean((image - original) ** 2))


def ssim(images: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Returns the structural similarity of each image, float64 (N,), in [-1, 1]; 1 for an image equal to its original.

    The window is a Gaussian of 11 x 11 pixels with a standard deviation of 1.5 pixels. The result is the mean over the
    channels and over the windows that lie inside of the image. Equal to scikit-image's `structural_similarity` with
    gaussian_weights=True, use_sample_covariance=False, data_range=255 and channel_axis=-1.

    Args:
      images: uint8 (N, H, W, C), H and W at least 11.
      originals: uint8 (N, H, W, C).

    Raises:
      ValueError: the shapes differ or are wrong, or a dtype is not uint8.
      InputError: the images are smaller than the window.
    """
    _check(images, originals)
    if min(images.shape[1:3]) < _WINDOW:
        height, width = images.shape[1:3]
        raise InputError(f"SSIM needs images of at least {_WINDOW} x {_WINDOW} pixels, got {height} x {width}.")
    return np.array([_ssim(*pair) for pair in _pairs(images, originals)], np.float64)


def _ssim(image: np.ndarray, original: np.ndarray) -> float:
    mean, original_mean = _smooth(image), _smooth(original)
    variance = _smooth(image * image) - mean**2
    original_variance = _smooth(original * original) - original_mean**2
    covariance = _smooth(image * original) - mean * original_mean
    luminance = (2 * mean * original_mean + _C1) / (mean**2 + original_mean**2 + _C1)
    structure = (2 * covariance + _C2) / (variance + original_variance + _C2)
    return float(np.mean(luminance * structure))


def _smooth(image: np.ndarray) -> np.ndarray:
    """Gaussian means of the windows that lie inside of the image, (H - 10, W - 10, C)."""
    reach = _WINDOW // 2
    means = cv2.GaussianBlur(image, (_WINDOW, _WINDOW), _SIGMA).reshape(image.shape)  # OpenCV drops a single channel
    return means[reach:-reach, reach:-reach]


def _check(images: np.ndarray, originals: np.ndarray) -> None:
    for name, array in (("images", images), ("originals", originals)):
        if array.dtype != np.uint8 or array.ndim != 4 or 0 in array.shape[1:]:
            raise ValueError(f"{name} must be uint8 (N, H, W, C), got {array.dtype} {array.shape}.")
    if images.shape != originals.shape:
        raise ValueError(f"images have shape {images.shape}, originals have {originals.shape}; they must be equal.")


def _pairs(images: np.ndarray, originals: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for image, original in zip(images, originals, strict=True):
        yield image.astype(np.float64), original.astype(np.float64)
