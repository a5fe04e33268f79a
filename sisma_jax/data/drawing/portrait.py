"""Draws a whole portrait with its mask: the layers, from the background to the hat."""

import numpy as np

from sisma_jax.data.drawing import accessories, features, hair, scene
from sisma_jax.data.drawing.canvas import Canvas, smooth_noise
from sisma_jax.data.drawing.geometry import Geometry
from sisma_jax.data.drawing.lighting import Relief
from sisma_jax.data.drawing.parameters import Face, sample_face
from sisma_jax.data.labels import INDEX

# Canvas pixels a picture pixel: shapes are hard-edged in the label map, and an odd number has a middle.
_OVERSAMPLING = 3


def draw_face(seed: tuple[int, int], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the portrait and the mask that belong to a seed; another size gives the same face.

    Args:
      seed: of the data set, and index of the face in it.
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
    relief = Relief(face, geometry)
    contour = features.face_contour(face, geometry)
    front = hair.front_hair_contours(face, geometry)
    scene.paint_background(canvas, face.background, rng)
    strands = hair.strand_colors(canvas, face, geometry, rng)
    hair.paint_back_hair(canvas, face, geometry, strands)
    scene.paint_neck(canvas, face, geometry, contour)
    scene.paint_clothes(canvas, face, geometry, rng)
    scene.paint_necklace(canvas, face, geometry)
    features.paint_ears(canvas, face, geometry)
    light = features.paint_skin(canvas, face, geometry, relief, contour)
    on_face = canvas.full(contour)
    features.paint_nose(canvas, face, geometry)
    features.paint_mouth(canvas, face, geometry, light)
    features.paint_eyes(canvas, face, geometry, light)
    features.paint_brows(canvas, face, geometry, light)
    accessories.paint_glasses(canvas, face, geometry, light)
    hair.shade_under_hair(canvas, face, front, on_face)
    hair.paint_front_hair(canvas, face, front, strands)
    ears = tuple(bool((canvas.labels == INDEX[name]).any()) for name in ("r_ear", "l_ear"))
    accessories.paint_earrings(canvas, face, geometry, ears)
    accessories.paint_hat(canvas, face, geometry, on_face)
    canvas.image *= 1 + 0.012 * smooth_noise(rng, (64, 64), canvas.side)[..., None]
    return canvas.reduce(size)
