"""Light on the face: a relief of head and features, and the light that a smooth surface of that shape reflects.

Everything here is smooth, so it is computed on one coarse grid in the head frame, whatever the picture's
resolution, and warped into the picture once.
"""

import cv2
import numpy as np

from sisma_jax.data.drawing.geometry import EYE_U, HEAD_AXES, HEAD_CENTER_V, Geometry
from sisma_jax.data.drawing.parameters import Face, Light

# The grid's corner and cell in the head frame; it holds any head that the parameters allow.
_LEFT, _TOP, _CELL = -0.42, -0.50, 0.0085
_COLUMNS, _ROWS = 100, 124


class Relief:
    """Normals of the face on the grid, and the tools to place smooth spots there."""

    def __init__(self, face: Face, geometry: Geometry):
        self._geometry = geometry
        self.x = (_LEFT + _CELL * np.arange(_COLUMNS)).astype(np.float32)
        self.y = (_TOP + _CELL * np.arange(_ROWS)).astype(np.float32)
        self.height = self._heights(face)
        self.normal = self._normals()

    def spot(self, u: float, v: float, radii: tuple[float, float], lift: float = 0.0) -> np.ndarray:
        """Returns a bell of height 1 around a point of the face, float32 (rows, columns)."""
        (x, y), (rx, ry) = self._geometry.head_frame(self._geometry.on_face([[u, v]], lift))[0], radii
        return np.exp(-(((self.y - y) / ry) ** 2))[:, None] * np.exp(-(((self.x - x) / rx) ** 2))[None, :]

    def to_picture(self, field: np.ndarray, side: int) -> np.ndarray:
        """Warps a field (rows, columns, ...) of the grid onto a canvas of `side` pixels."""
        linear = self._geometry.linear * side
        corner = linear @ [_LEFT, _TOP] + self._geometry.shift * side - 0.5
        matrix = np.concatenate([linear * _CELL, corner[:, None]], axis=1)
        return cv2.warpAffine(field, matrix, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)

    def _heights(self, face: Face) -> np.ndarray:
        smile, nose = max(face.mouth.smile, 0.0), face.nose
        eye, mouth = EYE_U * face.eyes.spacing, face.mouth
        height = np.zeros((_ROWS, _COLUMNS), np.float32)
        for side in (-1, 1):
            height -= 0.030 * self.spot(side * eye * 0.86, -0.012, (0.066, 0.036))
            height += 0.014 * self.spot(side * eye, 0.0, (0.040, 0.026))
            height += 0.012 * self.spot(side * eye, -face.brows.height - 0.012, (0.09, 0.03))
            height += (0.012 + 0.016 * smile) * self.spot(side * 0.150, 0.125, (0.075, 0.065))
            height -= (0.004 + 0.010 * smile) * self.spot(side * 0.105, 0.215, (0.022, 0.045))
            height += 0.020 * nose.width * self.spot(side * 0.052 * nose.width, nose.length - 0.036, (0.020, 0.022), 0.03)
            height -= 0.012 * self.spot(side * 0.235, -0.09, (0.05, 0.09))
        height += 0.030 * self.spot(0, mouth.height, (0.12, 0.085))
        height += 0.008 * self.spot(0, mouth.height - 0.012, (0.07, 0.014))
        height += 0.013 * self.spot(0, mouth.height + 0.020, (0.065, 0.018))
        height -= 0.016 * self.spot(0, mouth.height + 0.062, (0.07, 0.022))
        height += 0.022 * self.spot(0, mouth.height + 0.115, (0.06, 0.045))
        height += 0.016 * self.spot(0, -0.20, (0.16, 0.10))
        # The nose: a ridge that grows and widens downwards, and its tip.
        for step in np.linspace(0, 1, 7):
            v = -0.01 + step * (nose.length - 0.045)
            width = (0.021 + 0.011 * step) * nose.width
            height += (0.008 * nose.bridge + 0.018 * step * nose.height) * self.spot(0, v, (width, 0.03), 0.02 + 0.06 * step)
        height += 0.040 * nose.height * self.spot(0, nose.length - 0.034, (0.031 * nose.width, 0.027), 0.09)
        return height

    def _normals(self) -> np.ndarray:
        """Unit normals (right, down, to the viewer), float32 (rows, columns, 3)."""
        a, b, c = HEAD_AXES * [self._geometry.width, 1, 1]
        # The ellipsoid's silhouette stays about the same as it turns; only the features move over it.
        center = self._geometry.head_frame(np.array([[0.0, HEAD_CENTER_V, 0.0]]))[0]
        x, y = (self.x - center[0])[None, :] / a, (self.y - center[1])[:, None] / b
        z = np.sqrt(np.maximum(1 - x**2 - y**2, 0.06))
        slope_y, slope_x = np.gradient(self.height, _CELL)
        nx, ny, nz = np.broadcast_arrays(x * c / a / z * 0.62, y * c / b / z * 0.62, np.float32(1))
        normal = np.stack([nx - slope_x, ny - slope_y, nz], axis=-1).astype(np.float32)
        return normal / np.linalg.norm(normal, axis=-1, keepdims=True)


def irradiance(normal: np.ndarray, light: Light, wrap: float = 0.25) -> np.ndarray:
    """Returns the light that reaches a surface, RGB float32 about 1 where it faces the light.

    Args:
      normal: float32 (..., 3), unit length.
      light: its directions are the picture's.
      wrap: how far light bleeds past the terminator, as it does in skin and hair.
    """
    facing = np.clip((normal @ light.direction.astype(np.float32) + wrap) / (1 + wrap), 0, 1)
    key = facing[..., None] * (light.contrast * light.key).astype(np.float32)
    # Light from the sky and the room comes from above rather than below.
    above = 1 - 0.22 * normal[..., 1:2]
    return (key + above * ((1.06 - 0.86 * light.contrast) * light.ambient).astype(np.float32)).astype(np.float32)


def highlight(normal: np.ndarray, light: Light, sharpness: float) -> np.ndarray:
    """Returns the gleam of the light on a surface (Blinn's half vector), float32 in [0, 1]."""
    half = light.direction + np.array([0.0, 0.0, 1.0])
    half = (half / np.linalg.norm(half)).astype(np.float32)
    return np.clip(normal @ half, 0, 1) ** np.float32(sharpness)
