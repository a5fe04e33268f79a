"""Draws the hair behind the head and in front of it, with strands that cover both."""

import cv2
import numpy as np

from sisma_jax.data.drawing.canvas import Canvas, spread
from sisma_jax.data.drawing.contours import ellipse, mirrored, moved, normals, polyline, spline
from sisma_jax.data.drawing.geometry import Geometry
from sisma_jax.data.drawing.lighting import highlight, irradiance, per_channel, unit
from sisma_jax.data.drawing.parameters import Face, HairSide
from sisma_jax.data.drawing.skin import SIDES

# The skull in face space: half its width, v of its centre, and its height above the centre.
_SKULL_WIDTH, _SKULL_V, _SKULL_HEIGHT = 0.272, -0.06, 0.345
_OUTER_Z, _BACK_Z = -0.03, -0.10
# Direction and light of the strands are smooth, so they are computed on a coarse grid over the image.
_CELLS = 64
# Strands meet at a point above the head, at this multiple of its height, so they are not too dense at its top.
_CROWN = 1.2
# Outlines: amplitude of the bumps, and their number on a contour of length 3 (in image sides).
_BUMPS = {"straight": (0.004, 14), "wavy": (0.009, 18), "curly": (0.016, 30), "spiky": (0.016, 26)}
# Strands: amplitude of the waves, and number of waves per image height.
_WAVES = {"straight": (0.0, 0), "spiky": (0.0, 0), "wavy": (0.05, 5), "curly": (0.11, 9)}
# Strands: layers of noise, each with a number of columns across the hair, of rows along it, and an amplitude.
_STRANDS = ((22, 5, 0.11), (70, 6, 0.11), (180, 8, 0.09))
_CROPPED = ("buzz", "receding")


def paint_back(canvas: Canvas, face: Face, geometry: Geometry, strands: np.ndarray, rng: np.random.Generator) -> None:
    """Draws the hair behind neck and shoulders.

    Args:
      canvas: canvas to draw on.
      face: parameters of the face.
      geometry: projection of the face.
      strands: colour of the strands, float32 RGB (3, side, side).
      rng: generator of the uneven outlines.
    """
    hair = face.hair
    if hair.tail:
        tail = polyline([0.20, 0.33, 0.40, 0.37, 0.30, 0.22, 0.20], [-0.10, -0.06, 0.12, 0.34, 0.55, 0.50, 0.25])
        contour = geometry.at_depth(spline(mirrored(tail, hair.tail), closed=True), _BACK_Z)
        canvas.paint(_rough(contour, face, rng), strands * np.float32(0.75), "hair")
    if hair.bun:
        bun = geometry.at_depth(ellipse(np.array([0.0, -0.46]), (hair.bun, 0.9 * hair.bun)), _BACK_Z)
        canvas.paint(_rough(bun, face, rng), strands * np.float32(0.8), "hair")
    if hair.kind in ("long", "bob", "afro"):
        half = _outer(face)
        if hair.kind != "afro":
            half = np.concatenate([half, [[0.02, hair.bottom - (0.03 if hair.kind == "bob" else 0)]]])
        outline = np.concatenate([half, mirrored(half, -1)[:0:-1]])
        contour = geometry.at_depth(spline(outline, closed=True), _BACK_Z)
        canvas.paint(_rough(contour, face, rng), strands * np.float32(0.62), "hair")


def front_contours(face: Face, geometry: Geometry, rng: np.random.Generator) -> list[np.ndarray]:
    """Returns the closed contours, each (P, 2), of the hair in front of the face, in the image."""
    hair = face.hair
    if hair.kind == "bald":
        return []
    if hair.kind == "receding":
        return [_rough(_receding(face, geometry, side), face, rng) for side in SIDES]
    left_outer, left_inner = _half(face, geometry, -1, hair.left)
    right_outer, right_inner = _half(face, geometry, 1, hair.right)
    outer = np.concatenate([left_outer[::-1], right_outer[1:]])
    outline = np.concatenate([outer, right_inner, left_inner[-2::-1]])
    contours = [_rough(outline, face, rng, inner_from=len(outer))]
    if hair.fringe:
        contours.append(_fringe(face, geometry, rng))
    return contours


