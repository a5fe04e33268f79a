"""From a face's own space to the picture: the head as an ellipsoid that turns, and the crop that aligns it.

Face space has its origin between the eyes, u to the picture's right, v down, z towards the viewer, in picture
sides of a frontal face. The *head frame* is face space after yaw and pitch, dropped on the picture plane; the
alignment (roll, scale, shift) then brings eyes and mouth to fixed places, as CelebA's crops do.
"""

import numpy as np

from sisma_jax.data.drawing.parameters import Face

# Semi-axes of the head's front and the height of its centre below the eyes.
HEAD_AXES = np.array([0.285, 0.47, 0.30])
HEAD_CENTER_V = -0.02
# In CelebA's crops, as measured on CelebAMask-HQ's labels: distance between the eyes, and from eyes to mouth.
_EYES_APART = 0.241
_EYES_TO_MOUTH = 0.268
EYE_U = 0.121
# Height at which the neck hangs on the head.
_NECK_V = 0.2


class Geometry:
    """Projects points of face space into the picture, for one face.

    Attributes:
      width: factor on the head's width.
      scale: of the alignment.
      linear: float (2, 2), roll and scale of the alignment: picture = linear @ head frame + shift.
      shift: float (2,).
    """

    def __init__(self, face: Face):
        pose, self.width = face.pose, face.head.width
        self._turn = _rotation(pose.yaw, pose.pitch)
        cos, sin = np.cos(pose.roll), np.sin(pose.roll)
        roll = np.array([[cos, -sin], [sin, cos]])
        eye = EYE_U * face.eyes.spacing
        landmarks = self.head_frame(self.on_face(np.array([[-eye, 0.0], [eye, 0.0], [0.0, face.mouth.height]])))
        middle = landmarks[:2].mean(0)
        # The larger need decides, as in the data set's own cropping: a turned face keeps its height.
        apart = np.linalg.norm(landmarks[1] - landmarks[0]) / _EYES_APART
        down = np.linalg.norm(landmarks[2] - middle) / _EYES_TO_MOUTH
        self.scale = pose.zoom / max(apart, down)
        self.linear = self.scale * roll
        self.shift = np.array(pose.center) - self.linear @ middle
        self._neck = self.picture(np.array([[0.0, _NECK_V, -0.06]]))[0] + np.array(pose.body_shift)

    def surface(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Depth of the head's surface, without the nose; 0 beyond its outline."""
        a, b, c = HEAD_AXES
        return c * np.sqrt(np.maximum(1 - (u / (a * self.width)) ** 2 - ((v - HEAD_CENTER_V) / b) ** 2, 0))

    def on_face(self, points: np.ndarray, lift: np.ndarray | float = 0.0) -> np.ndarray:
        """Gives points (P, 2) of the face their depth, `lift` above the surface: (P, 3)."""
        depth = self.surface(points[:, 0], points[:, 1]) + lift
        return np.concatenate([points, depth[:, None]], axis=1)

    def head_frame(self, points: np.ndarray) -> np.ndarray:
        """Turns points (P, 3) of face space by yaw and pitch and drops their depth: (P, 2)."""
        return points @ self._turn[:2].T

    def picture(self, points: np.ndarray) -> np.ndarray:
        """Projects points (P, 3) of face space into the picture: (P, 2)."""
        return self.head_frame(points) @ self.linear.T + self.shift

    def face(self, points: np.ndarray, lift: np.ndarray | float = 0.0) -> np.ndarray:
        """Projects points (P, 2) of the face's surface into the picture: (P, 2)."""
        return self.picture(self.on_face(points, lift))

    def at_depth(self, points: np.ndarray, z: float) -> np.ndarray:
        """Projects points (P, 2) at a constant depth into the picture: (P, 2)."""
        return self.picture(np.concatenate([points, np.full((len(points), 1), z)], axis=1))

    def body(self, points: np.ndarray) -> np.ndarray:
        """Places points (P, 2) of neck and shoulders, which do not roll with the head, in the picture: (P, 2)."""
        return self._neck + self.scale * (points - np.array([0.0, _NECK_V]))


def _rotation(yaw: float, pitch: float) -> np.ndarray:
    """Positive yaw turns the face to the picture's right, positive pitch turns it up."""
    cos_y, sin_y, cos_p, sin_p = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
    about_vertical = np.array([[cos_y, 0, sin_y], [0, 1, 0], [-sin_y, 0, cos_y]])
    about_horizontal = np.array([[1, 0, 0], [0, cos_p, -sin_p], [0, sin_p, cos_p]])
    return about_horizontal @ about_vertical
