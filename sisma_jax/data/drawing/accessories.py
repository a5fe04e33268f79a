"""Glasses, hats and earrings."""

import numpy as np

from sisma_jax.data.drawing.canvas import Canvas, ellipse, spline, stroke
from sisma_jax.data.drawing.features import EAR_Z
from sisma_jax.data.drawing.geometry import EYE_U, Geometry
from sisma_jax.data.drawing.parameters import Face

# Half of a lens, relative to the eye, for the subject's left eye: towards the ear is +u.
_LENSES = {
    "round": ellipse(np.array([0.004, 0.012]), (0.080, 0.070), points=16),
    "rectangle": np.array([[-0.078, -0.030], [0.0, -0.042], [0.085, -0.038], [0.092, 0.0], [0.080, 0.046], [0.0, 0.052], [-0.068, 0.042], [-0.080, 0.005]]),
    "aviator": np.array([[-0.075, -0.032], [0.0, -0.044], [0.085, -0.034], [0.092, 0.02], [0.055, 0.076], [0.0, 0.085], [-0.045, 0.062], [-0.078, 0.01]]),
    "cat": np.array([[-0.076, -0.024], [0.0, -0.044], [0.070, -0.062], [0.108, -0.066], [0.092, 0.005], [0.050, 0.050], [-0.020, 0.052], [-0.070, 0.030]]),
}


def paint_glasses(canvas: Canvas, face: Face, geometry: Geometry, light: np.ndarray) -> None:
    """Paints frame and lenses; clear lenses show the eyes, which keep their labels behind them."""
    glasses = face.glasses
    if glasses is None:
        return
    eye = EYE_U * face.eyes.spacing
    kept = canvas.labels.copy()
    lenses = []
    for side in (-1, 1):
        points = spline(_LENSES[glasses.shape], closed=True, steps=5)
        lenses.append(geometry.at_depth((points + [eye, 0]) * [side, 1], 0.30))
    shadow = [lens + [-0.02 * face.light.direction[0], 0.016] for lens in lenses]
    for lens, dark in zip(lenses, shadow, strict=True):
        ring = np.concatenate([dark, dark[:1]])
        canvas.tint(stroke(ring, glasses.thickness * 1.4), factor=(0.75, 0.70, 0.69), blur=0.006)
        canvas.paint(lens, color=glasses.tint * np.clip(light, 0.5, 1.1), label="eye_g", opacity=glasses.opacity)
        inside = canvas.full(lens)
        middle, span = lens.mean(0), np.ptp(lens, axis=0)
        glare = middle + span * np.array([[-0.10, -0.6], [0.14, -0.6], [-0.14, 0.6], [-0.38, 0.6]])
        canvas.paint(glare, color=(1, 1, 1), blur=0.010, opacity=0.16, within=inside)
    frame = glasses.color * np.clip(light, 0.5, 1.2)
    bridge = geometry.at_depth(spline(np.array([[-eye + 0.076, 0.0], [0, -0.014], [eye - 0.076, 0.0]])), 0.33)
    lines = [(bridge, glasses.thickness)] + [(np.concatenate([lens, lens[:2]]), glasses.thickness) for lens in lenses]
    for side in (-1, 1):
        # The temples run back to the ears.
        temple = np.array([[side * (eye + 0.086), -0.012, 0.28], [side * 0.262 * face.head.width, -0.016, 0.04]])
        lines.append((geometry.picture(np.linspace(*temple, 8)), glasses.thickness * 0.9))
    for line, width in lines:
        canvas.paint(stroke(line, width), color=frame, label="eye_g", blur=0.0008)
        canvas.paint(stroke(line - [0, 0.15 * width], width * 0.3), color=np.clip(glasses.color + 0.35, 0, 1), blur=0.001, opacity=0.45)
    if glasses.opacity < 0.5:
        # CelebAMask-HQ paints eyes and brows over glasses.
        from sisma_jax.data.labels import INDEX

        over = np.isin(kept, [INDEX[name] for name in ("l_eye", "r_eye", "l_brow", "r_brow")])
        canvas.labels[over] = kept[over]


