"""Lights the face: a relief of head and features, and the shading of a smooth surface of this shape.

All fields are smooth. They are computed on one coarse grid in the head frame, independently of the resolution of the
image, and then warped into the image.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from sisma_jax.data.drawing.contours import polyline
from sisma_jax.data.drawing.geometry import EYE_U, HEAD_AXES, HEAD_CENTER_V, Geometry
from sisma_jax.data.drawing.parameters import Face, Light

Bell = tuple[float, float, float, float, float, float]

# Corner and cell size of the grid in the head frame. The grid contains every head that the parameters allow.
_LEFT, _TOP, _CELL = -0.42, -0.50, 0.0085
_COLUMNS, _ROWS = 100, 124


class Relief:
    """Heights and normals of one face on the grid.

    Attributes:
      x: float32 (columns,), x of the grid in the head frame.
      y: float32 (rows,), y of the grid in the head frame.
      height: float32 (rows, columns), height of the features above the ellipsoid of the head.
      normal: float32 (3, rows, columns), unit normals: (right, down, towards the viewer).
    """

    def __init__(self, face: Face, geometry: Geometry):
        self._geometry = geometry
        self.x = (_LEFT + _CELL * np.arange(_COLUMNS)).astype(np.float32)
        self.y = (_TOP + _CELL * np.arange(_ROWS)).astype(np.float32)
        self.height = self._heights(face)
        self.normal = self._normals()

    def bells(self, bells: Sequence[Bell]) -> np.ndarray:
        """Returns a sum of Gaussians on the face, float32 (rows, columns).

        Args:
          bells: (amplitude, u, v, horizontal radius, vertical radius, height above the surface) of each Gaussian. One
            radius from its centre, a Gaussian falls to 1/e of its amplitude.
        """
        amount, u, v, across, down, lift = np.array(bells).T
        center = self._geometry.head_frame(self._geometry.on_face(polyline(u, v), lift))
        rows = np.exp(-(((self.y[:, None] - center[:, 1]) / down) ** 2)) * amount
        columns = np.exp(-(((self.x - center[:, :1]) / across[:, None]) ** 2))
        return (rows @ columns).astype(np.float32)

    def to_picture(self, field: np.ndarray, side: int) -> np.ndarray:
        """Returns a field on the grid, warped into the image, float32 (C, side, side).

        Args:
          field: float32 (C, rows, columns).
          side: height and width of the canvas in pixels.
        """
        linear = self._geometry.linear * side
        corner = linear @ [_LEFT, _TOP] + self._geometry.shift * side - 0.5
        matrix = np.concatenate([linear * _CELL, corner[:, None]], axis=1)
        warped = cv2.warpAffine(cv2.merge(list(field)), matrix, (side, side), borderMode=cv2.BORDER_REPLICATE)
        return np.ascontiguousarray(np.moveaxis(warped, -1, 0))

    def _heights(self, face: Face) -> np.ndarray:
        smile, nose, mouth = max(face.mouth.smile, 0.0), face.nose, face.mouth
        eye, wide = EYE_U * face.eyes.spacing, nose.width
        bells: list[Bell] = [
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
        """Returns unit normals (right, down, towards the viewer), float32 (3, rows, columns)."""
        a, b, c = HEAD_AXES * [self._geometry.width, 1, 1]
        # The silhouette of the ellipsoid hardly changes as the head rotates; only the features move.
        center = self._geometry.head_frame(np.array([[0.0, HEAD_CENTER_V, 0.0]]))[0]
        x, y = (self.x - center[0])[None, :] / a, (self.y - center[1])[:, None] / b
        z = np.sqrt(np.maximum(1 - x**2 - y**2, 0.06))
        slope_y, slope_x = np.gradient(self.height, _CELL)
        # The factor 0.62 flattens the ellipsoid, because the front of a face is flatter.
        return unit(0.62 * c / a * x / z - slope_x, 0.62 * c / b * y / z - slope_y, np.float32(1))


def unit(right: np.ndarray, down: np.ndarray, forward: np.ndarray | np.float32) -> np.ndarray:
    """Returns the unit vectors with the direction of the given components, float32 (3, rows, columns).

    Args:
      right: components to the right, of a shape that broadcasts to (rows, columns), as are the others.
      down: components down.
      forward: components towards the viewer.
    """
    vectors = np.stack(np.broadcast_arrays(right, down, forward)).astype(np.float32)
    return vectors / np.sqrt((vectors**2).sum(0))


def irradiance(normal: np.ndarray, light: Light, wrap: float = 0.25) -> np.ndarray:
    """Returns the light that a surface receives, float32 RGB (3, rows, columns), about 1 where it faces the light.

    The key light is diffuse with wrapped cosine: max((n · l + wrap) / (1 + wrap), 0).

    Args:
      normal: unit normals, float32 (3, rows, columns).
      light: key light and ambient light.
      wrap: how far the light reaches past the terminator, because of scattering in skin and hair; 0 is Lambertian.
    """
    facing = np.clip((_along(normal, light.direction) + np.float32(wrap)) / np.float32(1 + wrap), 0, 1)
    # Ambient light from the sky or the room is stronger from above.
    above = 1 - np.float32(0.22) * normal[1]
    key, ambient = light.contrast * light.key, (0.99 - 0.84 * light.contrast) * light.ambient
    return facing * per_channel(key) + above * per_channel(ambient)


def highlight(normal: np.ndarray, light: Light, sharpness: float) -> np.ndarray:
    """Returns the specular highlight of the key light, float32 (rows, columns) in [0, 1].

    This is the term max(n · h, 0) ** sharpness of the Blinn-Phong model (Blinn, 1977), with half vector h.

    Args:
      normal: unit normals, float32 (3, rows, columns).
      light: light with the direction of the key light.
      sharpness: exponent; larger values give smaller highlights.
    """
    half = light.direction + np.array([0.0, 0.0, 1.0])
    return np.clip(_along(normal, half / np.linalg.norm(half)), 0, 1) ** np.float32(sharpness)


def per_channel(color: np.ndarray) -> np.ndarray:
    """Returns `color`, (3,), as float32 (3, 1, 1), which broadcasts with fields (3, rows, columns)."""
    return color.astype(np.float32)[:, None, None]


def _along(normal: np.ndarray, direction: np.ndarray) -> np.ndarray:
    return np.tensordot(direction.astype(np.float32), normal, 1)
