"""Light on the face: a relief of head and features, and the light that a smooth surface of that shape reflects.

Everything here is smooth, so it is computed on one coarse grid in the head frame, whatever the picture's
resolution, and warped into the picture once.
"""

import cv2
import numpy as np

from sisma_jax.data.drawing.contours import polyline
from sisma_jax.data.drawing.geometry import EYE_U, HEAD_AXES, HEAD_CENTER_V, Geometry
from sisma_jax.data.drawing.parameters import Face, Light

Bell = tuple[float, float, float, float, float, float]

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

    def bells(self, bells: list[Bell]) -> np.ndarray:
        """Returns the sum of bell-shaped spots on the face, float32 (rows, columns).

        Args:
          bells: (amount, u, v, radius across, radius down, lift above the surface) each.
        """
        amount, u, v, across, down, lift = np.array(bells).T
        center = self._geometry.head_frame(self._geometry.on_face(polyline(u, v), lift))
        rows = np.exp(-(((self.y[:, None] - center[:, 1]) / down) ** 2)) * amount
        columns = np.exp(-(((self.x - center[:, :1]) / across[:, None]) ** 2))
        return (rows @ columns).astype(np.float32)

    def to_picture(self, field: np.ndarray, side: int) -> np.ndarray:
        """Warps a field (C, rows, columns) of the grid onto a canvas: (C, side, side)."""
        linear = self._geometry.linear * side
        corner = linear @ [_LEFT, _TOP] + self._geometry.shift * side - 0.5
        matrix = np.concatenate([linear * _CELL, corner[:, None]], axis=1)
        warped = cv2.warpAffine(cv2.merge(list(field)), matrix, (side, side), borderMode=cv2.BORDER_REPLICATE)
        return np.ascontiguousarray(np.moveaxis(warped, -1, 0))

    def _heights(self, face: Face) -> np.ndarray:
        smile, nose, mouth = max(face.mouth.smile, 0.0), face.nose, face.mouth
        eye, wide = EYE_U * face.eyes.spacing, nose.width
        bells = [
            (0.030, 0, mouth.height, 0.12, 0.085, 0),
            (0.008, 0, mouth.height - 0.012, 0.07, 0.014, 0),
            (0.013, 0, mouth.height + 0.020, 0.065, 0.018, 0),
            (-0.016, 0, mouth.height + 0.062, 0.07, 0.022, 0),
            (0.022, 0, mouth.height + 0.115, 0.06, 0.045, 0),
            (0.016, 0, -0.20, 0.16, 0.10, 0),
            (0.040 * nose.height, 0, nose.length - 0.034, 0.031 * wide, 0.027, 0.09),
        ]
        # The nose is a ridge that grows and widens downwards.
        for step in np.linspace(0, 1, 7):
            rise = 0.008 * nose.bridge + 0.018 * step * nose.height
            v = -0.01 + step * (nose.length - 0.045)
            bells.append((rise, 0, v, (0.021 + 0.011 * step) * wide, 0.03, 0.02 + 0.06 * step))
        for side in (-1, 1):
            bells += [
                (-0.026, side * eye * 0.86, -0.012, 0.066, 0.036, 0),
                (0.014, side * eye, 0.0, 0.040, 0.026, 0),
                (0.012, side * eye, -face.brows.height - 0.012, 0.09, 0.03, 0),
                (0.012 + 0.016 * smile, side * 0.150, 0.125, 0.075, 0.065, 0),
                (-0.003 - 0.009 * smile, side * 0.108, 0.215, 0.028, 0.045, 0),
                (0.020 * wide, side * 0.052 * wide, nose.length - 0.036, 0.020, 0.022, 0.03),
                (-0.012, side * 0.235, -0.09, 0.05, 0.09, 0),
            ]
        return self.bells(bells)

    def _normals(self) -> np.ndarray:
        """Unit normals (right, down, to the viewer), float32 (3, rows, columns)."""
        a, b, c = HEAD_AXES * [self._geometry.width, 1, 1]
        # The ellipsoid's silhouette stays about the same as it turns; only the features move over it.
        center = self._geometry.head_frame(np.array([[0.0, HEAD_CENTER_V, 0.0]]))[0]
        x, y = (self.x - center[0])[None, :] / a, (self.y - center[1])[:, None] / b
        z = np.sqrt(np.maximum(1 - x**2 - y**2, 0.06))
        slope_y, slope_x = np.gradient(self.height, _CELL)
        # The factor flattens the ellipsoid: a face is broader in front than one.
        return unit(0.62 * c / a * x / z - slope_x, 0.62 * c / b * y / z - slope_y, np.float32(1))


def unit(right: np.ndarray, down: np.ndarray, forward: np.ndarray) -> np.ndarray:
    """Returns vectors of the given components scaled to length 1, float32 (3, rows, columns)."""
    vectors = np.stack(np.broadcast_arrays(right, down, forward)).astype(np.float32)
    return vectors / np.sqrt((vectors**2).sum(0))


def irradiance(normal: np.ndarray, light: Light, wrap: float = 0.25) -> np.ndarray:
    """Returns the light that reaches a surface, RGB float32 (3, rows, columns), about 1 where it faces the light.

    Args:
      normal: float32 (3, rows, columns), unit length.
      light: its directions are the picture's.
      wrap: how far light bleeds past the terminator, as it does in skin and hair.
    """
    facing = np.clip((_along(normal, light.direction) + np.float32(wrap)) / np.float32(1 + wrap), 0, 1)
    # Light from the sky and the room comes from above rather than below.
    above = 1 - np.float32(0.22) * normal[1]
    key, ambient = light.contrast * light.key, (0.99 - 0.84 * light.contrast) * light.ambient
    return facing * per_channel(key) + above * per_channel(ambient)


def highlight(normal: np.ndarray, light: Light, sharpness: float) -> np.ndarray:
    """Returns the gleam of the light on a surface (Blinn's half vector), float32 (rows, columns) in [0, 1]."""
    half = light.direction + np.array([0.0, 0.0, 1.0])
    return np.clip(_along(normal, half / np.linalg.norm(half)), 0, 1) ** np.float32(sharpness)


def per_channel(color: np.ndarray) -> np.ndarray:
    """Returns a colour (3,) as float32 (3, 1, 1), to be combined with fields."""
    return color.astype(np.float32)[:, None, None]


def _along(normal: np.ndarray, direction: np.ndarray) -> np.ndarray:
    return np.tensordot(direction.astype(np.float32), normal, 1)