def paint_front(canvas: Canvas, face: Face, contours: list[np.ndarray], strands: np.ndarray) -> None:
    """Draws the hair over the forehead and beside the face. Skin is visible through cropped hair.

    Args:
      canvas: canvas to draw on.
      face: parameters of the face.
      contours: contours of the hair in front, as `front_contours` returns them.
      strands: colour of the strands, float32 RGB (3, side, side).
    """
    cropped = face.hair.kind in _CROPPED
    for contour in contours:
        canvas.paint(contour, strands, "hair", blur=0.006 if cropped else 0.003, opacity=0.72 if cropped else 1.0)


def shade_face(canvas: Canvas, face: Face, contours: list[np.ndarray], within: np.ndarray) -> None:
    """Draws the shadow of the hair in front on the face.

    Args:
      canvas: canvas to draw on.
      face: parameters of the face.
      contours: contours of the hair in front, as `front_contours` returns them.
      within: opacity of the face, float32 (side, side) in [0, 1], which clips the shadow.
    """
    right, down, _ = face.light.direction
    strength = 0.4 if face.hair.kind in _CROPPED else 1.0
    for contour in contours:
        cast = moved(contour, -0.030 * right, 0.012 - 0.018 * down)
        canvas.tint(cast, 1 - strength * np.array([0.30, 0.36, 0.37]), blur=0.014, within=within)


def strand_colors(canvas: Canvas, face: Face, geometry: Geometry, rng: np.random.Generator) -> np.ndarray:
    """Returns the colour of lit strands on the whole canvas, float32 RGB (3, side, side).

    Strands run down the head from the parting, as meridians run from a pole. On a strand, the distance from the parting
    is a constant fraction of the width of the hair at that height.
    """
    hair = face.hair
    axis = (np.arange(_CELLS, dtype=np.float32) + 0.5) / _CELLS
    to_head = np.linalg.inv(geometry.linear).astype(np.float32)
    origin = geometry.shift.astype(np.float32)
    middle = geometry.head_frame(np.array([[0.0, 0.0, _OUTER_Z]]))[0].astype(np.float32)
    dx, dy = axis[None, :] - origin[0], axis[:, None] - origin[1]
    x = to_head[0, 0] * dx + to_head[0, 1] * dy - middle[0]
    y = to_head[1, 0] * dx + to_head[1, 1] * dy - middle[1]

    width, height = _SKULL_WIDTH + hair.side, _SKULL_HEIGHT + hair.top
    rise = np.clip((y - _SKULL_V) / height, -1.05, 0)
    half_width = width * np.sqrt(1 - (rise / _CROWN) ** 2) + hair.flare * np.clip(y - _SKULL_V, 0, 0.5)
    across = (x + hair.parting * rise) / half_width
    bend, waves = _WAVES[hair.texture]
    if bend:
        across = across + bend * np.sin(2 * np.pi * waves * y + 4 * across) * np.clip(2 * y + 0.7, 0, 1)

    normal = unit(0.85 * np.clip(across, -1.1, 1.1), 0.85 * rise, np.float32(0.62))
    light = irradiance(normal, face.light, wrap=0.5)
    # The highlight is a band across the strands, about halfway up the head.
    band = np.exp(-(((rise + 0.62 + 0.15 * face.light.direction[1]) / 0.16) ** 2)) * np.clip(1 - 0.6 * across**2, 0, 1)
    band *= (0.5 + 0.5 * highlight(normal, face.light, 2.0)) * hair.gloss * (0.16 + 0.10 * hair.color.mean())
    tips = np.clip((y - 0.05) / 0.45, 0, 1)
    color = per_channel(hair.color) + tips * per_channel(hair.tip_color - hair.color)
    lit = color * light + band * per_channel(face.light.key)
    texture = _strand_texture(spread(across, canvas.side), spread(y, canvas.side), hair.texture, rng)
    return spread(lit, canvas.side) * (1 + texture)


