"""Draws glasses, hats, earrings and necklaces."""

import numpy as np

from sisma_jax.data.classes import CELEBAMASK_HQ
from sisma_jax.data.drawing.canvas import Canvas
from sisma_jax.data.drawing.contours import (
    between,
    ellipse,
    mirrored,
    moved,
    polyline,
    scaled,
    spline,
    stroke,
    symmetric,
)
from sisma_jax.data.drawing.geometry import EYE_U, Geometry
from sisma_jax.data.drawing.lighting import per_channel
from sisma_jax.data.drawing.parameters import Face
from sisma_jax.data.drawing.skin import EAR_Z, SIDES, SUBJECT

# Outline of the lens on the right of the image, relative to the eye.
_LENSES = {
    "round": ellipse(np.array([0.004, 0.012]), (0.080, 0.070), count=16),
    "rectangle": polyline(
        [-0.078, 0.0, 0.085, 0.092, 0.080, 0.0, -0.068, -0.080],
        [-0.030, -0.042, -0.038, 0.0, 0.046, 0.052, 0.042, 0.005],
    ),
    "aviator": polyline(
        [-0.075, 0.0, 0.085, 0.092, 0.055, 0.0, -0.045, -0.078],
        [-0.032, -0.044, -0.034, 0.02, 0.076, 0.085, 0.062, 0.01],
    ),
    "cat": polyline(
        [-0.076, 0.0, 0.070, 0.108, 0.092, 0.050, -0.020, -0.070],
        [-0.024, -0.044, -0.062, -0.066, 0.005, 0.050, 0.052, 0.03],
    ),
}
# Glasses: height of the lenses above the skin, and z of the bridge, the hinges and the ends of the temples.
_LENS_LIFT, _BRIDGE_Z, _HINGE_Z, _TEMPLE_Z = 0.03, 0.33, 0.22, 0.02
# Hats: v of the rim in the middle of the forehead, and height of the crown above the rim.
_HATS = {"beanie": (-0.175, 0.33), "cap": (-0.19, 0.29), "brim": (-0.205, 0.36), "scarf": (-0.21, 0.28)}


def paint_glasses(canvas: Canvas, face: Face, geometry: Geometry, light: np.ndarray) -> None:
    """Draws the glasses, if any. Eyes and brows behind clear lenses keep their classes, as in CelebAMask-HQ.

    Args:
      canvas: canvas to draw on.
      face: parameters of the face.
      geometry: projection of the face.
      light: light on the face, float32 RGB (3, side, side).
    """
    glasses = face.glasses
    if glasses is None:
        return
    kept = canvas.labels.copy()
    eye, thickness = EYE_U * face.eyes.spacing, glasses.thickness
    lens = moved(spline(_LENSES[glasses.shape], closed=True), eye, 0)
    lines = []
    for side in SIDES:
        contour = geometry.face(mirrored(lens, side), _LENS_LIFT)
        ring = np.concatenate([contour, contour[:2]])
        cast = stroke(moved(ring, -0.02 * face.light.direction[0], 0.016), 1.4 * thickness)
        canvas.tint(cast, (0.75, 0.70, 0.69), blur=0.006)
        canvas.paint(contour, glasses.tint, "eye_g", light=light, opacity=glasses.opacity)
        middle, span = contour.mean(0), np.ptp(contour, axis=0)
        glare = middle + span * polyline([-0.10, 0.14, -0.14, -0.38], [-0.6, -0.6, 0.6, 0.6])
        canvas.paint(glare, (1, 1, 1), blur=0.010, opacity=0.16, within=canvas.inside(contour))
        hinge = np.array([side * (eye + 0.086), -0.012, _HINGE_Z])
        ear = np.array([side * 0.262 * face.head.width, -0.016, _TEMPLE_Z])
        lines += [ring, geometry.picture(np.linspace(hinge, ear, 6))]
    lines.append(geometry.at_depth(spline(symmetric(polyline([eye - 0.076, 0], [0, -0.014]))), _BRIDGE_Z))
    for line in lines:
        canvas.paint(stroke(line, thickness), glasses.color, "eye_g", light=light, blur=0.0008)
        gleam = stroke(moved(line, 0, -0.15 * thickness), 0.3 * thickness)
        canvas.paint(gleam, np.clip(glasses.color + 0.35, 0, 1), blur=0.001, opacity=0.45)
    if glasses.opacity < 0.5:
        over = np.isin(kept, [CELEBAMASK_HQ.index[name] for name in ("l_eye", "r_eye", "l_brow", "r_brow")])
        canvas.labels[over] = kept[over]


