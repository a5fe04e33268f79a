"""Ears, the face's skin, eyes, brows, nose and mouth."""

import numpy as np

from sisma_jax.data.drawing.canvas import Canvas, ellipse, spline, stroke
from sisma_jax.data.drawing.geometry import EYE_U, Geometry
from sisma_jax.data.drawing.lighting import Relief, highlight, irradiance
from sisma_jax.data.drawing.parameters import Face

# The face's outline from the top of the skull to the chin: u, v, depth, for one half.
_OUTLINE = np.array(
    [
        [0.000, -0.405, -0.04],
        [0.125, -0.380, -0.04],
        [0.218, -0.290, -0.02],
        [0.262, -0.160, 0.00],
        [0.272, -0.030, 0.00],
        [0.266, 0.080, 0.00],
        [0.248, 0.180, 0.02],
        [0.208, 0.285, 0.07],
        [0.142, 0.365, 0.15],
        [0.072, 0.408, 0.21],
        [0.000, 0.420, 0.24],
    ]
)
_EAR = np.array(
    [[0.250, -0.020], [0.283, -0.045], [0.312, -0.030], [0.319, 0.015], [0.309, 0.070], [0.296, 0.115], [0.276, 0.138], [0.255, 0.110]]
)
EAR_Z = -0.03


def subject_side(side: int) -> str:
    """The subject's side that lies on the picture's left (-1) or right (+1)."""
    return "r" if side < 0 else "l"


def face_contour(face: Face, geometry: Geometry) -> np.ndarray:
    """Returns the outline of the whole head without hair and ears, in the picture."""
    head, half = face.head, _OUTLINE.copy()
    half[4:7, 0] *= head.cheeks
    half[7, 0] *= head.jaw
    half[8, 0] *= 0.5 * (head.jaw + head.chin)
    half[9, 0] *= head.chin
    half[:, 0] *= head.width
    half[7:, 1] += head.chin_drop * np.array([0.3, 0.7, 1, 1])
    both = np.concatenate([half, half[-2:0:-1] * [-1, 1, 1]])
    # On the side turned away the cheek's silhouette, not the ear's line, bounds the face.
    away = np.sign(both[:, 0]) == np.sign(geometry.yaw)
    both[:, 2] += np.where(away, 0.5 * np.abs(both[:, 0]) * np.abs(np.sin(geometry.yaw)), 0)
    return geometry.picture(spline(both, closed=True))


def ear_contour(face: Face, geometry: Geometry, side: int) -> np.ndarray:
    """Returns the outline of the ear on a side of the picture."""
    points = (_EAR - [0.25, 0.05]) * face.head.ear_size + [0.25, 0.05]
    return geometry.at_depth(spline(points * [side * face.head.width, 1], closed=True), EAR_Z)


def paint_ears(canvas: Canvas, face: Face, geometry: Geometry) -> None:
    """Paints both ears; the face, painted later, hides the one that is turned away."""
    for side in (-1, 1):
        contour = ear_contour(face, geometry, side)
        facing = 1 + 0.5 * side * face.light.direction[0] * face.light.contrast
        color = face.skin.color * [0.92, 0.82, 0.80] * facing
        canvas.paint(contour, color=color, label=f"{subject_side(side)}_ear")
        middle = contour.mean(0)
        canvas.paint(middle + (contour - middle) * [0.55, 0.68], color=color * [0.72, 0.62, 0.60], blur=0.006, opacity=0.8)


def paint_skin(canvas: Canvas, face: Face, geometry: Geometry, relief: Relief, contour: np.ndarray) -> np.ndarray:
    """Paints the lit skin of the face.

    Returns:
      The light on the face, float32 RGB (side, side, 3), for what is painted on it.
    """
    skin, normal = face.skin, relief.normal
    light = irradiance(normal, face.light)
    albedo = _complexion(face, relief)
    gleam = highlight(normal, face.light, 14.0) * (0.10 + 0.12 * skin.shine) * (0.6 + 0.4 * skin.color.mean())
    # Light that leaves the skin after scattering in it is red: shadows turn warm, not grey.
    scattered = light ** np.array([0.86, 1.05, 1.10], np.float32)
    lit = (albedo * scattered + gleam[..., None] * face.light.key.astype(np.float32)).astype(np.float32)
    canvas.paint(contour, color=relief.to_picture(lit, canvas.side), label="skin")
    return relief.to_picture(light, canvas.side)