def _strand_texture(across: np.ndarray, down: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Returns the relative brightness of strands, minus 1: noise with short wavelength across and long along them."""
    rows, columns = 12, 360
    noise = np.zeros((rows, columns), np.float32)
    for cells_across, cells_down, strength in _STRANDS:
        cells = rng.standard_normal((cells_down, cells_across), np.float32) * np.float32(strength)
        noise += cv2.resize(cells, (columns, rows), interpolation=cv2.INTER_LINEAR)
    map_x = (across + 1.6) * np.float32(columns / 3.2)
    map_y = (down + 0.6) * np.float32(rows / 1.4)
    texture = cv2.remap(noise, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    if kind == "curly":
        cells = rng.standard_normal((34, 34), np.float32) * np.float32(0.13)
        texture += cv2.resize(cells, texture.shape, interpolation=cv2.INTER_CUBIC)
    return np.clip(texture, -0.55, 0.6)


def _dome(width: float, height: float) -> np.ndarray:
    """Returns a quarter of the outline of the head, from its top to its right, (P, 2)."""
    turn = np.linspace(np.pi / 2, 0, 9)
    # Hair close to the skull is fuller than an ellipse, and wide hair is narrower.
    power = np.interp(width, [0.30, 0.37], [0.86, 1.04])
    return polyline(width * np.maximum(np.cos(turn), 0) ** power, _SKULL_V - height * np.sin(turn) ** power)


def _outer(face: Face) -> np.ndarray:
    """Returns the outer edge of the hair from the top of the head down its right side, (u, v) in face space, (P, 2)."""
    hair = face.hair
    width, height = (_SKULL_WIDTH + hair.side) * face.head.width, _SKULL_HEIGHT + hair.top
    if hair.kind == "afro":
        low = np.linspace(0, 0.9, 5)[1:]
        rest = polyline(width * np.cos(low), _SKULL_V + 0.85 * height * np.sin(low))
    else:
        down = np.linspace(0, 1, 5)[1:]
        rest = polyline(width + hair.flare * np.sin(2.4 * down), _SKULL_V + down * (hair.bottom - _SKULL_V))
        if hair.kind == "bob":
            rest[-1, 0] -= 0.05
    return np.concatenate([_dome(width, height), rest])


def _half(face: Face, geometry: Geometry, side: int, half: HairSide) -> tuple[np.ndarray, np.ndarray]:
    """Returns the edges of one half of the hair in the image: outer, from the top to the end, and inner, back up."""
    hair, w = face.hair, face.head.width
    if half.curtain and hair.kind in ("long", "bob"):
        outer = _outer(face)
        cheek = polyline(np.multiply([0.20, 0.232, 0.243, 0.246], w), [hair.bottom, 0.24, 0.10, -0.04])
    else:
        dome = _dome((_SKULL_WIDTH + hair.side) * w, _SKULL_HEIGHT + hair.top)
        outer = np.concatenate([dome[:-1], [[0.282 * w, 0.0], [0.268 * w, 0.055]]])
        cheek = polyline(np.multiply([0.255, 0.250, 0.243], w), [0.05, -0.05, -0.11])
    # Points from the temple to the parting: fraction of the distance, and drop below the hairline.
    if hair.kind in ("short", "buzz"):
        # The hairline recedes at the temples.
        temple = polyline(np.multiply([0.238, 0.205], w), [-0.150, -0.215 + 0.03 * half.sweep])
        shares, drops = [0.70, 0.35, 0], [0.016 + 0.08 * half.sweep, 0.006 + 0.045 * half.sweep, 0]
    else:
        temple = np.array([[0.228 * w, -0.155 + 0.02 * half.sweep]])
        shares, drops = [0.72, 0.37, 0], [0.050 + 0.075 * half.sweep, 0.018 + 0.045 * half.sweep, 0]
    parting = side * hair.parting
    forehead = polyline(parting + np.multiply(shares, 0.225 * w - parting), np.subtract(drops, hair.line))
    inner = spline(np.concatenate([cheek, temple, forehead]))
    # On the side that is turned away, hair further forward forms the outline.
    forward = max(side * np.sin(face.pose.yaw), 0)
    outer = spline(outer)
    depth = _OUTER_Z + 1.1 * forward * outer[:, 0]
    outer = geometry.picture(np.column_stack([mirrored(outer, side), depth]))
    return outer, geometry.face(mirrored(inner, side))


def _receding(face: Face, geometry: Geometry, side: int) -> np.ndarray:
    u = np.multiply([0.262, 0.248, 0.236, 0.222, 0.245, 0.285, 0.292, 0.275], face.head.width)
    v = [0.05, -0.05, -0.13, -0.22, -0.255, -0.16, -0.05, 0.05]
    return geometry.at_depth(mirrored(spline(polyline(u, v), closed=True), side), 0.0)


def _fringe(face: Face, geometry: Geometry, rng: np.random.Generator) -> np.ndarray:
    hair, w = face.hair, face.head.width
    u = np.linspace(-0.235, 0.235, 33)
    ragged = np.interp(np.arange(33) / 4, np.arange(9), rng.uniform(-0.010, 0.010, 9)) + rng.uniform(-0.006, 0.006, 33)
    edge = polyline(w * u, -hair.fringe + 0.05 * (np.abs(u) / 0.235) ** 3 + ragged)
    top = polyline(np.multiply([0.20, 0.10, 0.0, -0.10, -0.20], w), [-0.27, -0.33, -0.345, -0.33, -0.27])
    return geometry.face(np.concatenate([edge, spline(top)]), 0.01)


def _rough(contour: np.ndarray, face: Face, rng: np.random.Generator, inner_from: int | None = None) -> np.ndarray:
    """Returns a smooth contour with bumps that depend on the texture of the hair.

    Points from index `inner_from` on are the hairline, which has smaller and finer bumps.
    """
    hair = face.hair
    amount, bumps = _BUMPS[hair.texture]
    closed = np.concatenate([contour, contour[:1]])
    travelled = np.concatenate([[0], np.cumsum(np.sqrt((np.diff(closed, axis=0) ** 2).sum(1)))])
    length = travelled[-1]
    # Points at equal distances give bumps of equal size.
    at = np.linspace(0, length, max(int(length / 0.008), 16), endpoint=False)
    even = polyline(np.interp(at, travelled, closed[:, 0]), np.interp(at, travelled, closed[:, 1]))
    knots = max(int(bumps * length / 3), 6)
    phase = at / length * knots
    noise = rng.standard_normal(knots)
    offset = np.interp(phase, np.arange(knots + 1), np.append(noise, noise[0]))
    if hair.texture == "curly":
        offset = 0.5 * offset + 1.2 * np.abs(np.sin(np.pi * phase)) - 0.6
    elif hair.texture == "spiky":
        offset = 0.5 * offset + 1.2 * (1 - 2 * np.abs(phase % 1 - 0.5)) - 0.5
    offset *= 0.5 * amount if hair.kind in _CROPPED else amount
    if inner_from is not None:
        teeth = int(length / 0.02)
        fine = np.interp(at / length * teeth, np.arange(teeth + 1), rng.uniform(-1, 1, teeth + 1))
        offset = np.where(at > travelled[inner_from], 0.5 * offset + 0.004 * fine, offset)
    return even + normals(even) * offset[:, None]
