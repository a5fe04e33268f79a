"""The surface that a portrait is painted on: an image and its label map, painted shape by shape.

Shapes are closed contours in unit coordinates (x right, y down, the picture is [0, 1]²), so a portrait does
not depend on the resolution of its canvas. Painting a shape that has a class writes the same pixels of the
label map, which is how the mask comes to be exact.
"""

import cv2
import numpy as np

from sisma_jax.data.labels import INDEX

# Fractional bits of the coordinates that OpenCV rasterises.
_SHIFT = 4

Color = np.ndarray | tuple[float, float, float]


class Canvas:
    """A float32 RGB image in [0, 1] and a uint8 label map, both `side` pixels square."""

    def __init__(self, side: int):
        self.side = side
        self.image = np.zeros((side, side, 3), np.float32)
        self.labels = np.zeros((side, side), np.uint8)

    def coverage(self, *contours: np.ndarray, blur: float = 0.0) -> tuple[np.ndarray, tuple[slice, slice]]:
        """Returns the opacity of filled contours and the window of the canvas that it covers.

        Args:
          contours: float (P, 2) each; an inner contour cuts a hole (even-odd rule).
          blur: standard deviation of the edge's softness, in unit coordinates.

        Returns:
          float32 opacity in [0, 1] of the window's shape, and the window as (rows, columns).
        """
        margin = 3.0 * blur + 1.5 / self.side
        low = np.min([contour.min(0) for contour in contours], axis=0) - margin
        high = np.max([contour.max(0) for contour in contours], axis=0) + margin
        left, top = np.clip(np.floor(low * self.side), 0, self.side).astype(int)
        right, bottom = np.clip(np.ceil(high * self.side), 0, self.side).astype(int)
        window = slice(top, bottom), slice(left, right)
        if right <= left or bottom <= top:
            return np.zeros((max(bottom - top, 0), max(right - left, 0)), np.float32), window
        filled = np.zeros((bottom - top, right - left), np.uint8)
        corner = np.array([left, top]) + 0.5
        fixed = [np.rint((c * self.side - corner) * (1 << _SHIFT)).astype(np.int32) for c in contours]
        cv2.fillPoly(filled, fixed, 255, cv2.LINE_AA, _SHIFT)
        if blur * self.side > 0.3:
            filled = cv2.GaussianBlur(filled, (0, 0), blur * self.side, borderType=cv2.BORDER_REPLICATE)
        return filled.astype(np.float32) * np.float32(1 / 255), window

    def paint(
        self,
        *contours: np.ndarray,
        color: Color,
        label: str | None = None,
        blur: float = 0.0,
        opacity: float = 1.0,
        within: np.ndarray | None = None,
    ) -> None:
        """Lays `color` over filled contours.

        Args:
          contours: as in `coverage`.
          color: RGB in [0, 1], one for the shape or one a pixel of the canvas.
          label: class that the shape's pixels take, by name; None leaves the label map alone.
          blur: as in `coverage`.
          opacity: of the shape's inside.
          within: float32 (side, side) that the shape's opacity is multiplied with, to clip it.
        """
        alpha, window = self.coverage(*contours, blur=blur)
        if not alpha.size:
            return
        if within is not None:
            alpha = alpha * within[window]
        self.blend(alpha * np.float32(opacity), window, color)
        if label is not None:
            self.labels[window][alpha > 0.5] = INDEX[label]

    def mark(self, *contours: np.ndarray, label: str) -> None:
        """Gives the pixels inside filled contours a class and leaves their colour."""
        alpha, window = self.coverage(*contours)
        self.labels[window][alpha > 0.5] = INDEX[label]

    def blend(self, alpha: np.ndarray, window: tuple[slice, slice], color: Color) -> None:
        """Lays `color` over a window with the given opacity."""
        color = np.asarray(color, np.float32)
        if color.ndim == 3:
            color = color[window]
        under = self.image[window]
        under += alpha[..., None] * (color - under)

    def tint(self, *contours: np.ndarray, factor: Color, blur: float = 0.0, within: np.ndarray | None = None) -> None:
        """Multiplies the image inside filled contours by `factor`: shadows, blush and glass."""
        alpha, window = self.coverage(*contours, blur=blur)
        if not alpha.size:
            return
        if within is not None:
            alpha = alpha * within[window]
        self.image[window] *= 1 + alpha[..., None] * (np.asarray(factor, np.float32) - 1)

    def full(self, *contours: np.ndarray, blur: float = 0.0) -> np.ndarray:
        """Returns the opacity of filled contours on the whole canvas, float32 (side, side)."""
        alpha, window = self.coverage(*contours, blur=blur)
        whole = np.zeros((self.side, self.side), np.float32)
        whole[window] = alpha
        return whole

    def reduce(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the portrait at `size` pixels: box-filtered uint8 image, and the majority class as uint8 mask."""
        image = cv2.resize(self.image, (size, size), interpolation=cv2.INTER_AREA)
        image = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
        present = np.flatnonzero(np.bincount(self.labels.ravel(), minlength=len(INDEX)))
        votes = [
            cv2.resize((self.labels == index).astype(np.uint8) * 252, (size, size), interpolation=cv2.INTER_AREA)
            for index in present
        ]
        return image, present.astype(np.uint8)[np.argmax(votes, axis=0)]


def spline(points: np.ndarray, closed: bool = False, steps: int = 8) -> np.ndarray:
    """Returns a Catmull-Rom curve through `points` (P, C), `steps` samples a segment."""
    points = np.asarray(points, np.float64)
    if closed:
        padded = np.concatenate([points[-1:], points, points[:2]])
    else:
        padded = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    segments = np.stack([padded[:-3], padded[1:-2], padded[2:-1], padded[3:]], axis=1)
    curve = np.einsum("ts,psc->ptc", _catmull_rom(steps), segments).reshape(-1, points.shape[1])
    return curve if closed else np.concatenate([curve, points[-1:]])


def _catmull_rom(steps: int) -> np.ndarray:
    t = np.arange(steps)[:, None] / steps
    return np.concatenate([-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2], 1) / 2


def stroke(points: np.ndarray, widths: np.ndarray | float) -> np.ndarray:
    """Returns the outline of a line of varying width along `points` (P, 2)."""
    offset = normals(points) * (np.broadcast_to(widths, len(points))[:, None] / 2)
    return np.concatenate([points + offset, (points - offset)[::-1]])


def normals(points: np.ndarray) -> np.ndarray:
    """Returns unit normals of a line (P, 2), to the left of its direction on screen."""
    tangent = np.gradient(points, axis=0)
    length = np.maximum(np.linalg.norm(tangent, axis=1, keepdims=True), 1e-9)
    return np.stack([tangent[:, 1], -tangent[:, 0]], axis=1) / length


def ellipse(center: np.ndarray, radii: tuple[float, float], angle: float = 0.0, points: int = 32) -> np.ndarray:
    """Returns an ellipse's contour; `angle` in radians turns it clockwise on screen."""
    turn = np.linspace(0, 2 * np.pi, points, endpoint=False)
    x, y = radii[0] * np.cos(turn), radii[1] * np.sin(turn)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.asarray(center) + np.stack([x * cos - y * sin, x * sin + y * cos], axis=1)


def smooth_noise(rng: np.random.Generator, cells: tuple[int, int], side: int) -> np.ndarray:
    """Returns smooth float32 noise (side, side), about unit variance, with (rows, columns) cells over the canvas."""
    grid = rng.standard_normal(cells).astype(np.float32)
    return cv2.resize(grid, (side, side), interpolation=cv2.INTER_CUBIC)
