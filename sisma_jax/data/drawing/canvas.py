"""The surface that a portrait is painted on: an image and its label map, painted shape by shape.

Shapes are closed contours in unit coordinates (x right, y down, the picture is [0, 1]²), so a portrait does
not depend on the resolution of its canvas. Painting a shape that has a class writes the same pixels of the
label map, which is how the mask comes to be exact.

Colours come channels first, (3, rows, columns): NumPy then works along whole rows, several times as fast.
"""

import cv2
import numpy as np

from sisma_jax.data.classes import CELEBAMASK_HQ
from sisma_jax.data.drawing.contours import grown

# Fractional bits of the coordinates that OpenCV rasterises.
_SHIFT = 4
_ONE = 1 << _SHIFT
# OpenCV's antialiased fill reaches so many pixels beyond a contour. Canvases larger than the reference grow the contour
# instead, so that shapes are the same at all resolutions.
_EXCESS, _REFERENCE_SIDE = 0.7, 192

Color = np.ndarray | tuple[float, float, float]
Window = tuple[slice, slice]


class Canvas:
    """A float32 RGB image (3, side, side) in [0, 1] and a uint8 label map (side, side)."""

    def __init__(self, side: int):
        self.side = side
        self.image = np.zeros((3, side, side), np.float32)
        self.labels = np.zeros((side, side), np.uint8)

    def coverage(self, contour: np.ndarray, blur: float = 0.0) -> tuple[np.ndarray, Window]:
        """Returns the opacity of a filled contour and the window of the canvas that it covers.

        Args:
          contour: float (P, 2).
          blur: standard deviation of the edge's softness, in unit coordinates.

        Returns:
          float32 opacity in [0, 1] of the window's shape, and the window as (rows, columns).
        """
        if self.side > _REFERENCE_SIDE:
            contour = grown(contour, _EXCESS * (1 / _REFERENCE_SIDE - 1 / self.side))
        sigma = blur * self.side
        # Pixel centres lie at half-integer coordinates.
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
            # A narrower blur than this is lost when the canvas is reduced.
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
        """Lays `color` over a filled contour.

        Args:
          contour: as in `coverage`.
          color: RGB in [0, 1], one for the shape or one a pixel of the canvas (3, side, side).
          label: class that the shape's pixels take, by name; None leaves the label map alone.
          blur: as in `coverage`.
          opacity: of the shape's inside.
          within: float32 (side, side) that the shape's opacity is multiplied with, to clip it.
          light: float32 (3, side, side) that the colour is multiplied with.
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
        """Gives the pixels inside a contour a class and leaves their colour."""
        alpha, window = self.coverage(contour)
        self.labels[window][alpha > 0.5] = CELEBAMASK_HQ.index[label]

    def tint(self, contour: np.ndarray, factor: Color, *, blur: float = 0.0, within: np.ndarray | None = None) -> None:
        """Multiplies the image inside a contour by `factor`: a shadow."""
        alpha, window = self.coverage(contour, blur)
        if within is not None:
            alpha *= within[window]
        rows, columns = window
        self.image[:, rows, columns] *= 1 + alpha * (np.asarray(factor, np.float32) - 1)[:, None, None]

    def inside(self, contour: np.ndarray) -> np.ndarray:
        """Returns the opacity of a filled contour on the whole canvas, float32 (side, side)."""
        alpha, window = self.coverage(contour)
        whole = np.zeros((self.side, self.side), np.float32)
        whole[window] = alpha
        return whole

    def has(self, label: str) -> bool:
        """Whether any pixel has the class."""
        return bool((self.labels == CELEBAMASK_HQ.index[label]).any())

    def reduce(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the portrait at `size` pixels: box-filtered uint8 image, and the majority class as uint8 mask."""
        image = cv2.resize(cv2.merge(list(self.image)), (size, size), interpolation=cv2.INTER_AREA)
        image = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
        present = np.flatnonzero(np.bincount(self.labels.ravel(), minlength=len(CELEBAMASK_HQ)))
        votes = [
            cv2.resize((self.labels == index).view(np.uint8) * 252, (size, size), interpolation=cv2.INTER_AREA)
            for index in present
        ]
        return image, present.astype(np.uint8)[np.argmax(votes, axis=0)]


def spread(field: np.ndarray, side: int) -> np.ndarray:
    """Returns a coarse field over the picture, (rows, columns) or (C, rows, columns), on the canvas's pixels."""
    field = field.astype(np.float32, copy=False)
    channels = [field] if field.ndim == 2 else list(field)
    large = cv2.resize(cv2.merge(channels), (side, side), interpolation=cv2.INTER_LINEAR)
    return large if field.ndim == 2 else np.ascontiguousarray(np.moveaxis(large, -1, 0))