def _complexion(face: Face, relief: Relief) -> np.ndarray:
    """The skin's own colour over the face: redder cheeks and nose, darker eye sockets, a beard's shadow."""
    skin, spot, mouth = face.skin, relief.spot, face.mouth
    red = sum(spot(side * 0.15, 0.13, (0.075, 0.06)) for side in (-1, 1)) * (0.4 + 0.6 * skin.blush)
    red = red + 0.7 * spot(0, face.nose.length - 0.035, (0.05, 0.04), 0.08) + 0.4 * spot(0, mouth.height + 0.11, (0.06, 0.05))
    dark = sum(spot(side * EYE_U, -0.005, (0.06, 0.038)) for side in (-1, 1)) * 0.16
    dark = dark + sum(spot(side * EYE_U * 0.9, 0.038, (0.045, 0.012)) for side in (-1, 1)) * (0.05 + 0.14 * skin.age)
    albedo = np.broadcast_to(skin.color.astype(np.float32), (*red.shape, 3)).copy()
    albedo *= 1 - red[..., None] * np.array([0.0, 0.11, 0.10], np.float32)
    albedo *= 1 - dark[..., None] * np.array([0.8, 1.0, 0.95], np.float32)
    if skin.stubble:
        beard = spot(0, mouth.height + 0.10, (0.20, 0.095)) + sum(spot(s * 0.20, 0.20, (0.05, 0.13)) for s in (-1, 1))
        beard = np.clip(1.2 * beard + 0.7 * spot(0, mouth.height - 0.04, (0.085, 0.020)), 0, 1) * (0.25 + 0.45 * skin.stubble)
        hair = (0.6 * face.brows.color + 0.25 * skin.color).astype(np.float32)
        albedo += beard[..., None] * (hair - albedo)
    return albedo


def paint_eyes(canvas: Canvas, face: Face, geometry: Geometry, light: np.ndarray) -> None:
    """Paints both eyes with lids and lashes."""
    for side in (-1, 1):
        _paint_eye(canvas, face, geometry, side, light)


def _paint_eye(canvas: Canvas, face: Face, geometry: Geometry, side: int, light: np.ndarray) -> None:
    eyes, skin = face.eyes, face.skin.color
    half = 0.042 * eyes.size
    t = np.linspace(0, 1, 17)
    x = half * (2 * t - 1)
    base = 0.004 + (-eyes.tilt - 0.006) * t
    upper = base - 0.0185 * eyes.opening * eyes.size * np.sin(np.pi * t**0.88) ** 0.8
    lower = base + 0.0115 * eyes.size * (0.7 + 0.3 * eyes.opening) * np.sin(np.pi * t**1.12) ** 0.85

    def place(y: np.ndarray, x: np.ndarray = x) -> np.ndarray:
        return geometry.face(np.stack([side * (EYE_U * eyes.spacing + x), y], axis=1))

    crease = upper - eyes.lid * np.sin(np.pi * t) ** 0.5
    lid = np.concatenate([place(crease), place(upper)[::-1]])
    canvas.paint(lid, color=skin * 0.80, blur=0.003, opacity=0.35)
    if eyes.shadow_strength > 0.05:
        canvas.paint(lid, color=eyes.shadow, blur=0.006, opacity=eyes.shadow_strength)
    canvas.paint(stroke(place(crease), 0.004 * np.sin(np.pi * t) ** 0.5 + 0.0005), color=skin * [0.50, 0.40, 0.37], blur=0.0018, opacity=0.6)

    almond = np.concatenate([place(upper), place(lower)[::-1]])
    inside = canvas.full(almond)
    local = light[tuple(np.clip((almond.mean(0)[::-1] * canvas.side).astype(int), 0, canvas.side - 1))]
    canvas.paint(almond, color=np.array([0.90, 0.88, 0.86]) * np.clip(local, 0.45, 1.05), label=f"{subject_side(side)}_eye")
    canvas.paint(ellipse(place(base[:1], x[:1])[0], (0.008, 0.006)), color=skin * [0.95, 0.65, 0.62], within=inside, opacity=0.8)

    center = place(np.array([-0.0015 + eyes.gaze[1]]), np.array([side * eyes.gaze[0]]))[0]
    radius, tilt = 0.0185 * geometry.scale, (np.cos(geometry.yaw), 1.0)
    rounds = ((1.0, eyes.iris * 0.35, 0.0015), (0.84, eyes.iris, 0.002), (0.46, (0.02, 0.02, 0.025), 0.001))
    for factor, color, blur in rounds:
        contour = ellipse(center, (radius * factor * tilt[0], radius * factor), points=20)
        canvas.paint(contour, color=np.asarray(color) * np.clip(local, 0.5, 1.1), blur=blur, within=inside)
    glow = ellipse(center + [0, 0.55 * radius], (0.5 * radius, 0.28 * radius), points=12)
    canvas.paint(glow, color=np.clip(eyes.iris * 1.7, 0, 1), blur=0.003, opacity=0.6, within=inside)
    canvas.tint(stroke(place(upper), 0.016), factor=(0.55, 0.52, 0.52), blur=0.003, within=inside)
    catch = center + radius * np.array([0.42, -0.42]) * [np.sign(face.light.direction[0]) or 1, 1]
    canvas.paint(ellipse(catch, (0.0048, 0.0048), points=10), color=(1, 1, 1), blur=0.0008, opacity=0.9, within=inside)

    lash = np.minimum(0.25, skin * 0.25)
    taper = (0.2 + 0.8 * t**0.6) * (0.0055 + 0.0065 * eyes.liner)
    line = np.stack([x * (1 + 0.10 * eyes.liner * t), upper - 0.001 - 0.006 * eyes.liner * t**6], axis=1)
    canvas.paint(stroke(place(line[:, 1], line[:, 0]), taper), color=lash, blur=0.001, opacity=0.92)
    canvas.paint(stroke(place(lower + 0.001), 0.0035 * np.sin(np.pi * t) ** 0.5), color=lash * 1.6, blur=0.001, opacity=0.25 + 0.4 * eyes.liner)
    bag = lower + 0.016 + 0.006 * np.sin(np.pi * t)
    canvas.paint(stroke(place(bag), 0.004 * np.sin(np.pi * t)), color=skin * [0.62, 0.5, 0.47], blur=0.004, opacity=0.15 + 0.4 * face.skin.age)


