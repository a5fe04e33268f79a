"""What lies behind and below the face: background, neck, clothes and necklace."""

import cv2
import numpy as np

from sisma_jax.data.drawing.canvas import Canvas, ellipse, smooth_noise, spline, stroke
from sisma_jax.data.drawing.geometry import Geometry
from sisma_jax.data.drawing.parameters import Background, Face

_BACKGROUND_CELLS = 48


def paint_background(canvas: Canvas, background: Background, rng: np.random.Generator) -> None:
    """Fills the canvas: a coarse picture, enlarged, as a background out of focus is."""
    n = _BACKGROUND_CELLS
    axis = (np.arange(n, dtype=np.float32) + 0.5) / n
    x, y = axis[None, :], axis[:, None]
    colors = background.colors.astype(np.float32)
    cos, sin = np.cos(background.angle), np.sin(background.angle)
    along = (0.5 + cos * (x - 0.5) + sin * (y - 0.5)).astype(np.float32)
    if background.kind == "outdoors":
        sky = np.array([0.62, 0.76, 0.92], np.float32) * (0.85 + 0.3 * (colors[0].mean() - 0.5))
        leaves = np.array([0.25, 0.42, 0.20], np.float32) * (0.7 + 0.8 * colors[1].mean())
        horizon = 0.25 + 0.5 * colors[2, 0] + 0.08 * np.sin(5 * x + background.angle)
        picture = _mix(sky * (1 - 0.25 * y[..., None]), leaves, _step(y - horizon, 0.08))
    else:
        picture = _mix(colors[0], colors[1], np.clip(along, 0, 1))
    if background.kind == "stripes":
        phase = np.sin(2 * np.pi * along * rng.uniform(2.0, 4.5) + rng.uniform(0, 6))
        picture = _mix(picture, colors[2], 0.5 * (1 + np.tanh(2 * phase)) * 0.8)
    if background.kind == "studio":
        distance = np.hypot(x - 0.5 - 0.3 * cos, y - 0.45 - 0.2 * sin)
        picture = picture * (1.12 - 0.75 * np.clip(distance, 0, 1) ** 1.5)[..., None]
    if background.kind in ("blobs", "outdoors"):
        for index in range(7):
            cx, cy = rng.uniform(-0.1, 1.1, 2)
            radius = rng.uniform(0.06, 0.22)
            disc = _step(radius - np.hypot(x - cx, y - cy), 0.035) * rng.uniform(0.2, 0.7)
            glow = np.clip(colors[index % 5] * rng.uniform(0.7, 1.5), 0, 1)
            picture = _mix(picture, glow, disc)
    picture = np.clip(np.ascontiguousarray(picture, np.float32), 0, 1)
    canvas.image[:] = cv2.resize(picture, (canvas.side, canvas.side), interpolation=cv2.INTER_LINEAR)
    canvas.image += 0.008 * smooth_noise(rng, (48, 48), canvas.side)[..., None]


def _mix(under: np.ndarray, over: np.ndarray, amount: np.ndarray) -> np.ndarray:
    return under + amount[..., None] * (over - under)


def _step(x: np.ndarray, softness: float) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(x / softness)