def paint_earrings(canvas: Canvas, face: Face, geometry: Geometry) -> None:
    """Draws an earring below each visible ear, if the face has earrings."""
    jewel = face.earring
    if jewel is None:
        return
    for side in SIDES:
        if not canvas.has(f"{SUBJECT[side]}_ear"):
            continue
        lobe = geometry.at_depth(np.array([[side * 0.292 * face.head.width, 0.150]]), EAR_Z)[0]
        if jewel.kind == "stud":
            shapes = [ellipse(lobe, (0.014 * jewel.size, 0.014 * jewel.size), count=12)]
        elif jewel.kind == "drop":
            end = moved(lobe, 0, 0.075 * jewel.size)
            shapes = [stroke(np.array([lobe, end]), 0.009), ellipse(end, (0.020 * jewel.size, 0.030 * jewel.size))]
        else:
            radius = 0.048 * jewel.size
            ring = ellipse(moved(lobe, 0, radius), (0.7 * radius, radius))
            shapes = [stroke(np.concatenate([ring, ring[:2]]), 0.013)]
        for shape in shapes:
            canvas.tint(moved(shape, 0.004, 0.010), (0.7, 0.68, 0.68), blur=0.006)
            canvas.paint(shape, jewel.color * 0.8, "ear_r")
            gleam = moved(scaled(shape, 0.55, 0.55), -0.003, -0.003)
            bright = np.clip(jewel.color * 1.4, 0, 1)
            canvas.paint(gleam, bright, blur=0.003, opacity=0.55, within=canvas.inside(shape))