def paint_brows(canvas: Canvas, face: Face, geometry: Geometry, light: np.ndarray) -> None:
    """Paints both eyebrows."""
    brows = face.brows
    t = np.linspace(0, 1, 15)
    u = EYE_U * face.eyes.spacing - 0.066 + brows.length * t
    v = -brows.height - brows.slope * t - brows.arch * np.sin(np.pi * t**1.25) + 0.014 * t**4
    width = brows.thickness * np.minimum(1, 0.72 + 2 * t) * (1 - t**2.2) ** 0.75 + 0.003
    for side in (-1, 1):
        contour = stroke(geometry.face(np.stack([side * u, v], axis=1)), width)
        inside = contour.mean(0) + (contour - contour.mean(0)) * [0.985, 0.85]
        canvas.paint(contour, color=brows.color * np.clip(light, 0.4, 1.1), blur=0.0025, opacity=0.55)
        canvas.paint(inside, color=brows.color * np.clip(light, 0.4, 1.1) * 0.9, blur=0.003, opacity=0.7)
        canvas.mark(contour, label=f"{subject_side(side)}_brow")


def paint_nose(canvas: Canvas, face: Face, geometry: Geometry) -> None:
    """Labels the nose, whose form the relief shows, and draws nostrils and wings."""
    nose, skin = face.nose, face.skin.color
    w, end = nose.width, nose.length
    half = np.array(
        [
            [0.020, -0.005, 0.01],
            [0.022, 0.05, 0.02],
            [0.030, end - 0.090, 0.04],
            [0.054, end - 0.062, 0.04],
            [0.070, end - 0.036, 0.03],
            [0.060, end - 0.012, 0.03],
            [0.030, end - 0.006, 0.06],
            [0.000, end + 0.002, 0.07],
        ]
    ) * [w, 1, nose.height]
    both = np.concatenate([half, half[-2::-1] * [-1, 1, 1]])
    contour = geometry.face(both[:, :2], both[:, 2])
    canvas.mark(spline(contour, closed=True, steps=5), label="nose")

    # Below the tip lies a shadow, the longer the higher the light.
    drop = 0.012 + 0.02 * max(-face.light.direction[1], 0)
    below = geometry.face([[-0.045 * w, end - 0.014], [0.045 * w, end - 0.014], [0.025 * w, end + drop], [-0.025 * w, end + drop]], 0.04)
    canvas.tint(below, factor=(0.78, 0.70, 0.68), blur=0.008)
    for side in (-1, 1):
        wing = np.array([[0.056, end - 0.068], [0.071, end - 0.048], [0.073, end - 0.026], [0.060, end - 0.010]]) * [side * w, 1]
        line = spline(geometry.face(wing, 0.03), steps=5)
        widths = 0.006 * np.sin(np.linspace(0.15, 0.95, len(line)) * np.pi)
        canvas.paint(stroke(line, widths), color=skin * [0.60, 0.46, 0.43], blur=0.003, opacity=0.55)
        hole = geometry.face([[side * 0.028 * w, end - 0.013]], 0.07)[0]
        canvas.paint(ellipse(hole, (0.0145 * w, 0.0062), -0.35 * side, 16), color=skin * [0.30, 0.19, 0.17], blur=0.0022, opacity=0.85)


