"""A canvas: an image and its label map, to which shapes are drawn together.

A shape is a closed contour in unit coordinates: x to the right, y down, and the image is [0, 1]². A portrait therefore
does not depend on the resolution of its canvas. A shape that has a class changes the label map at the pixels that it
covers in the image, so the mask is exact.

Colour fields have the channels first, (3, rows, columns). NumPy then processes whole rows, which is several times
faster.
"""

import cv2
import numpy as np

from sisma_jax.data.classes import CELEBAMASK_HQ
from sisma_jax.data.drawing.contours import grown

# Fractional bits of the fixed-point coordinates that OpenCV rasterises.
_SHIFT = 4
_ONE = 1 << _SHIFT
# OpenCV's antialiased fill extends this many pixels beyond a contour. On canvases larger than the reference, the
# contour is enlarged to compensate, so that shapes are the same at all resolutions.
_EXCESS, _REFERENCE_SIDE = 0.7, 192

Color = np.ndarray | tuple[float, float, float]
Window = tuple[slice, slice]


class Canvas:
    """An RGB image and its label map, initially black and of class 0.

    Attributes:
      side: height and width in pixels.
      image: float32 RGB (3, side, side) in [0, 1].
      labels: uint8 class indices (side, side) of CelebAMask-HQ.
    """

    def __init__(self, side: int):
        self.side = side
        self.image = np.zeros((3, side, side), np.float32)
        self.labels = np.zeros((side, side), np.uint8)

    def coverage(self, contour: np.ndarray, blur: float = 0.0) -> tuple[np.ndarray, Window]:
        """Returns the opacity of a filled contour inside the smallest window that contains it.

        Args:
          contour: points (P, 2) in unit coordinates.
          blur: standard deviation of the Gaussian blur of the edge, in unit coordinates.

        Returns:
          The opacity, float32 (rows, columns) in [0, 1], and the window as slices of rows and columns of the canvas.
        """
        if self.side > _REFERENCE_SIDE:
            contour = grown(contour, _EXCESS * (1 / _REFERENCE_SIDE - 1 / self.side))
        sigma = blur * self.side
        # Pixel centres are at half-integer coordinates.
        fixed = np.floor((contour * self.side - 0.5) * _ONE + 0.5).astype(np.int32)
        left, top, width, height = cv2.boundingRect(fixed)
        margin = int(3 * sigma) + 1
        right = min(max(((left + width) >> _SHIFT) + 1 + margin, 0), self.side)
        bottom = min(max(((top + height) >> _SHIFT) + 1 + margin, 0), self.side)
        left = min(max((left >> _SHIFT) - margin, 0), right)
        top = min(max((top >> _SHIFT) - margin, 0), bottom)
        window = slice(top, bottom), slice(left, right)
        filled = np.zeros((bottom - top, right - left), np.uint8)
        if filled.size:
            cv2.fillPoly(filled, [fixed], 255, cv2.LINE_AA, _SHIFT, (-left * _ONE, -top * _ONE))
            # A narrower blur has no effect after the canvas is reduced.
            if sigma > 0.5:
                filled = cv2.GaussianBlur(filled, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
        return filled * np.float32(1 / 255), window

    def paint(
        self,
        contour: np.ndarray,
        color: Color,
        label: str | None = None,
        *,
        blur: float = 0.0,
        opacity: float = 1.0,
        within: np.ndarray | None = None,
        light: np.ndarray | None = None,
    ) -> None:
        """Blends a filled contour into the image, and sets its class in the label map.

        Args:
          contour: points (P, 2) in unit coordinates.
          color: RGB in [0, 1]: one colour (3,), or one per pixel of the canvas (3, side, side).
          label: name of the class of the pixels that the contour covers by more than half; None keeps the label map.
          blur: standard deviation of the Gaussian blur of the edge, in unit coordinates.
          opacity: opacity inside the contour, in [0, 1].
          within: float32 (side, side) in [0, 1], which multiplies the opacity to clip the contour.
          light: float32 (3, side, side), which multiplies the colour.
        """
        alpha, window = self.coverage(contour, blur)
        if within is not None:
            alpha *= within[window]
        rows, columns = window
        color = np.asarray(color, np.float32)
        color = color[:, rows, columns] if color.ndim == 3 else color[:, None, None]
        if light is not None:
            color = color * light[:, rows, columns]
        under = self.image[:, rows, columns]
        under += (alpha * np.float32(opacity)) * (color - under)
        if label is not None:
            self.labels[window][alpha > 0.5] = CELEBAMASK_HQ.index[label]

    def mark(self, contour: np.ndarray, label: str) -> None:
        """Sets the class of the pixels inside a contour, and keeps their colour.

        Args:
          contour: points (P, 2) in unit coordinates.
          label: name of the class.
        """
        alpha, window = self.coverage(contour)
        self.labels[window][alpha > 0.5] = CELEBAMASK_HQ.index[label]

    def tint(self, contour: np.ndarray, factor: Color, *, blur: float = 0.0, within: np.ndarray | None = None) -> None:
        """Multiplies the colours inside a contour by a factor, for example to draw a shadow.

        Args:
          contour: points (P, 2) in unit coordinates.
          factor: RGB factor (3,).
          blur: standard deviation of the Gaussian blur of the edge, in unit coordinates.
          within: float32 (side, side) in [0, 1], which multiplies the opacity to clip the contour.
        """
        alpha, window = self.coverage(contour, blur)
        if within is not None:
            alpha *= within[window]
        rows, columns = window
        self.image[:, rows, columns] *= 1 + alpha * (np.asarray(factor, np.float32) - 1)[:, None, None]

    def inside(self, contour: np.ndarray) -> np.ndarray:
        """Returns the opacity of a filled contour on the whole canvas, float32 (side, side) in [0, 1].

        Args:
          contour: points (P, 2) in unit coordinates.
        """
        alpha, window = self.coverage(contour)
        whole = np.zeros((self.side, self.side), np.float32)
        whole[window] = alpha
        return whole

    def has(self, label: str) -> bool:
        """Returns whether any pixel has the class that is named `label`."""
        return bool((self.labels == CELEBAMASK_HQ.index[label]).any())

    def reduce(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the image and the mask at a lower resolution.

        Args:
          size: height and width of the result in pixels; a divisor of `side`.

        Returns:
          The image, uint8 RGB (size, size, 3), box-filtered; and the mask, uint8 class indices (size, size), where each
          pixel has the majority class of the canvas pixels that it covers.
        """
        image = cv2.resize(cv2.merge(list(self.image)), (size, size), interpolation=cv2.INTER_AREA)
        image = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
        present = np.flatnonzero(np.bincount(self.labels.ravel(), minlength=len(CELEBAMASK_HQ)))
        votes = [
            cv2.resize((self.labels == index).view(np.uint8) * 252, (size, size), interpolation=cv2.INTER_AREA)
            for index in present
        ]
        return image, present.astype(np.uint8)[np.argmax(votes, axis=0)]


def spread(field: np.ndarray, side: int) -> np.ndarray:
    """Returns a coarse field over the image, interpolated linearly to the resolution of a canvas.

    Args:
      field: (rows, columns) or (C, rows, columns).
      side: height and width of the canvas in pixels.

    Returns:
      float32 (side, side) or (C, side, side).
    """
    field = field.astype(np.float32, copy=False)
    channels = [field] if field.ndim == 2 else list(field)
    large = cv2.resize(cv2.merge(channels), (side, side), interpolation=cv2.INTER_LINEAR)
    return large if field.ndim == 2 else np.ascontiguousarray(np.moveaxis(large, -1, 0))
