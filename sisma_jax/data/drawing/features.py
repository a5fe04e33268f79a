"""Draws eyes, brows, nose and mouth."""

import numpy as np

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
from sisma_jax.data.drawing.parameters import Face
from sisma_jax.data.drawing.skin import SIDES, SUBJECT

# Height of the lips above the head's surface.
_LIPS_LIFT = 0.035


def paint_eyes(canvas: Canvas, face: Face, geometry: Geometry, light: np.ndarray) -> None:
    """Draws both eyes with lids and lashes.

    Args:
      canvas: canvas to draw on.
      face: parameters of the face.
      geometry: projection of the face.
      light: light on the face, float32 RGB (3, side, side).
    """
    for side in SIDES:
        _paint_eye(canvas, face, geometry, side, light)


def _paint_eye(canvas: Canvas, face: Face, geometry: Geometry, side: int, light: np.ndarray) -> None:
    eyes, skin = face.eyes, face.skin.color
    t = np.linspace(0, 1, 17)
    hump = np.sin(np.pi * t)
    x = 0.0435 * eyes.size * (2 * t - 1)
    base = 0.004 - (eyes.tilt + 0.006) * t
    upper = base - 0.0200 * eyes.opening * eyes.size * np.sin(np.pi * t**0.88) ** 0.8
    lower = base + 0.0118 * eyes.size * (0.7 + 0.3 * eyes.opening) * np.sin(np.pi * t**1.12) ** 0.85
    crease = upper - eyes.lid * hump**0.5

    def place(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return geometry.face(polyline(side * (EYE_U * eyes.spacing + x), y))

    upper_line, lower_line, crease_line = place(x, upper), place(x, lower), place(x, crease)
    lid = between(crease_line, upper_line)
    canvas.paint(lid, skin * 0.86, blur=0.003, opacity=0.3)
    if eyes.shadow_strength > 0.05:
        canvas.paint(lid, eyes.shadow, blur=0.006, opacity=eyes.shadow_strength)
    fold = stroke(crease_line, 0.004 * hump**0.5 + 0.0005)
    canvas.paint(fold, skin * np.array([0.50, 0.40, 0.37]), blur=0.0018, opacity=0.6)

    almond = between(upper_line, lower_line)
    inside = canvas.inside(almond)
    row, column = np.clip((almond.mean(0)[::-1] * canvas.side).astype(int), 0, canvas.side - 1)
    local = np.clip(light[:, row, column], 0.45, 1.05)
    canvas.paint(almond, np.array([0.90, 0.88, 0.86]) * local, f"{SUBJECT[side]}_eye")
    corner = ellipse(upper_line[0], (0.009, 0.007), count=12)
    canvas.paint(corner, skin * np.array([0.95, 0.65, 0.62]), within=inside, opacity=0.8)

    height = eyes.gaze[1] + 0.5 * (upper.min() + lower.max()) - 0.003
    center = place(np.array([side * eyes.gaze[0]]), np.array([height]))[0]
    radius, foreshortening = 0.0215 * geometry.scale, float(np.cos(face.pose.yaw))
    rounds = ((1.0, eyes.iris * 0.35, 0.0015), (0.84, eyes.iris, 0.002), (0.46, np.array([0.02, 0.02, 0.025]), 0.001))
    for factor, color, blur in rounds:
        contour = ellipse(center, (radius * factor * foreshortening, radius * factor))
        canvas.paint(contour, color * local, blur=blur, within=inside)
    glow = ellipse(moved(center, 0, 0.55 * radius), (0.5 * radius, 0.28 * radius), count=12)
    canvas.paint(glow, np.clip(eyes.iris * 1.7, 0, 1), blur=0.003, opacity=0.6, within=inside)
    canvas.tint(stroke(upper_line, 0.016), (0.66, 0.63, 0.63), blur=0.003, within=inside)
    lit_side = 1 if face.light.direction[0] >= 0 else -1
    spark = ellipse(moved(center, 0.42 * radius * lit_side, -0.42 * radius), (0.0055, 0.0055), count=10)
    canvas.paint(spark, (1, 1, 1), blur=0.0008, opacity=0.9, within=inside)

    lash = np.minimum(0.25, skin * 0.25)
    line = place(x * (1 + 0.10 * eyes.liner * t), upper - 0.001 - 0.006 * eyes.liner * t**6)
    widths = (0.2 + 0.8 * t**0.6) * (0.0055 + 0.0065 * eyes.liner)
    canvas.paint(stroke(line, widths), lash, blur=0.001, opacity=0.92)
    lower_lash = stroke(moved(lower_line, 0, 0.001), 0.0035 * hump**0.5)
    canvas.paint(lower_lash, lash * 1.6, blur=0.001, opacity=0.25 + 0.4 * eyes.liner)
    bag = stroke(place(x, lower + 0.016 + 0.006 * hump), 0.004 * hump)
    canvas.paint(bag, skin * np.array([0.62, 0.5, 0.47]), blur=0.004, opacity=0.15 + 0.4 * face.skin.age)


def paint_brows(canvas: Canvas, face: Face, geometry: Geometry, light: np.ndarray) -> None:
    """Draws both eyebrows.

    Args:
      canvas: canvas to draw on.
      face: parameters of the face.
      geometry: projection of the face.
      light: light on the face, float32 RGB (3, side, side).
    """
    brows = face.brows
    t = np.linspace(0, 1, 15)
    u = EYE_U * face.eyes.spacing - 0.066 + brows.length * t
    v = -brows.height - brows.slope * t - brows.arch * np.sin(np.pi * t**1.25) + 0.014 * t**4
    width = brows.thickness * np.minimum(1, 0.45 + 2.6 * t) * (1 - t**2.2) ** 0.75 + 0.003
    for side in SIDES:
        contour = stroke(geometry.face(polyline(side * u, v)), width)
        canvas.paint(contour, brows.color, light=light, blur=0.0025, opacity=0.55)
        canvas.paint(scaled(contour, 0.985, 0.85), brows.color * 0.9, light=light, blur=0.003, opacity=0.7)
        canvas.mark(contour, f"{SUBJECT[side]}_brow")


def paint_nose(canvas: Canvas, face: Face, geometry: Geometry) -> None:
    """Sets the class of the nose, whose shape the shading shows, and draws nostrils and creases."""
    nose, skin = face.nose, face.skin.color
    w, end = nose.width, nose.length
    u = [0.027, 0.030, 0.042, 0.060, 0.072, 0.060, 0.030, 0.0]
    v = [-0.008, 0.045, end - 0.090, end - 0.062, end - 0.036, end - 0.012, end - 0.006, end + 0.002]
    lift = np.array([0.01, 0.02, 0.04, 0.04, 0.03, 0.03, 0.06, 0.07]) * nose.height
    outline = symmetric(np.column_stack([np.multiply(u, w), v, lift]))
    canvas.mark(spline(geometry.face(outline[:, :2], outline[:, 2]), closed=True), "nose")

    # The shadow below the tip is longer if the light is higher.
    drop = end + 0.012 + 0.02 * max(-face.light.direction[1], 0)
    below = polyline(np.array([-0.045, 0.045, 0.025, -0.025]) * w, [end - 0.014, end - 0.014, drop, drop])
    canvas.tint(geometry.face(below, 0.04), (0.78, 0.70, 0.68), blur=0.008)
    wing = spline(
        polyline(np.array([0.056, 0.071, 0.073, 0.060]) * w, [end - 0.068, end - 0.048, end - 0.026, end - 0.010])
    )
    widths = 0.006 * np.sin(np.linspace(0.15, 0.95, len(wing)) * np.pi)
    for side in SIDES:
        crease = stroke(geometry.face(mirrored(wing, side), 0.03), widths)
        canvas.paint(crease, skin * np.array([0.60, 0.46, 0.43]), blur=0.003, opacity=0.55)
        hole = geometry.face(np.array([[side * 0.028 * w, end - 0.013]]), 0.07)[0]
        hole = ellipse(hole, (0.0145 * w, 0.0062), -0.35 * side, count=16)
        canvas.paint(hole, skin * np.array([0.30, 0.19, 0.17]), blur=0.0022, opacity=0.85)


def paint_mouth(canvas: Canvas, face: Face, geometry: Geometry, light: np.ndarray) -> None:
    """Draws the lips, and the teeth of an open mouth.

    Args:
      canvas: canvas to draw on.
      face: parameters of the face.
      geometry: projection of the face.
      light: light on the face, float32 RGB (3, side, side).
    """
    mouth, smile = face.mouth, max(face.mouth.smile, 0.0)
    x = np.linspace(-1, 1, 25)
    arch = np.maximum(1 - x**2, 0)
    line = mouth.height - 0.030 * mouth.smile * x**2 + 0.0035 * np.exp(-((x / 0.25) ** 2)) + 0.006 * smile
    upper_edge = line - 0.3 * mouth.gap * arch**0.8
    lower_edge = line + 0.7 * mouth.gap * arch**0.7
    cupids_bow = 1 - 0.28 * np.exp(-((x / 0.13) ** 2))
    top = upper_edge - mouth.upper * arch**0.75 * cupids_bow - 0.0002
    bottom = lower_edge + mouth.lower * arch**0.6 + 0.002 * arch

    def place(y: np.ndarray) -> np.ndarray:
        return geometry.face(polyline(mouth.width * x, y), _LIPS_LIFT)

    upper_line, lower_line, bottom_line = place(upper_edge), place(lower_edge), place(bottom)
    under = between(moved(bottom_line, 0, 0.004)[4:-4], moved(bottom_line, 0, 0.022)[4:-4])
    canvas.tint(under, (0.86, 0.80, 0.79), blur=0.008)
    if mouth.gap:
        _paint_open_mouth(canvas, face, upper_line, lower_line, arch)
    upper_lip, lower_lip = between(place(top), upper_line), between(lower_line, bottom_line)
    canvas.paint(upper_lip, mouth.color * 0.88, light=light, blur=0.0015)
    canvas.paint(lower_lip, mouth.color, light=light, blur=0.0015)
    canvas.mark(upper_lip, "u_lip")
    canvas.mark(lower_lip, "l_lip")
    gleam = stroke((0.5 * (lower_line + bottom_line))[6:-6], 0.008 * arch[6:-6])
    canvas.paint(gleam, np.clip(mouth.color * 1.25 + 0.16, 0, 1), blur=0.004, opacity=0.55)
    canvas.paint(stroke(upper_line, 0.0045), mouth.color * np.array([0.42, 0.35, 0.36]), blur=0.0015, opacity=0.75)

    fold = min(0.25 * smile + 0.3 * face.skin.age, 0.6)
    crease = spline(polyline([0.078, 0.112, 0.128], [0.165, 0.205, 0.255]))
    widths = 0.008 * np.sin(np.linspace(0.1, 1, len(crease)) * np.pi) + 0.001
    for side in SIDES:
        corner = geometry.face(np.array([[side * mouth.width * 1.02, line[0]]]), 0.03)[0]
        canvas.tint(ellipse(corner, (0.010, 0.008), count=12), (0.74, 0.66, 0.64), blur=0.005)
        shape = stroke(geometry.face(mirrored(crease, side), 0.03), widths)
        canvas.paint(shape, face.skin.color * np.array([0.62, 0.50, 0.47]), blur=0.005, opacity=fold)


def _paint_open_mouth(canvas: Canvas, face: Face, upper: np.ndarray, lower: np.ndarray, arch: np.ndarray) -> None:
    """Draws the inside of the mouth between the lower edge of the upper lip and the upper edge of the lower lip."""
    mouth = face.mouth
    canvas.paint(between(moved(upper, 0, -0.003), moved(lower, 0, 0.003)), (0.22, 0.06, 0.06), "mouth")
    opening = canvas.inside(between(upper, lower))
    edge = upper.copy()
    edge[:, 1] += min(0.024, 0.85 * mouth.gap) * arch**0.5
    teeth = between(moved(upper, 0, -0.004), edge)
    canvas.paint(teeth, mouth.teeth * np.array([0.96, 0.94, 0.90]), blur=0.002, within=opening)
    canvas.tint(stroke(upper, 0.012), (0.62, 0.55, 0.55), blur=0.003, within=opening)
    for end in (upper[:6], upper[-6:]):
        canvas.tint(stroke(end, 0.03), (0.45, 0.35, 0.35), blur=0.006, within=opening)