def paint_neck(canvas: Canvas, face: Face, geometry: Geometry, face_contour: np.ndarray) -> None:
    """Paints neck and bare shoulders, with the shadow that the chin throws on them."""
    w, skin, light = face.head.neck_width, face.skin.color, face.light
    half = np.array([[w * 1.02, 0.10], [w * 0.98, 0.28], [w, 0.37], [w * 1.18, 0.435], [0.36, 0.485], [0.62, 0.56], [0.70, 0.9]])
    both = geometry.body(spline(np.concatenate([half[::-1], half * [-1, 1]])))
    # Light falls off around the neck as around a column.
    center = geometry.body(np.array([[0.0, 0.4]]))[0]
    x = ((np.arange(canvas.side) + 0.5) / canvas.side - center[0]) / (w * 1.25)
    facing = np.clip(0.86 + 0.35 * light.contrast * light.direction[0] * x - 0.16 * np.minimum(x**2, 1.5), 0.35, 1.1)
    color = skin * (0.94 * light.ambient * (1 - light.contrast) + 0.94 * light.key * light.contrast)
    field = np.broadcast_to((facing[:, None] * color).astype(np.float32), (canvas.side, canvas.side, 3))
    canvas.paint(both, color=field, label="neck")
    inside = canvas.full(both)
    # The chin's shadow moves away from the light; the part under the jaw stays dark in any light.
    away = np.array([-0.10 * light.direction[0], 0.035 + 0.05 * max(-light.direction[1], 0)])
    canvas.tint(face_contour + away, factor=(0.58, 0.50, 0.48), blur=0.018, within=inside)
    canvas.tint(face_contour + [0, 0.012], factor=(0.72, 0.66, 0.64), blur=0.010, within=inside)
    for side in (-1, 1):
        tendon = geometry.body(spline(np.array([[side * w * 0.75, 0.36], [side * w * 0.42, 0.46], [side * 0.03, 0.53]])))
        canvas.paint(stroke(tendon, 0.012), color=skin * 0.66, blur=0.009, opacity=0.3, within=inside)
        bone = geometry.body(spline(np.array([[side * 0.035, 0.54], [side * 0.15, 0.522], [side * 0.30, 0.50]])))
        canvas.paint(stroke(bone, 0.014), color=np.clip(skin * 1.12, 0, 1), blur=0.008, opacity=0.35, within=inside)


def paint_clothes(canvas: Canvas, face: Face, geometry: Geometry, rng: np.random.Generator) -> None:
    """Paints what the subject wears."""
    clothes = face.clothes
    if clothes.neckline == "none":
        return
    top, w = clothes.height, face.head.neck_width
    edge = {
        "crew": [[w * 1.12, top - 0.005], [w * 0.75, top + 0.050], [0, top + 0.075]],
        "v": [[w * 1.15, top], [w * 0.6, top + 0.075], [0, top + 0.155]],
        "collar": [[w * 1.08, top - 0.035], [w * 0.6, top + 0.04], [0, top + 0.085]],
        "turtleneck": [[w * 1.06, top - 0.07], [w * 0.6, top - 0.035], [0, top - 0.025]],
        "wide": [[0.33, top + 0.04], [0.18, top + 0.085], [0, top + 0.10]],
    }[clothes.neckline]
    edge = np.array(edge, np.float64)
    rim = spline(np.concatenate([edge, edge[-2::-1] * [-1, 1]]), steps=6)
    shoulder = np.array([[0.27, top + 0.045], [0.42, top + 0.085], [0.60, top + 0.17], [0.66, 0.9]])
    if clothes.neckline == "wide":
        shoulder[0] = [0.37, top + 0.055]
    outline = spline(np.concatenate([edge[:1], shoulder]), steps=6)
    body = np.concatenate([outline, outline[::-1] * [-1, 1]])
    hull = geometry.body(np.concatenate([body, rim[::-1]]))
    canvas.paint(hull, color=_cloth(canvas, face, geometry, rng), label="cloth")
    inside = canvas.full(hull)
    canvas.tint(stroke(geometry.body(rim), 0.022), factor=(0.80, 0.80, 0.80), blur=0.004, within=inside)
    if clothes.neckline in ("collar",):
        for side in (-1, 1):
            flap = np.array([[w * 1.08, top - 0.04], [w * 0.35, top + 0.075], [w * 0.55, top + 0.145], [w * 1.45, top + 0.035]])
            contour = geometry.body(flap * [side, 1])
            canvas.tint(contour + [0.0, 0.012], factor=(0.65, 0.65, 0.66), blur=0.010, within=inside)
            shade = 0.92 + 0.22 * side * face.light.direction[0] * face.light.contrast
            color = clothes.second if clothes.pattern == "jacket" else np.clip(clothes.color * 1.12, 0, 1)
            canvas.paint(contour, color=color * shade, label="cloth")
    for _ in range(5):
        start = rng.uniform([-0.5, 0.46], [0.5, 0.54])
        fold = geometry.body(spline(start + np.array([[0, 0], [0.02, 0.05], [0.01, 0.12]]) * [np.sign(start[0]), 1]))
        canvas.tint(stroke(fold, 0.015), factor=(0.84, 0.84, 0.85), blur=0.010, within=inside)
    if clothes.neckline in ("crew", "turtleneck"):
        canvas.paint(stroke(geometry.body(rim + [0, 0.004]), 0.006), color=clothes.color * 0.7, blur=0.001, opacity=0.5, within=inside)


