"""Curves and closed contours as float arrays of points (P, 2), with x to the right and y down."""

import functools
from collections.abc import Sequence

import numpy as np


def polyline(x: np.ndarray | Sequence[float], y: np.ndarray | Sequence[float]) -> np.ndarray:
    """Returns the points (P, 2) with the coordinates x (P,) and y (P,)."""
    joined = np.empty((len(x), 2))
    joined[:, 0], joined[:, 1] = x, y
    return joined


def moved(contour: np.ndarray, x: float, y: float) -> np.ndarray:
    """Returns a contour translated to the right by x and down by y."""
    return contour + np.array([x, y])


def mirrored(contour: np.ndarray, side: int) -> np.ndarray:
    """Returns a contour unchanged if `side` is +1, or mirrored about x = 0 if `side` is -1."""
    return contour * np.array([side, 1])


def symmetric(half: np.ndarray) -> np.ndarray:
    """Returns half a line joined with its mirror image about x = 0, (2 P - 1, C).

    Args:
      half: points (P, C) with x first; the last point is on the axis and is not repeated.
    """
    mirror = half[-2::-1].copy()
    mirror[:, 0] *= -1
    return np.concatenate([half, mirror])


def between(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Returns the closed contour between two lines with the same direction, `upper` (P, 2) and `lower` (Q, 2)."""
    return np.concatenate([upper, lower[::-1]])


def scaled(contour: np.ndarray, x: float, y: float) -> np.ndarray:
    """Returns a contour scaled by the factors x and y about the mean of its points."""
    middle = contour.mean(0)
    return middle + (contour - middle) * np.array([x, y])


def spline(knots: np.ndarray, closed: bool = False, steps: int = 6) -> np.ndarray:
    """Returns samples (Q, C) of a Catmull-Rom spline through knots.

    Args:
      knots: points (P, C) on the curve.
      closed: whether a segment joins the last knot to the first.
      steps: number of samples per segment.
    """
    if closed:
        padded = np.concatenate([knots[-1:], knots, knots[:2]])
    else:
        padded = np.concatenate([2 * knots[:1] - knots[1:2], knots, 2 * knots[-1:] - knots[-2:-1]])
    weights, segments = _catmull_rom(steps), len(padded) - 3
    terms = (weights[i][None, :, None] * padded[i : i + segments, None, :] for i in range(4))
    curve = sum(terms, start=np.zeros(())).reshape(-1, knots.shape[1])
    return curve if closed else np.concatenate([curve, knots[-1:]])


@functools.cache
def _catmull_rom(steps: int) -> np.ndarray:
    t = np.arange(steps) / steps
    return np.array([-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2]) / 2


def stroke(line: np.ndarray, widths: np.ndarray | float) -> np.ndarray:
    """Returns the contour of a line (P, 2) that is drawn with a width, which may vary along the line.

    Args:
      line: points (P, 2).
      widths: width at each point, (P,), or one width.
    """
    offset = normals(line) * (np.reshape(widths, (-1, 1)) * 0.5)
    return between(line + offset, line - offset)


def normals(line: np.ndarray) -> np.ndarray:
    """Returns the unit normals (P, 2) of a line (P, 2), which point to the left of its direction as displayed."""
    normal = np.empty_like(line)
    normal[1:-1] = (line[2:] - line[:-2])[:, ::-1]
    normal[0], normal[-1] = (line[1] - line[0])[::-1], (line[-1] - line[-2])[::-1]
    normal[:, 1] *= -1
    return normal / (np.sqrt(normal[:, :1] ** 2 + normal[:, 1:] ** 2) + 1e-9)


def grown(contour: np.ndarray, by: float) -> np.ndarray:
    """Returns a closed contour whose edge is moved outwards by the distance `by`."""
    x, y = contour[:, 0], contour[:, 1]
    clockwise = 1 if x @ np.roll(y, -1) > y @ np.roll(x, -1) else -1
    closed = np.concatenate([contour[-1:], contour, contour[:1]])
    return contour + normals(closed)[1:-1] * (clockwise * by)


def ellipse(center: np.ndarray, radii: tuple[float, float], angle: float = 0.0, count: int = 24) -> np.ndarray:
    """Returns the closed contour of an ellipse, (count, 2).

    Args:
      center: point (2,).
      radii: semi-axes in x and y before the rotation.
      angle: clockwise rotation as displayed, in radians.
      count: number of points.
    """
    x, y = radii[0] * _circle(count)[0], radii[1] * _circle(count)[1]
    cos, sin = np.cos(angle), np.sin(angle)
    return polyline(x * cos - y * sin, x * sin + y * cos) + center


@functools.cache
def _circle(count: int) -> np.ndarray:
    turn = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.array([np.cos(turn), np.sin(turn)])
