"""Finds the faces in a photograph, and frames each as the faces of CelebA-HQ are framed."""

import dataclasses
import functools
import threading
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, UInt8

# The detector's box in a face of CelebA-HQ, as fractions of the image's side: its side and its centre. These are means
# over 384 of 400 images of CelebAMask-HQ (no box was found in the others), with standard deviations of 0.038 (side),
# 0.008 (across) and 0.010 (down).
_BOX_SIDE, _BOX_ACROSS, _BOX_DOWN = 0.64, 0.503, 0.551
# A portrait whose framing square would be at least this large a part of its own central square is already framed: for
# the same images, the square would be 0.82 to 1.17 of the image.
_FRAMED = 0.75

# The detector runs at a longer side of at most _LARGEST pixels, which limits its time to about 0.3 s, and at a shorter
# side of at least _SMALLEST. It finds faces whose box has at least _LEAST_BOX pixels then. With these settings it found
# 146 of 150 faces that were pasted into larger photographs, and 4 false ones.
_LARGEST, _SMALLEST, _LEAST_BOX = 1024, 256, 36
_SCALE_STEP, _NEIGHBORS = 1.1, 5
# A detector keeps the scales of the image in itself: two threads at once read memory out of bounds.
_LOCK = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Square:
    """A square part of a photograph.

    Attributes:
      top: first row, in pixels.
      left: first column, in pixels.
      side: height and width, in pixels.
    """

    top: int
    left: int
    side: int

    def crop(self, array: np.ndarray) -> np.ndarray:
        """Returns a view of the square part of an array (H, W, ...)."""
        return array[self.top : self.top + self.side, self.left : self.left + self.side]


def central_square(height: int, width: int) -> Square:
    """Returns the largest square in the middle of an image.

    Args:
      height: of the image, in pixels.
      width: of the image, in pixels.
    """
    side = min(height, width)
    return Square((height - side) // 2, (width - side) // 2, side)


def square_around(across: float, down: float, side: float, height: int, width: int) -> Square:
    """Returns the square with a given centre, shrunk and moved so that it lies inside of the image.

    Args:
      across: column of the centre, in pixels.
      down: row of the centre, in pixels.
      side: of the square, in pixels.
      height: of the image, in pixels.
      width: of the image, in pixels.
    """
    whole = max(1, min(round(side), height, width))
    top, left = round(down - whole / 2), round(across - whole / 2)
    return Square(min(max(top, 0), height - whole), min(max(left, 0), width - whole), whole)


def find_faces(photo: UInt8[np.ndarray, "H W 3"]) -> list[Square]:
    """Returns a square around each face that is found in a photograph, the largest first.

    The detector is OpenCV's cascade of Haar features for frontal faces (Viola and Jones, CVPR 2001). A photograph that
    is framed like CelebA-HQ gives its central square.

    Args:
      photo: RGB, upright.
    """
    height, width = photo.shape[:2]
    scale = min(1.0, _LARGEST / max(height, width))
    scale = max(scale, min(_SMALLEST, _LARGEST * min(height, width) / max(height, width)) / min(height, width))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    size = max(1, round(width * scale)), max(1, round(height * scale))
    grey = cv2.resize(cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY), size, interpolation=interpolation)
    least = (_LEAST_BOX, _LEAST_BOX)
    with _LOCK:
        found = _detector().detectMultiScale(grey, _SCALE_STEP, _NEIGHBORS, minSize=least)
    boxes = np.reshape(found, (-1, 4)) / scale
    faces: list[Square] = []
    is_taken: Bool[np.ndarray, "H W"] = np.zeros((height, width), np.bool_)
    for left, top, side, _ in sorted(boxes.tolist(), key=lambda box: (-box[2], box[0], box[1])):
        across, down = left + side / 2, top + side / 2
        if is_taken[min(int(down), height - 1), min(int(across), width - 1)]:
            continue  # inside of a larger face
        is_taken[int(top) : int(top + side), int(left) : int(left + side)] = True
        full = side / _BOX_SIDE
        if full >= _FRAMED * min(height, width):
            whole = central_square(height, width)
            if whole.left <= across < whole.left + whole.side and whole.top <= down < whole.top + whole.side:
                faces.append(whole)
                continue
        faces.append(
            square_around(across + (0.5 - _BOX_ACROSS) * full, down + (0.5 - _BOX_DOWN) * full, full, height, width)
        )
    return list(dict.fromkeys(faces))


@functools.cache
def _detector() -> cv2.CascadeClassifier:
    folder = Path(cv2.__file__).parent / "data"
    return cv2.CascadeClassifier(str(folder / "haarcascade_frontalface_alt.xml"))
