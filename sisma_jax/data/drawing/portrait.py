"""Draws a portrait and its mask, layer by layer from the background to the hat."""

from collections.abc import Sequence

import numpy as np

from sisma_jax.data.drawing import accessories, features, hair, scene, skin
from sisma_jax.data.drawing.canvas import Canvas
from sisma_jax.data.drawing.geometry import Geometry
from sisma_jax.data.drawing.lighting import Relief
from sisma_jax.data.drawing.parameters import Face
from sisma_jax.data.drawing.sampling import sample_face

# Side of an image pixel in canvas pixels. The label of an image pixel is the majority of 9 canvas pixels.
_OVERSAMPLING = 3


def draw_face(seed: int | Sequence[int], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the image and the mask of a random face. The seed determines the face at every size.

    Args:
      seed: seed for `numpy.random.default_rng`, non-negative; the data set uses (seed of the data set, id of the face).
      size: height and width in pixels.

    Returns:
      The image, uint8 RGB (size, size, 3), and the mask, uint8 class indices (size, size) of CelebAMask-HQ.
    """
    return draw(sample_face(np.random.default_rng(seed)), size)


def draw(face: Face, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the image and the mask of a face with given parameters.

    Args:
      face: parameters of the face.
      size: height and width in pixels.

    Returns:
      The image, uint8 RGB (size, size, 3), and the mask, uint8 class indices (size, size) of CelebAMask-HQ.
    """
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