def paint_hat(canvas: Canvas, face: Face, geometry: Geometry, within: np.ndarray) -> None:
    """Paints a hat over the hair, and its shadow on the face (`within`: the face's opacity)."""
    hat = face.hat
    if hat is None:
        return
    hair, light = face.hair, face.light
    wide = 0.285 * face.head.width + max(hair.side, 0.02) * 0.8
    low = {"beanie": -0.175, "cap": -0.19, "brim": -0.205, "scarf": -0.21}[hat.kind]
    turn = np.linspace(0, np.pi, 13)
    height = 0.29 if hat.kind in ("cap", "scarf") else 0.36
    crown = np.stack([wide * np.cos(turn), low - height * np.sin(turn) ** 0.7], axis=1)
    sag = np.array([[-wide * 0.98, low + 0.075], [-wide * 0.6, low + 0.02], [0, low], [wide * 0.6, low + 0.02], [wide * 0.98, low + 0.075]])
    rim = np.concatenate([sag[:1] * [1.02, 1], sag[1:-1], sag[-1:] * [1.02, 1]])
    lift = np.array([0.0, 0.16, 0.26, 0.16, 0.0])
    edge = geometry.picture(spline(np.concatenate([rim, lift[:, None]], axis=1)))
    dome = geometry.at_depth(spline(crown), -0.02)
    contour = np.concatenate([dome, edge])
    axis = (np.arange(canvas.side, dtype=np.float32) + 0.5) / canvas.side
    middle, reach = contour[:, 0].mean(), np.ptp(contour[:, 0]) / 2
    across = ((axis - middle) / reach)[None, :]
    shade = np.clip(0.95 + 0.45 * light.contrast * light.direction[0] * across - 0.28 * across**2, 0.3, 1.15)
    shade = np.broadcast_to(shade, (canvas.side, canvas.side))
    field = shade[..., None] * hat.color.astype(np.float32)
    canvas.tint(edge_shadow(edge, 0.06), factor=(0.55, 0.50, 0.50), blur=0.014, within=within)
    canvas.paint(contour, color=field, label="hat")
    inside = canvas.full(contour)
    if hat.kind == "beanie":
        band = np.concatenate([edge, edge[::-1] - [0, 0.075 * geometry.scale]])
        canvas.paint(band, color=shade[..., None] * hat.second.astype(np.float32), label="hat", within=np.maximum(inside, 0))
        canvas.tint(stroke(edge - [0, 0.075], 0.01), factor=(0.7, 0.7, 0.7), blur=0.004, within=inside)
        ribs = np.linspace(edge[0], edge[-1], 25)
        for x in ribs[1:-1, 0]:
            y = np.interp(x, np.sort(edge[:, 0]), edge[np.argsort(edge[:, 0]), 1])
            canvas.tint(stroke(np.array([[x, y - 0.075], [x, y]]), 0.005), factor=(0.8, 0.8, 0.8), blur=0.002, within=inside)
    elif hat.kind == "cap":
        visor = np.array([[-0.235, low + 0.045, 0.16], [-0.20, low + 0.07, 0.38], [0.0, low + 0.055, 0.50], [0.20, low + 0.07, 0.38], [0.235, low + 0.045, 0.16]])
        back = np.array([[0.15, low - 0.01, 0.24], [0.0, low - 0.03, 0.28], [-0.15, low - 0.01, 0.24]])
        brim = geometry.picture(spline(np.concatenate([visor, back]), closed=True))
        canvas.tint(brim + [-0.02 * light.direction[0], 0.055], factor=(0.60, 0.55, 0.55), blur=0.018, within=within)
        canvas.paint(brim, color=shade[..., None] * (hat.second * 0.8).astype(np.float32), label="hat")
        canvas.tint(stroke(brim[: len(brim) // 2], 0.012), factor=(0.6, 0.6, 0.6), blur=0.004, within=canvas.full(brim))
        for u in (-0.11, 0.0, 0.11):
            seam = geometry.picture(spline(np.array([[u * 1.4, low, 0.26], [u * 1.2, low - 0.15, 0.2], [u * 0.5, low - 0.28, 0.0]])))
            canvas.tint(stroke(seam, 0.005), factor=(0.75, 0.75, 0.75), blur=0.002, within=inside)
        canvas.paint(ellipse(geometry.picture(np.array([[0, low - 0.09, 0.25]]))[0], (0.045, 0.04)), color=hat.second, blur=0.002, opacity=0.9)
    elif hat.kind == "brim":
        around = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        disc = np.stack([(wide + 0.15) * np.cos(around), low + 0.035 + 0.065 * np.sin(around) - 0.03 * np.cos(around) ** 2, np.full(24, 0.02)], axis=1)
        brim = geometry.picture(spline(disc, closed=True))
        canvas.tint(brim + [0, 0.05], factor=(0.62, 0.57, 0.57), blur=0.018, within=within)
        band = np.concatenate([edge - [0, 0.02], edge[::-1] - [0, 0.10]])
        canvas.paint(band, color=shade[..., None] * hat.second.astype(np.float32), within=inside)
        canvas.paint(brim, color=shade[..., None] * (hat.color * 0.92).astype(np.float32), label="hat")
        canvas.tint(stroke(edge - [0, 0.02], 0.02), factor=(0.6, 0.6, 0.6), blur=0.006, within=canvas.full(brim))
    else:
        for index in range(4):
            fold = geometry.picture(spline(np.array([[-wide * 0.9, low - 0.02 - 0.07 * index, 0.02], [0.0, low - 0.05 - 0.075 * index, 0.25 - 0.05 * index], [wide * 0.9, low + 0.03 - 0.08 * index, 0.02]])))
            canvas.tint(stroke(fold, 0.014), factor=(0.78, 0.78, 0.78), blur=0.006, within=inside)
            canvas.paint(stroke(fold - [0, 0.02], 0.012), color=hat.second, blur=0.004, opacity=0.5, within=inside)


def edge_shadow(edge: np.ndarray, depth: float) -> np.ndarray:
    """The strip below a hat's edge that lies in its shadow."""
    return np.concatenate([edge - [0, 0.02], edge[::-1] + [0, depth]])


def paint_earrings(canvas: Canvas, face: Face, geometry: Geometry, visible: tuple[bool, bool]) -> None:
    """Paints earrings below the ears that can be seen (picture's left, right)."""
    jewel = face.earring
    if jewel is None:
        return
    for side, seen in zip((-1, 1), visible, strict=True):
        if not seen:
            continue
        lobe = geometry.at_depth(np.array([[side * 0.292 * face.head.width, 0.135]]), EAR_Z)[0]
        bright = np.clip(jewel.color * 1.4, 0, 1)
        if jewel.kind == "stud":
            shapes = [ellipse(lobe, (0.014 * jewel.size, 0.014 * jewel.size), points=12)]
        elif jewel.kind == "drop":
            long = 0.075 * jewel.size
            shapes = [stroke(np.linspace(lobe, lobe + [0, long], 5), 0.009), ellipse(lobe + [0, long], (0.020 * jewel.size, 0.030 * jewel.size), points=16)]
        else:
            radius = 0.048 * jewel.size
            ring = ellipse(lobe + [0, radius], (radius * 0.7, radius), points=28)
            shapes = [stroke(np.concatenate([ring, ring[:2]]), 0.013)]
        for shape in shapes:
            canvas.tint(shape + [0.004, 0.010], factor=(0.7, 0.68, 0.68), blur=0.006)
            canvas.paint(shape, color=jewel.color * 0.8, label="ear_r")
            middle = shape.mean(0)
            canvas.paint(middle + (shape - middle) * 0.55 - 0.003, color=bright, blur=0.003, opacity=0.55, within=canvas.full(shape))
