"""Draws the background, the neck and the clothes."""

import math

import numpy as np

from sisma_jax.data.drawing.canvas import Canvas, spread
from sisma_jax.data.drawing.contours import between, mirrored, moved, polyline, spline, stroke, symmetric
from sisma_jax.data.drawing.geometry import Geometry
from sisma_jax.data.drawing.lighting import per_channel
from sisma_jax.data.drawing.parameters import Background, Face
from sisma_jax.data.drawing.skin import SIDES

_CELLS = 32


def paint_background(canvas: Canvas, background: Background, rng: np.random.Generator) -> None:
    """Fills the canvas with a background that is out of focus: a coarse image, enlarged."""
    axis = (np.arange(_CELLS, dtype=np.float32) + 0.5) / _CELLS
    x, y = axis[None, :], axis[:, None]
    colors = background.colors.astype(np.float32)[:, :, None, None]
    cos, sin = math.cos(background.angle), math.sin(background.angle)
    along = (0.5 + cos * (x - 0.5) + sin * (y - 0.5)).astype(np.float32)
    if background.kind == "outdoors":
        sky = per_channel(np.array([0.62, 0.76, 0.92])) * (0.85 + 0.3 * (colors[0].mean() - 0.5))
        leaves = per_channel(np.array([0.25, 0.42, 0.20])) * (0.7 + 0.8 * colors[1].mean())
        horizon = 0.25 + 0.5 * colors[2, 0].item() + 0.08 * np.sin(5 * x + background.angle)
        picture = _mix(sky * (1 - 0.25 * y), leaves, _step(y - horizon, 0.08))
    else:
        picture = _mix(colors[0], colors[1], np.clip(along, 0, 1))
    if background.kind == "stripes":
        phase = np.sin(2 * np.pi * along * rng.uniform(2.0, 4.5) + rng.uniform(0, 6))
        picture = _mix(picture, colors[2], 0.8 * _step(phase, 0.5))
    if background.kind == "studio":
        distance = np.hypot(x - 0.5 - 0.3 * cos, y - 0.45 - 0.2 * sin)
        picture = picture * (1.12 - 0.75 * np.clip(distance, 0, 1) ** 1.5)
    if background.kind in ("blobs", "outdoors"):
        for index in range(7):
            center_x, center_y, radius = rng.uniform(-0.1, 1.1), rng.uniform(-0.1, 1.1), rng.uniform(0.06, 0.22)
            disc = _step(radius - np.hypot(x - center_x, y - center_y), 0.035) * rng.uniform(0.2, 0.7)
            glow = np.clip(colors[index % len(colors)] * rng.uniform(0.7, 1.5), 0, 1)
            picture = _mix(picture, glow, disc)
    canvas.image[:] = spread(np.clip(picture, 0, 1), canvas.side)


def _mix(under: np.ndarray, over: np.ndarray, amount: np.ndarray) -> np.ndarray:
    return under + amount * (over - under)


def _step(x: np.ndarray, softness: float) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(x / softness)


def paint_neck(canvas: Canvas, face: Face, geometry: Geometry, face_contour: np.ndarray) -> None:
    """Draws neck and bare shoulders, with the shadow of the chin.

    Args:
      canvas: canvas to draw on.
      face: parameters of the face.
      geometry: projection of the face.
      face_contour: contour (P, 2) of the head in the image.
    """
    w, skin, light = face.head.neck_width, face.skin.color, face.light
    u = [0.70, 0.62, 0.36, w * 1.18, w, w * 0.98, w * 1.02]
    v = [0.90, 0.56, 0.485, 0.435, 0.37, 0.28, 0.10]
    half = geometry.body(spline(polyline(u, v)))
    other = geometry.body(mirrored(spline(polyline(u, v)), -1))
    contour = between(half, other)
    # The neck is shaded as a vertical cylinder.
    middle = geometry.body(np.array([[0.0, 0.4]]))[0, 0]
    x = ((np.arange(canvas.side, dtype=np.float32) + 0.5) / canvas.side - middle) / (w * 1.25)
    facing = np.clip(0.86 + 0.35 * light.contrast * light.direction[0] * x - 0.16 * np.minimum(x**2, 1.5), 0.35, 1.1)
    color = 0.94 * skin * (light.ambient * (1 - light.contrast) + light.key * light.contrast)
    field = np.broadcast_to(per_channel(color) * facing, (3, canvas.side, canvas.side))
    canvas.paint(contour, field, "neck")
    inside = canvas.inside(contour)
    # The shadow of the chin moves away from the light. The part under the jaw is dark in any light.
    jaw = face_contour[face_contour[:, 1] > face_contour[:, 1].mean()]
    cast = moved(jaw, -0.10 * light.direction[0], 0.035 + 0.05 * max(-light.direction[1], 0))
    canvas.tint(cast, (0.58, 0.50, 0.48), blur=0.018, within=inside)
    canvas.tint(moved(jaw, 0, 0.012), (0.72, 0.66, 0.64), blur=0.010, within=inside)
    tendon = spline(polyline([w * 0.75, w * 0.42, 0.03], [0.36, 0.46, 0.53]))
    collarbone = spline(polyline([0.035, 0.15, 0.30], [0.54, 0.522, 0.50]))
    for side in SIDES:
        shape = stroke(geometry.body(mirrored(tendon, side)), 0.012)
        canvas.paint(shape, skin * 0.66, blur=0.009, opacity=0.3, within=inside)
        shape = stroke(geometry.body(mirrored(collarbone, side)), 0.014)
        canvas.paint(shape, np.clip(skin * 1.12, 0, 1), blur=0.008, opacity=0.35, within=inside)


