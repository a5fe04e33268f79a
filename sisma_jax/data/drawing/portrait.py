"""Draws a whole portrait with its mask: the layers, from the background to the hat."""

from collections.abc import Sequence

import numpy as np

from sisma_jax.data.drawing import accessories, features, hair, scene, skin
from sisma_jax.data.drawing.canvas import Canvas
from sisma_jax.data.drawing.geometry import Geometry
from sisma_jax.data.drawing.lighting import Relief
from sisma_jax.data.drawing.parameters import Face
from sisma_jax.data.drawing.sampling import sample_face

# Canvas pixels along the side of a picture's pixel. The label map is hard-edged, so each pixel takes 9 votes.
_OVERSAMPLING = 3


def draw_face(seed: int | Sequence[int], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the portrait and the mask that belong to a seed; another size gives the same face.

    Args:
      seed: anything that seeds `numpy.random.default_rng`; the data set uses (its seed, the face's id).
      size: height and width in pixels.

    Returns:
      image uint8 (size, size, 3) RGB, and mask uint8 (size, size) of class indices.
    """
    return draw(sample_face(np.random.default_rng(seed)), size)


def draw(face: Face, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns image and mask of a given face, as `draw_face` does."""
    rng = np.random.default_rng(face.texture_seed)
    canvas = Canvas(size * _OVERSAMPLING)
    geometry = Geometry(face)
    contour = skin.face_contour(face, geometry)
    front_hair = hair.front_contours(face, geometry, rng)
    strands = hair.strand_colors(canvas, face, geometry, rng)

    scene.paint_background(canvas, face.background, rng)
    hair.paint_back(canvas, face, geometry, strands, rng)
    scene.paint_neck(canvas, face, geometry, contour)
    scene.paint_clothes(canvas, face, geometry, rng)
    accessories.paint_necklace(canvas, face, geometry)
    skin.paint_ears(canvas, face, geometry)
    light = skin.paint_skin(canvas, face, Relief(face, geometry), contour, rng)
    features.paint_nose(canvas, face, geometry)
    features.paint_mouth(canvas, face, geometry, light)
    features.paint_eyes(canvas, face, geometry, light)
    features.paint_brows(canvas, face, geometry, light)
    accessories.paint_glasses(canvas, face, geometry, light)
    on_face = canvas.inside(contour)
    hair.shade_face(canvas, face, front_hair, on_face)
    hair.paint_front(canvas, face, front_hair, strands)
    accessories.paint_earrings(canvas, face, geometry)
    accessories.paint_hat(canvas, face, geometry, on_face)
    return canvas.reduce(size)
