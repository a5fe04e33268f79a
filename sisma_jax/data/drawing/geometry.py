"""Projects face space into the image: rotates the head, an ellipsoid, and aligns it as CelebA's crops are aligned.

Face space has its origin between the eyes: u points to the right of the image, v down, and z towards the viewer. Its
unit is the side of the image for a frontal face of zoom 1. The *head frame* (x, y) is face space after yaw and pitch,
projected orthographically. The alignment (roll, scale and shift) then moves eyes and mouth to fixed positions.
"""

import numpy as np

from sisma_jax.data.drawing.parameters import Face

# Semi-axes (u, v, z) of the front of the head, and the v of its centre.
HEAD_AXES = np.array([0.285, 0.47, 0.30])
HEAD_CENTER_V = -0.02
# Distance between the eyes, and from eyes to mouth, in CelebA's crops, measured on the labels of CelebAMask-HQ.
_EYES_APART = 0.241
_EYES_TO_MOUTH = 0.268
EYE_U = 0.121
# The v at which the neck is attached to the head.
_NECK_V = 0.2


class Geometry:
    """The projection of one face from face space into the image.

    Attributes:
      width: factor on the width of the head.
      scale: scale of the alignment.
      linear: float (2, 2), roll and scale of the alignment: image = linear @ head frame + shift.
      shift: float (2,), translation of the alignment.
    """

    def __init__(self, face: Face):
        pose, self.width = face.pose, face.head.width
        self._turn = _rotation(pose.yaw, pose.pitch)
        cos, sin = np.cos(pose.roll), np.sin(pose.roll)
        roll = np.array([[cos, -sin], [sin, cos]])
        eye = EYE_U * face.eyes.spacing
        landmarks = self.head_frame(self.on_face(np.array([[-eye, 0.0], [eye, 0.0], [0.0, face.mouth.height]])))
        middle = landmarks[:2].mean(0)
        # As in the crops of CelebA, the larger of the two distances decides, so a face in profile keeps its height.
        apart = np.linalg.norm(landmarks[1] - landmarks[0]) / _EYES_APART
        down = np.linalg.norm(landmarks[2] - middle) / _EYES_TO_MOUTH
        self.scale = float(pose.zoom / max(apart, down))
        self.linear = self.scale * roll
        self.shift = np.array(pose.center) - self.linear @ middle
        self._neck = self.picture(np.array([[0.0, _NECK_V, -0.06]]))[0] + np.array(pose.body_shift)

    def surface(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Returns the depth z of the head's surface without the nose, at the points (u, v); 0 outside the outline."""
        a, b, c = HEAD_AXES
        return c * np.sqrt(np.maximum(1 - (u / (a * self.width)) ** 2 - ((v - HEAD_CENTER_V) / b) ** 2, 0))

    def on_face(self, points: np.ndarray, lift: np.ndarray | float = 0.0) -> np.ndarray:
        """Returns points of the face in face space, (P, 3).

        Args:
          points: (u, v) of the points, (P, 2).
          lift: height above the head's surface, (P,) or one value.
        """
        depth = self.surface(points[:, 0], points[:, 1]) + lift
        return np.concatenate([points, depth[:, None]], axis=1)

    def head_frame(self, points: np.ndarray) -> np.ndarray:
        """Returns points (P, 3) of face space in the head frame, (P, 2)."""
        return points @ self._turn[:2].T

    def picture(self, points: np.ndarray) -> np.ndarray:
        """Returns points (P, 3) of face space in the image, (P, 2)."""
        return self.head_frame(points) @ self.linear.T + self.shift

    def face(self, points: np.ndarray, lift: np.ndarray | float = 0.0) -> np.ndarray:
        """Returns points of the face in the image, (P, 2).

        Args:
          points: (u, v) of the points, (P, 2).
          lift: height above the head's surface, (P,) or one value.
        """
        return self.picture(self.on_face(points, lift))

    def at_depth(self, points: np.ndarray, z: float) -> np.ndarray:
        """Returns points (u, v), (P, 2), that all have the depth z, in the image, (P, 2)."""
        return self.picture(np.concatenate([points, np.full((len(points), 1), z)], axis=1))

    def body(self, points: np.ndarray) -> np.ndarray:
        """Returns points (u, v) of neck and shoulders, (P, 2), in the image, (P, 2). The body does not rotate."""
        return self._neck + self.scale * (points - np.array([0.0, _NECK_V]))


def _rotation(yaw: float, pitch: float) -> np.ndarray:
    """Returns the matrix (3, 3) of a rotation: positive yaw turns the face to the right of the image, pitch up."""
    cos_y, sin_y, cos_p, sin_p = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
    about_vertical = np.array([[cos_y, 0, sin_y], [0, 1, 0], [-sin_y, 0, cos_y]])
    about_horizontal = np.array([[1, 0, 0], [0, cos_p, -sin_p], [0, sin_p, cos_p]])
    return about_horizontal @ about_vertical
