"""Hair: the part behind the head, the part in front of it, and the strands that run over both."""

import cv2
import numpy as np

from sisma_jax.data.drawing.canvas import Canvas, ellipse, normals, spline
from sisma_jax.data.drawing.geometry import Geometry
from sisma_jax.data.drawing.lighting import highlight, irradiance
from sisma_jax.data.drawing.parameters import Face, HairSide

# The skull that hair grows on: half its width, its centre's height and its height above that, in face space.
_SKULL_WIDTH, _SKULL_V, _SKULL_HEIGHT = 0.272, -0.06, 0.345
_OUTER_Z, _BACK_Z = -0.04, -0.10
# The strands' fields are smooth, so they are computed on a coarse grid over the picture.
_CELLS = 64


def paint_back_hair(canvas: Canvas, face: Face, geometry: Geometry, strands: np.ndarray) -> None:
    """Paints the hair behind neck and shoulders."""
    hair = face.hair
    dark = strands * np.float32(0.62)
    if hair.tail:
        side = hair.tail
        tail = np.array([[0.20, -0.10], [0.33, -0.06], [0.40, 0.12], [0.37, 0.34], [0.30, 0.55], [0.22, 0.50], [0.20, 0.25]])
        canvas.paint(_rough(geometry.at_depth(spline(tail * [side, 1], closed=True), _BACK_Z), face, 31), color=dark * 1.2, label="hair")
    if hair.bun:
        canvas.paint(_rough(geometry.at_depth(ellipse(np.array([0.0, -0.46]), (hair.bun, hair.bun * 0.9)), _BACK_Z), face, 32), color=strands * np.float32(0.8), label="hair")
    if hair.kind in ("long", "bob", "afro"):
        halves = []
        for side in (1, -1):
            outer = _outer(face, side)
            if hair.kind != "afro":
                inner_end = [side * 0.02, hair.bottom + (0.0 if hair.kind == "long" else -0.03)]
                outer = np.concatenate([outer, [inner_end]])
            halves.append(outer)
        contour = np.concatenate([halves[1][::-1], halves[0][1:]])
        canvas.paint(_rough(geometry.at_depth(spline(contour, closed=True), _BACK_Z), face, 33), color=dark, label="hair")


def front_hair_contours(face: Face, geometry: Geometry) -> list[np.ndarray]:
    """Returns the outlines of the hair in front of the face, in the picture."""
    hair = face.hair
    if hair.kind == "bald":
        return []
    if hair.kind == "receding":
        return [_receding(face, geometry, side) for side in (-1, 1)]
    left, right = (_half(face, geometry, side, half) for side, half in ((-1, hair.left), (1, hair.right)))
    outline = np.concatenate([left[0][::-1], right[0][1:], right[1], left[1][::-1][1:]])
    contours = [_rough(outline, face, 34, inner_from=len(left[0]) + len(right[0]) - 1)]
    if hair.fringe:
        contours.append(_fringe(face, geometry))
    return contours


def paint_front_hair(canvas: Canvas, face: Face, contours: list[np.ndarray], strands: np.ndarray) -> None:
    """Paints the hair over the forehead and beside the face."""
    solid = 0.72 if face.hair.kind in ("buzz", "receding") else 1.0
    for contour in contours:
        canvas.paint(contour, color=strands, label="hair", blur=0.004 if solid < 1 else 0.0015, opacity=solid)


def shade_under_hair(canvas: Canvas, face: Face, contours: list[np.ndarray], within: np.ndarray) -> None:
    """Darkens the face where the hair in front keeps light away."""
    direction = face.light.direction
    away = np.array([-0.030 * direction[0], 0.012 - 0.018 * direction[1]])
    depth = 0.4 if face.hair.kind in ("buzz", "receding") else 1.0
    factor = 1 - depth * np.array([0.30, 0.36, 0.37])
    for contour in contours:
        canvas.tint(contour + away, factor=factor, blur=0.014, within=within)


