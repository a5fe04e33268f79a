"""Draws the ears and the skin of the face."""

import numpy as np

from sisma_jax.data.drawing.canvas import Canvas
from sisma_jax.data.drawing.contours import mirrored, polyline, scaled, spline, symmetric
from sisma_jax.data.drawing.geometry import EYE_U, Geometry
from sisma_jax.data.drawing.lighting import Relief, highlight, irradiance, per_channel
from sisma_jax.data.drawing.parameters import Face

SIDES = (-1, 1)
# The subject's side on the left (-1) and on the right (+1) of the image.
SUBJECT = {-1: "r", 1: "l"}
EAR_Z = -0.03
# Half of the outline of the head, from the top of the skull to the chin: u, v and z.
_OUTLINE = np.array(
    [
        [0.000, -0.405, -0.04],
        [0.125, -0.380, -0.04],
        [0.218, -0.290, -0.02],
        [0.262, -0.160, 0.00],
        [0.272, -0.030, 0.00],
        [0.266, 0.080, 0.00],
        [0.246, 0.180, 0.02],
        [0.203, 0.283, 0.07],
        [0.134, 0.368, 0.15],
        [0.066, 0.412, 0.21],
        [0.000, 0.424, 0.24],
    ]
)
_EAR = polyline(
    [0.250, 0.283, 0.312, 0.319, 0.309, 0.296, 0.276, 0.255],
    [-0.005, -0.030, -0.015, 0.030, 0.085, 0.130, 0.153, 0.125],
)
_EAR_ROOT = np.array([0.25, 0.065])


def face_contour(face: Face, geometry: Geometry) -> np.ndarray:
    """Returns the closed contour (P, 2) of the head without hair and ears, in the image."""
    head, half = face.head, _OUTLINE.copy()
    half[4:7, 0] *= head.cheeks
    half[7, 0] *= head.jaw
    half[8, 0] *= 0.5 * (head.jaw + head.chin)
    half[9, 0] *= head.chin
    half[:, 0] *= head.width
    half[7:, 1] += head.chin_drop * np.array([0.3, 0.7, 1, 1])
    # The halves join at the chin, and the spline closes at the top.
    both = symmetric(half)[:-1]
    turn, sin = np.sign(face.pose.yaw), abs(np.sin(face.pose.yaw))
    away = np.sign(both[:, 0]) == turn
    # On the side that is turned away, the outline is the silhouette of the cheek, not the line of the ear.
    bulge = np.interp(both[:, 1], [-0.40, -0.30, -0.06, 0.06], [0.0, 0.9, 0.9, 0.5])
    both[:, 2] += np.where(away, bulge * np.abs(both[:, 0]) * sin, 0)
    # On the near side, the jaw runs forward from the ear.
    both[:, 0] *= np.where(away, 1, 1 - 0.4 * sin * np.clip((both[:, 1] - 0.10) / 0.25, 0, 1))
    return geometry.picture(spline(both, closed=True))


def paint_ears(canvas: Canvas, face: Face, geometry: Geometry) -> None:
    """Draws both ears; the face, which is drawn later, covers an ear that is turned away."""
    for side in SIDES:
        outline = spline((_EAR - _EAR_ROOT) * face.head.ear_size + _EAR_ROOT, closed=True)
        contour = geometry.at_depth(mirrored(outline, side) * np.array([face.head.width, 1]), EAR_Z)
        facing = 1 + 0.5 * side * face.light.direction[0] * face.light.contrast
        color = face.skin.color * np.array([0.92, 0.82, 0.80]) * facing
        canvas.paint(contour, color, f"{SUBJECT[side]}_ear")
        inner = scaled(contour, 0.55, 0.68)
        canvas.paint(inner, color * np.array([0.70, 0.60, 0.58]), blur=0.006, opacity=0.8)
        canvas.paint(scaled(contour, 0.28, 0.40), color * 0.95, blur=0.006, opacity=0.7)


def paint_skin(canvas: Canvas, face: Face, relief: Relief, contour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws the lit skin of the face.

    Args:
      canvas: canvas to draw on.
      face: parameters of the face.
      relief: relief of the face.
      contour: contour (P, 2) of the head in the image.
      rng: generator of grain and freckles.

    Returns:
      The light on the face, float32 RGB (3, side, side), for the features that are drawn on it.
    """
    skin, light = face.skin, irradiance(relief.normal, face.light)
    shine = (0.10 + 0.12 * skin.shine) * (0.6 + 0.4 * skin.color.mean())
    gleam = highlight(relief.normal, face.light, 14.0) * np.float32(shine)
    gleam_color = face.light.key * (0.5 + 0.5 * skin.color / skin.color.max())
    # Light that scatters in the skin becomes red, so shadows on skin are warm, not grey.
    scattered = light ** per_channel(np.array([0.86, 1.05, 1.10]))
    lit = _complexion(face, relief, rng) * scattered + gleam * per_channel(gleam_color)
    canvas.paint(contour, relief.to_picture(lit, canvas.side), "skin")
    return relief.to_picture(light, canvas.side)


def _complexion(face: Face, relief: Relief, rng: np.random.Generator) -> np.ndarray:
    """Returns the albedo of the skin, float32 RGB (3, rows, columns) on the grid of the relief.

    Cheeks and nose are redder, and eye sockets are darker. Freckles and the shadow of a beard are added.
    """
    skin, mouth, nose = face.skin, face.mouth, face.nose
    cheeks = relief.bells([(1.0, side * 0.15, 0.13, 0.075, 0.06, 0) for side in SIDES])
    tip = relief.bells([(0.7, 0, nose.length - 0.035, 0.05, 0.04, 0.08), (0.4, 0, mouth.height + 0.11, 0.06, 0.05, 0)])
    red = cheeks * np.float32(0.4 + 0.6 * skin.blush) + tip
    eye, bag = EYE_U * face.eyes.spacing, 0.05 + 0.14 * skin.age
    dark = relief.bells(
        [(0.11, side * eye, -0.005, 0.06, 0.038, 0) for side in SIDES]
        + [(bag, side * eye * 0.9, 0.038, 0.045, 0.012, 0) for side in SIDES]
    )
    grain = 1 + 0.010 * rng.standard_normal(red.shape, np.float32)
    if skin.freckles:
        spots = rng.random(red.shape, np.float32) < 0.16
        grain -= 0.28 * np.float32(skin.freckles) * spots * np.clip(cheeks + tip, 0, 1)
    albedo = per_channel(skin.color) * grain
    albedo *= 1 - red * per_channel(np.array([0.0, 0.11, 0.10]))
    albedo *= 1 - dark * per_channel(np.array([0.8, 1.0, 0.95]))
    if skin.stubble:
        beard = relief.bells(
            [(1.2, side * 0.20, 0.20, 0.05, 0.13, 0) for side in SIDES]
            + [(1.2, 0, mouth.height + 0.10, 0.20, 0.095, 0), (0.7, 0, mouth.height - 0.04, 0.085, 0.020, 0)]
        )
        beard = np.clip(beard, 0, 1) * np.float32(0.25 + 0.45 * skin.stubble)
        albedo += beard * (per_channel(0.6 * face.brows.color + 0.25 * skin.color) - albedo)
    return albedo
