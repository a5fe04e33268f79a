"""Masks of photographs of any size: finds the faces, and predicts the mask of each with a face parser."""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from sisma_jax.data.faces import Square, central_square, find_faces
from sisma_jax.models.face_parser import FaceParser

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class FaceMask:
    """The mask of a face in a photograph.

    Attributes:
      square: the part of the photograph that shows the face.
      mask: class indices, at the resolution of the photograph.
    """

    square: Square
    mask: UInt8[np.ndarray, "P P"]


def segment(photo: UInt8[np.ndarray, "H W 3"], parser: FaceParser, name: str) -> list[FaceMask]:
    """Returns the masks of all faces that are found in a photograph, the largest face first.

    If no face is found, the only mask is that of the central square, and a line says so.

    Args:
      photo: RGB, upright.
      parser: predicts the masks.
      name: of the photograph, for the message.
    """
    squares = find_faces(photo)
    if not squares:
        logger.warning("%s: no face is found; the mask is that of the central square.", name)
        squares = [central_square(*photo.shape[:2])]
    return [FaceMask(square, parser.predict(square.crop(photo)[None])[0]) for square in squares]


def paint(faces: Sequence[FaceMask], height: int, width: int) -> UInt8[np.ndarray, "H W"]:
    """Returns one mask of a whole photograph: class indices; the first class covers the rest.

    Where two squares overlap, the first class of one gives way to the other, and a larger face covers a smaller one.

    Args:
      faces: as `segment` returns them.
      height: of the photograph, in pixels.
      width: of the photograph, in pixels.
    """
    whole = np.zeros((height, width), np.uint8)
    for face in reversed(faces):
        part = face.square.crop(whole)
        np.copyto(part, face.mask, where=face.mask != 0)
    return whole