def strand_colors(canvas: Canvas, face: Face, geometry: Geometry, rng: np.random.Generator) -> np.ndarray:
    """Returns the colour of lit strands all over the canvas, float32 (side, side, 3).

    Strands run like meridians from the parting down the head: lines on which the distance from the parting, over the
    hair's width at that height, is constant.
    """
    hair = face.hair
    axis = (np.arange(_CELLS, dtype=np.float32) + 0.5) / _CELLS
    grid = np.stack(np.broadcast_arrays(axis[None, :], axis[:, None]), axis=-1)
    local = (grid - geometry.shift.astype(np.float32)) @ np.linalg.inv(geometry.linear).T.astype(np.float32)
    offset = geometry.head_frame(np.array([[0.0, 0.0, _OUTER_Z]]))[0].astype(np.float32)
    x, y = local[..., 0] - offset[0], local[..., 1] - offset[1]
    width, height = _SKULL_WIDTH + hair.side, _SKULL_HEIGHT + hair.top
    rise = np.clip((y - _SKULL_V) / height, -0.985, 0)
    half = width * np.sqrt(1 - rise**2) + hair.flare * np.clip(y - _SKULL_V, 0, 0.5)
    parting = hair.parting * np.clip(-rise, 0, 1)
    across = (x - parting) / half
    if hair.texture in ("wavy", "curly"):
        bend = 0.05 if hair.texture == "wavy" else 0.11
        across = across + bend * np.sin(2 * np.pi * y * (5 if hair.texture == "wavy" else 9) + 4 * across) * np.clip(y + 0.35, 0, 0.5) * 2

    normal = np.stack([0.85 * np.clip(across, -1.1, 1.1), 0.85 * rise, np.full_like(x, 0.62)], axis=-1).astype(np.float32)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    light = irradiance(normal, face.light, wrap=0.5)
    # Strands gleam in a band across them, halfway up the dome.
    band = np.exp(-(((rise + 0.62 + 0.15 * face.light.direction[1]) / 0.16) ** 2)) * np.clip(1 - 0.6 * across**2, 0, 1)
    band = band * (0.5 + 0.5 * highlight(normal, face.light, 2.0)) * hair.gloss
    tips = np.clip((y - 0.05) / 0.45, 0, 1)
    color = hair.color + tips[..., None] * (hair.tip_color - hair.color)
    side = canvas.side
    fields = np.concatenate([color * light, band[..., None], across[..., None], y[..., None]], axis=-1).astype(np.float32)
    fields = cv2.resize(fields, (side, side), interpolation=cv2.INTER_LINEAR)
    texture = _strand_texture(fields[..., 4], fields[..., 5], hair.texture, rng, side)
    lit = fields[..., :3] * (1 + texture)[..., None]
    lit += (fields[..., 3] * (0.16 + 0.10 * hair.color.mean()) * (1 + 1.5 * texture))[..., None] * face.light.key.astype(np.float32)
    return np.clip(lit, 0.015, 1)