def _cloth(canvas: Canvas, face: Face, geometry: Geometry, rng: np.random.Generator) -> np.ndarray:
    """The cloth's colour over the canvas, float32 (side, side, 3)."""
    clothes, side = face.clothes, canvas.side
    axis = (np.arange(side, dtype=np.float32) + 0.5) / side
    origin = geometry.body(np.zeros((1, 2)))[0].astype(np.float32)
    x, y = axis[None, :] - origin[0], axis[:, None] - origin[1]
    if clothes.pattern == "stripes":
        # They follow the shoulders' slope.
        amount = 0.5 + 0.5 * np.tanh(3 * np.sin(2 * np.pi * (y - 0.25 * np.abs(x)) / 0.055))
    elif clothes.pattern == "check":
        amount = 0.35 * (np.sin(2 * np.pi * x / 0.08) > 0) + 0.35 * (np.sin(2 * np.pi * (y - 0.2 * np.abs(x)) / 0.08) > 0)
    elif clothes.pattern == "dots":
        amount = (np.sin(2 * np.pi * x / 0.07) * np.sin(2 * np.pi * y / 0.07) > 0.55).astype(np.float32)
    elif clothes.pattern == "jacket":
        # A lapel's edge runs from the neck down to the middle; inside lies the shirt.
        amount = 1 / (1 + np.exp(np.clip((np.abs(x) - 0.62 * (0.60 - y)) / 0.004, -30, 30)))
    else:
        amount = np.zeros((1, 1), np.float32)
    amount = np.broadcast_to(np.asarray(amount, np.float32), (side, side))
    color = _mix(clothes.color.astype(np.float32), clothes.second.astype(np.float32), amount)
    light = face.light
    shade = 0.86 + 0.5 * light.contrast * light.direction[0] * np.clip(x / 0.5, -1, 1) - 0.25 * np.clip(y - 0.45, 0, 1)
    shade = shade + 0.03 * smooth_noise(rng, (12, 24), side)
    return np.clip(color * shade[..., None], 0, 1)


def paint_necklace(canvas: Canvas, face: Face, geometry: Geometry) -> None:
    """Paints a necklace on the bare neck."""
    jewel = face.necklace
    if jewel is None:
        return
    w = face.head.neck_width
    t = np.linspace(-1, 1, 41)
    line = np.stack([w * 1.05 * t, 0.425 + 0.062 * (1 - t**2)], axis=1)
    place = geometry.body(line)
    width = {"chain": 0.010, "pearls": 0.0, "pendant": 0.008}[jewel.kind] * jewel.size
    if width:
        canvas.tint(stroke(place + [0, 0.008], width * 1.5), factor=(0.7, 0.65, 0.63), blur=0.004)
        canvas.paint(stroke(place, width), color=jewel.color, label="neck_l")
        canvas.paint(stroke(place - [0, 0.001], width * 0.35), color=np.clip(jewel.color * 1.35, 0, 1), opacity=0.8)
    if jewel.kind == "pearls":
        radius = 0.0105 * jewel.size
        canvas.tint(stroke(place + [0, 0.01], radius * 2), factor=(0.7, 0.65, 0.63), blur=0.005)
        for bead in place[::2]:
            canvas.paint(ellipse(bead, (radius, radius), points=12), color=jewel.color * 0.85, label="neck_l")
            canvas.paint(ellipse(bead - 0.3 * radius, (radius * 0.5, radius * 0.5), points=8), color=(1, 1, 1), blur=0.002, opacity=0.8)
    if jewel.kind == "pendant":
        center = place[len(place) // 2] + [0, 0.014]
        canvas.paint(ellipse(center, (0.014 * jewel.size, 0.018 * jewel.size), points=16), color=jewel.color * 0.8, label="neck_l")
        canvas.paint(ellipse(center - 0.003, (0.006, 0.008), points=10), color=np.clip(jewel.color * 1.5, 0, 1), blur=0.002)