def paint_mouth(canvas: Canvas, face: Face, geometry: Geometry, light: np.ndarray) -> None:
    """Paints lips, and teeth where they are parted."""
    mouth, skin = face.mouth, face.skin.color
    x = np.linspace(-1, 1, 25)
    arch = np.maximum(1 - x**2, 0)
    line = mouth.height - 0.030 * mouth.smile * x**2 + 0.0035 * np.exp(-((x / 0.25) ** 2)) + 0.006 * max(mouth.smile, 0)
    top = line - mouth.upper * arch**0.75 * (1 - 0.28 * np.exp(-((x / 0.13) ** 2))) - 0.3 * mouth.gap * arch**0.8
    upper_edge = line - 0.3 * mouth.gap * arch**0.8 + 0.0002
    lower_edge = line + 0.7 * mouth.gap * arch**0.7
    bottom = lower_edge + mouth.lower * arch**0.6 + 0.002 * arch
    color = mouth.color * np.clip(light, 0.35, 1.2)

    def place(y: np.ndarray) -> np.ndarray:
        return geometry.face(np.stack([mouth.width * x, y], axis=1), 0.035)

    canvas.tint(np.concatenate([place(bottom + 0.004), place(bottom + 0.022)[::-1]])[4:-4], factor=(0.86, 0.80, 0.79), blur=0.008)
    if mouth.gap:
        inside = np.concatenate([place(upper_edge - 0.003), place(lower_edge + 0.003)[::-1]])
        canvas.paint(inside, color=np.array([0.22, 0.06, 0.06]), label="mouth")
        clip = canvas.full(np.concatenate([place(upper_edge), place(lower_edge)[::-1]]))
        fall = np.minimum(0.024, 0.85 * mouth.gap) * arch**0.5
        teeth = np.concatenate([place(upper_edge - 0.004), place(upper_edge + fall)[::-1]])
        canvas.paint(teeth, color=mouth.teeth * np.array([0.96, 0.94, 0.90]), blur=0.002, within=clip)
        canvas.tint(stroke(place(upper_edge), 0.012), factor=(0.62, 0.55, 0.55), blur=0.003, within=clip)
        for end in (slice(0, 6), slice(-6, None)):
            canvas.tint(stroke(place(line)[end], 0.03), factor=(0.45, 0.35, 0.35), blur=0.006, within=clip)
    upper_lip = np.concatenate([place(top), place(upper_edge)[::-1]])
    lower_lip = np.concatenate([place(lower_edge), place(bottom)[::-1]])
    canvas.paint(upper_lip, color=color * 0.88, blur=0.0015)
    canvas.paint(lower_lip, color=color, blur=0.0015)
    canvas.mark(upper_lip, label="u_lip")
    canvas.mark(lower_lip, label="l_lip")
    middle = (lower_edge + bottom)[6:-6] / 2
    gleam = geometry.face(np.stack([mouth.width * x[6:-6], middle], axis=1), 0.035)
    canvas.paint(stroke(gleam, 0.008 * arch[6:-6]), color=np.clip(mouth.color * 1.25 + 0.16, 0, 1), blur=0.004, opacity=0.55)
    canvas.paint(stroke(place(upper_edge), 0.0045), color=mouth.color * [0.42, 0.35, 0.36], blur=0.0015, opacity=0.75)
    for side in (-1, 1):
        corner = geometry.face([[side * mouth.width * 1.02, line[0]]], 0.03)[0]
        canvas.tint(ellipse(corner, (0.010, 0.008), points=12), factor=(0.74, 0.66, 0.64), blur=0.005)
        fold = max(mouth.smile, 0) * 0.5 + 0.6 * face.skin.age
        points = np.array([[0.078, 0.165], [0.112, 0.205], [0.128, 0.255]]) * [side, 1]
        crease = spline(geometry.face(points, 0.03), steps=6)
        widths = 0.008 * np.sin(np.linspace(0.1, 1, len(crease)) * np.pi) + 0.001
        canvas.paint(stroke(crease, widths), color=skin * [0.62, 0.50, 0.47], blur=0.005, opacity=min(0.5 * fold, 0.6))