def _strand_texture(across: np.ndarray, down: np.ndarray, kind: str, rng: np.random.Generator, side: int) -> np.ndarray:
    """Relative brightness of strands: noise that is fine across them and long along them."""
    texture = np.zeros((side, side), np.float32)
    for columns, rows, strength in ((22, 5, 0.15), (70, 6, 0.12), (180, 8, 0.08)):
        noise = rng.standard_normal((rows, columns)).astype(np.float32) * np.float32(strength)
        map_x = (across + 1.6) * np.float32(columns / 3.2)
        map_y = (down + 0.6) * np.float32(rows / 1.4)
        texture += cv2.remap(noise, map_x, map_y, cv2.INTER_CUBIC if columns < 100 else cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    if kind == "curly":
        texture += 0.13 * smooth_noise_like(rng, side)
    return np.clip(texture, -0.55, 0.6)


def smooth_noise_like(rng: np.random.Generator, side: int) -> np.ndarray:
    return cv2.resize(rng.standard_normal((34, 34)).astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC)


def _outer(face: Face, side: int) -> np.ndarray:
    """The hair's outer edge from the top of the head down one side, in face space (P, 2)."""
    hair, head = face.hair, face.head.width
    width, height = (_SKULL_WIDTH + hair.side) * head, _SKULL_HEIGHT + hair.top
    turn = np.linspace(np.pi / 2, 0, 7)
    dome = np.stack([width * np.cos(turn), _SKULL_V - height * np.sin(turn)], axis=1)
    if hair.kind == "afro":
        low = np.linspace(0, -0.9, 5)[1:]
        rest = np.stack([width * np.cos(low), _SKULL_V - 0.85 * height * np.sin(low)], axis=1)
    else:
        down = np.linspace(0, 1, 5)[1:]
        rest = np.stack([width + hair.flare * np.sin(down * 2.4), _SKULL_V + down * (hair.bottom - _SKULL_V)], axis=1)
        if hair.kind == "bob":
            rest[-1, 0] -= 0.05
    return np.concatenate([dome, rest]) * [side, 1]


def _half(face: Face, geometry: Geometry, side: int, half: HairSide) -> tuple[np.ndarray, np.ndarray]:
    """Outer edge from the top to the end, and inner edge from the end to the parting, in the picture."""
    hair, w = face.hair, face.head.width
    line, sweep = -hair.line, half.sweep
    forehead = [[0.225 * w, -0.155 + 0.02 * sweep], [0.165 * w, line + 0.050 + 0.10 * sweep], [0.085, line + 0.018 + 0.045 * sweep]]
    if half.curtain and hair.kind in ("long", "bob"):
        outer = _outer(face, 1)
        inner = [[0.20 * w, hair.bottom], [0.232 * w, 0.24], [0.243 * w, 0.10], [0.246 * w, -0.04], *forehead]
    else:
        width, height = (_SKULL_WIDTH + hair.side) * w, _SKULL_HEIGHT + hair.top
        turn = np.linspace(np.pi / 2, 0.05, 7)
        outer = np.stack([width * np.cos(turn), _SKULL_V - height * np.sin(turn)], axis=1)
        outer = np.concatenate([outer, [[0.282 * w, 0.0], [0.268 * w, 0.055]]])
        inner = [[0.255 * w, 0.05], [0.250 * w, -0.05], [0.243 * w, -0.11], *forehead]
    inner = np.array([*inner, [hair.parting, line]], np.float64)
    outer_curve = geometry.at_depth(spline(outer * [side, 1]), _OUTER_Z)
    inner[:-1, 0] *= side
    return outer_curve, geometry.face(spline(inner))


def _receding(face: Face, geometry: Geometry, side: int) -> np.ndarray:
    w = face.head.width
    points = np.array([[0.262, 0.05], [0.248, -0.05], [0.236, -0.13], [0.222, -0.22], [0.245, -0.255], [0.285, -0.16], [0.292, -0.05], [0.275, 0.05]])
    return _rough(geometry.at_depth(spline(points * [side * w, 1], closed=True), 0.0), face, 35)


def _fringe(face: Face, geometry: Geometry) -> np.ndarray:
    hair, w = face.hair, face.head.width
    rng = np.random.default_rng([face.texture_seed, 36])
    edge_u = np.linspace(-0.235, 0.235, 15) * w
    edge_v = -hair.fringe + 0.05 * (np.abs(edge_u) / 0.235) ** 3 + rng.uniform(-0.014, 0.014, 15)
    top = np.array([[0.20, -0.27], [0.10, -0.33], [0.0, -0.345], [-0.10, -0.33], [-0.20, -0.27]]) * [w, 1]
    return geometry.face(np.concatenate([spline(np.stack([edge_u, edge_v], axis=1), steps=5), spline(top)]), 0.01)


def _rough(contour: np.ndarray, face: Face, salt: int, inner_from: int | None = None) -> np.ndarray:
    """Gives a smooth outline the raggedness of its kind of hair; points from `inner_from` on keep half of it."""
    hair = face.hair
    amount, bumps = {"straight": (0.004, 14), "wavy": (0.009, 18), "curly": (0.016, 30), "spiky": (0.016, 26)}[hair.texture]
    if hair.kind in ("buzz", "receding"):
        amount *= 0.5
    rng = np.random.default_rng([face.texture_seed, salt])
    steps = np.linalg.norm(np.diff(contour, axis=0, append=contour[:1]), axis=1)
    # Sampled evenly along the line, so that bumps are alike all around.
    count = max(int(steps.sum() / 0.008), 16)
    at = np.linspace(0, steps.sum(), count, endpoint=False)
    travelled = np.concatenate([[0], np.cumsum(steps)])
    closed = np.concatenate([contour, contour[:1]])
    even = np.stack([np.interp(at, travelled, closed[:, axis]) for axis in (0, 1)], axis=1)
    knots = max(int(bumps * steps.sum() / 3), 6)
    phase = at / steps.sum() * knots
    noise = rng.standard_normal(knots)
    offset = np.interp(phase % knots, np.arange(knots + 1), np.append(noise, noise[0]))
    if hair.texture == "curly":
        offset = 0.5 * offset + 1.2 * np.abs(np.sin(np.pi * phase)) - 0.6
    elif hair.texture == "spiky":
        offset = 0.5 * offset + 1.2 * (1 - 2 * np.abs((phase % 1) - 0.5)) - 0.5
    strength = np.full(count, amount)
    if inner_from is not None:
        strength[at > travelled[inner_from]] *= 0.5
    return even + normals(even) * (strength * offset)[:, None]