def paint_clothes(canvas: Canvas, face: Face, geometry: Geometry, rng: np.random.Generator) -> None:
    """Draws the clothes, with random folds."""
    clothes, top, w = face.clothes, face.clothes.height, face.head.neck_width
    if clothes.neckline == "none":
        return
    # Half of the neckline, from the shoulder to the middle.
    u, v = {
        "crew": ([w * 1.12, w * 0.75, 0], [-0.005, 0.050, 0.075]),
        "v": ([w * 1.15, w * 0.6, 0], [0.0, 0.075, 0.155]),
        "collar": ([w * 1.08, w * 0.6, 0], [-0.035, 0.04, 0.085]),
        "turtleneck": ([w * 1.06, w * 0.6, 0], [-0.07, -0.035, -0.025]),
        "wide": ([0.33, 0.18, 0], [0.04, 0.085, 0.10]),
    }[clothes.neckline]
    edge = polyline(u, np.add(v, top))
    neckline = geometry.body(spline(symmetric(edge)))
    shoulder = polyline(
        [0.37 if clothes.neckline == "wide" else 0.27, 0.42, 0.60, 0.66], np.add([0.05, 0.085, 0.17, 0.5], top)
    )
    outline = spline(np.concatenate([edge[:1], shoulder]))
    outline = geometry.body(between(outline, mirrored(outline, -1)))
    contour = np.concatenate([outline, neckline[::-1]])
    canvas.paint(contour, _cloth(canvas, face, geometry, contour), "cloth")
    inside = canvas.inside(contour)
    canvas.tint(stroke(neckline, 0.022), (0.80, 0.80, 0.80), blur=0.004, within=inside)
    if clothes.neckline == "collar":
        color = clothes.second if clothes.pattern == "jacket" else np.clip(clothes.color * 1.12, 0, 1)
        flap = polyline(np.multiply([1.08, 0.35, 0.55, 1.45], w), np.add([-0.04, 0.075, 0.145, 0.035], top))
        for side in SIDES:
            shape = geometry.body(mirrored(flap, side))
            canvas.tint(moved(shape, 0, 0.012), (0.65, 0.65, 0.66), blur=0.010, within=inside)
            facing = 0.92 + 0.22 * side * face.light.direction[0] * face.light.contrast
            canvas.paint(shape, color * facing, "cloth")
    elif clothes.neckline in ("crew", "turtleneck"):
        seam = stroke(moved(neckline, 0, 0.004), 0.006)
        canvas.paint(seam, clothes.color * 0.7, blur=0.001, opacity=0.5, within=inside)
    for _ in range(4):
        start = rng.uniform([-0.5, 0.46], [0.5, 0.54])
        fold = mirrored(spline(polyline([0, 0.02, 0.01], [0, 0.05, 0.12])), 1 if start[0] > 0 else -1) + start
        canvas.tint(stroke(geometry.body(fold), 0.015), (0.84, 0.84, 0.85), blur=0.010, within=inside)


def _cloth(canvas: Canvas, face: Face, geometry: Geometry, contour: np.ndarray) -> np.ndarray:
    """Returns the colour of the cloth, float32 RGB (3, side, side). Rows above the contour are black."""
    clothes, light = face.clothes, face.light
    first = int(np.clip(contour[:, 1].min() * canvas.side - 2, 0, canvas.side))
    axis = (np.arange(canvas.side, dtype=np.float32) + 0.5) / canvas.side
    origin = geometry.body(np.zeros((1, 2)))[0].astype(np.float32)
    x, y = axis[None, :] - origin[0], axis[first:, None] - origin[1]
    if clothes.pattern == "stripes":
        # The stripes follow the slope of the shoulders.
        amount = _step(np.sin(2 * np.pi * (y - 0.25 * np.abs(x)) / 0.055), 0.33)
    elif clothes.pattern == "check":
        down = y - 0.2 * np.abs(x)
        amount = 0.35 * (_step(np.sin(2 * np.pi * x / 0.08), 0.1) + _step(np.sin(2 * np.pi * down / 0.08), 0.1))
    elif clothes.pattern == "dots":
        amount = _step(np.sin(2 * np.pi * x / 0.07) * np.sin(2 * np.pi * y / 0.07) - 0.55, 0.1)
    elif clothes.pattern == "jacket":
        # The edge of a lapel runs from the neck down to the middle; the shirt is inside.
        amount = _step(0.62 * (0.60 - y) - np.abs(x), 0.008)
    else:
        amount = np.zeros_like(x + y)
    color = _mix(per_channel(clothes.color), per_channel(clothes.second), amount)
    slant = np.float32(0.5 * light.contrast * light.direction[0])
    shade = 0.86 + slant * np.clip(2 * x, -1, 1) - 0.25 * np.clip(y - 0.45, 0, 1)
    field = np.zeros((3, canvas.side, canvas.side), np.float32)
    np.clip(color * shade, 0, 1, out=field[:, first:])
    return field