def paint_necklace(canvas: Canvas, face: Face, geometry: Geometry) -> None:
    """Draws the necklace, if any."""
    jewel = face.necklace
    if jewel is None:
        return
    t = np.linspace(-1, 1, 41)
    line = geometry.body(polyline(face.head.neck_width * 1.02 * t, 0.395 + 0.085 * (1 - t**2)))
    width = {"chain": 0.011, "pearls": 0.020, "pendant": 0.008}[jewel.kind] * jewel.size
    canvas.tint(stroke(moved(line, 0, 0.008), 1.5 * width), (0.7, 0.65, 0.63), blur=0.004)
    bright = np.clip(jewel.color * 1.4, 0, 1)
    if jewel.kind == "pearls":
        for bead in line[::2]:
            canvas.paint(ellipse(bead, (0.5 * width, 0.5 * width), count=12), jewel.color * 0.85, "neck_l")
            spark = ellipse(moved(bead, -0.15 * width, -0.15 * width), (0.25 * width, 0.25 * width), count=8)
            canvas.paint(spark, (1, 1, 1), blur=0.002, opacity=0.8)
        return
    canvas.paint(stroke(line, width), jewel.color, "neck_l")
    canvas.paint(stroke(moved(line, 0, -0.001), 0.35 * width), bright, opacity=0.8)
    if jewel.kind == "pendant":
        center = moved(line[len(line) // 2], 0, 0.014)
        canvas.paint(ellipse(center, (0.014 * jewel.size, 0.018 * jewel.size)), jewel.color * 0.8, "neck_l")
        canvas.paint(ellipse(moved(center, -0.003, -0.003), (0.006, 0.008), count=10), bright, blur=0.002)


def paint_hat(canvas: Canvas, face: Face, geometry: Geometry, on_face: np.ndarray) -> None:
    """Draws the hat, if any, over the hair, and its shadow on the face.

    Args:
      canvas: canvas to draw on.
      face: parameters of the face.
      geometry: projection of the face.
      on_face: opacity of the face, float32 (side, side) in [0, 1], which clips the shadow.
    """
    hat = face.hat
    if hat is None:
        return
    low, height = _HATS[hat.kind]
    wide = 0.292 * face.head.width + 0.7 * min(max(face.hair.side, 0.02), 0.06)
    # The rim is lower at the ears. It runs around the forehead, in front of the outline of the crown.
    rim = symmetric(np.array([[-wide, low + 0.075, 0.0], [-wide * 0.6, low + 0.02, 0.16], [0.0, low, 0.26]]))
    rim = geometry.picture(spline(rim))
    turn = np.linspace(0, np.pi, 13)
    crown = polyline(wide * np.sign(np.cos(turn)) * np.abs(np.cos(turn)) ** 0.9, low - height * np.sin(turn) ** 0.85)
    contour = np.concatenate([geometry.at_depth(spline(crown), -0.02), rim])
    shade = _roundness(canvas, face, contour)
    color, second = shade * per_channel(hat.color), shade * per_channel(hat.second)
    canvas.tint(between(moved(rim, 0, -0.02), moved(rim, 0, 0.06)), (0.55, 0.50, 0.50), blur=0.014, within=on_face)
    canvas.paint(contour, color, "hat")
    inside = canvas.inside(contour)
    if hat.kind == "beanie":
        _paint_ribbed_band(canvas, rim, second, inside)
    elif hat.kind == "cap":
        _paint_visor(canvas, geometry, low, second, inside, on_face)
    elif hat.kind == "brim":
        canvas.paint(between(moved(rim, 0, -0.10), moved(rim, 0, -0.02)), second, within=inside)
        turn = np.linspace(0, 2 * np.pi, 36, endpoint=False)
        disc = polyline((wide + 0.15) * np.cos(turn), low + 0.035 + 0.065 * np.sin(turn) - 0.03 * np.cos(turn) ** 2)
        disc = geometry.at_depth(disc, 0.02)
        canvas.tint(moved(disc, 0, 0.05), (0.62, 0.57, 0.57), blur=0.018, within=on_face)
        canvas.paint(disc, color * np.float32(0.92), "hat")
        canvas.tint(stroke(moved(rim, 0, -0.02), 0.02), (0.6, 0.6, 0.6), blur=0.006, within=canvas.inside(disc))
    else:
        for index in range(4):
            v = low - 0.075 * index
            fold = np.array(
                [[-0.9 * wide, v - 0.02, 0.02], [0, v - 0.05, 0.25 - 0.05 * index], [0.9 * wide, v + 0.03, 0.02]]
            )
            fold = geometry.picture(spline(fold))
            canvas.tint(stroke(fold, 0.014), (0.78, 0.78, 0.78), blur=0.006, within=inside)
            canvas.paint(stroke(moved(fold, 0, -0.02), 0.012), second, blur=0.004, opacity=0.5, within=inside)


def _roundness(canvas: Canvas, face: Face, contour: np.ndarray) -> np.ndarray:
    """Returns the shading of a vertical cylinder as wide as a contour, float32 (side, side)."""
    axis = (np.arange(canvas.side, dtype=np.float32) + 0.5) / canvas.side
    across = (axis - np.float32(contour[:, 0].mean())) / np.float32(np.ptp(contour[:, 0]) / 2)
    slant = np.float32(0.45 * face.light.contrast * face.light.direction[0])
    shade = np.clip(0.95 + slant * across - 0.28 * across**2, 0.3, 1.15)
    return np.broadcast_to(shade, (canvas.side, canvas.side))


def _paint_ribbed_band(canvas: Canvas, rim: np.ndarray, color: np.ndarray, inside: np.ndarray) -> None:
    top = moved(rim, 0, -0.075)
    band = between(top, rim)
    canvas.paint(band, color, "hat", within=inside)
    canvas.tint(stroke(top, 0.01), (0.7, 0.7, 0.7), blur=0.004, within=inside)
    for start, end in zip(top[1:-1], rim[1:-1], strict=True):
        canvas.tint(stroke(np.array([start, end]), 0.005), (0.8, 0.8, 0.8), blur=0.002, within=inside)


def _paint_visor(
    canvas: Canvas, geometry: Geometry, low: float, color: np.ndarray, inside: np.ndarray, on_face: np.ndarray
) -> None:
    half = np.array([[0.15, -0.01, 0.24], [0.235, 0.045, 0.16], [0.20, 0.07, 0.38], [0.0, 0.055, 0.50]])
    back = np.array([[0.0, -0.03, 0.28]])
    visor = np.concatenate([symmetric(half), back]) + np.array([0, low, 0])
    visor = geometry.picture(spline(visor, closed=True))
    canvas.tint(moved(visor, 0, 0.055), (0.60, 0.55, 0.55), blur=0.018, within=on_face)
    for u in (-0.11, 0.0, 0.11):
        seam = np.array([[1.4 * u, low, 0.26], [1.2 * u, low - 0.15, 0.2], [0.5 * u, low - 0.28, 0.0]])
        canvas.tint(stroke(geometry.picture(spline(seam)), 0.005), (0.75, 0.75, 0.75), blur=0.002, within=inside)
    badge = geometry.picture(np.array([[0, low - 0.09, 0.25]]))[0]
    canvas.paint(ellipse(badge, (0.045, 0.04)), color, blur=0.002, opacity=0.9)
    canvas.paint(visor, color * np.float32(0.8), "hat")
    canvas.tint(
        moved(stroke(visor[: len(visor) // 2], 0.02), 0, -0.01),
        (0.7, 0.7, 0.7),
        blur=0.006,
        within=canvas.inside(visor),
    )
