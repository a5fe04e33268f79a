"""Images inside of an HTML page: data URIs, so that the page is one file."""

import base64
import io

import cv2
import numpy as np

from sisma_jax.data import photos
from sisma_jax.data.classes import ClassSet
from sisma_jax.data.masks import palette_image

LARGEST_SIDE = 512
"""Larger images are shrunk to this side, since a page shows them smaller than that."""
LARGEST_EXACT_SIDE = 128
"""Images up to this side are stored without loss, since a page enlarges their pixels."""

_QUALITIES = (90, 75, 50, 25)
# Noise, as a model without training samples it, hardly shrinks, so it gets a lower quality. A page has at most about 90
# such images, which keeps it below 10 MB.
_MOST_BYTES = 80_000


def image_uri(image: np.ndarray) -> str:
    """Returns an image as a data URI: a PNG file up to 128 pixels, else a JPEG file of quality 90, or less for noise.

    Args:
      image: uint8 RGB (H, W, 3).
    """
    image = _shrink(image, cv2.INTER_AREA)
    if max(image.shape[:2]) <= LARGEST_EXACT_SIDE:
        return _uri("image/png", photos.encode_png(image))
    data = b""
    for quality in _QUALITIES:
        _, encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
        data = encoded.tobytes()
        if len(data) <= _MOST_BYTES:
            break
    return _uri("image/jpeg", data)


def mask_uri(mask: np.ndarray, classes: ClassSet) -> str:
    """Returns a mask in the colours of its classes as a data URI: a PNG file with a palette.

    Args:
      mask: uint8 (H, W), class indices or the ignored label.
      classes: of the mask.
    """
    buffer = io.BytesIO()
    palette_image(_shrink(mask, cv2.INTER_NEAREST), classes).save(buffer, "png", optimize=True)
    return _uri("image/png", buffer.getvalue())


def _shrink(array: np.ndarray, interpolation: int) -> np.ndarray:
    height, width = array.shape[:2]
    ratio = LARGEST_SIDE / max(height, width)
    if ratio >= 1:
        return array
    return cv2.resize(array, (round(width * ratio), round(height * ratio)), interpolation=interpolation)


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
