"""Masks as people paint them with a few strokes: crude shapes, missing parts, profiles, hats and closed eyes."""

import cv2
import numpy as np

from sisma_jax.data.classes import CELEBAMASK_HQ

SIZE = 128


def draw(seed: int) -> np.ndarray:
    """Returns a mask, uint8 class indices (128, 128).

    Args:
      seed: determines the shapes, and which parts are missing.
    """
    rng = np.random.default_rng(seed)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    width, height = rng.uniform(0.2, 0.36), rng.uniform(0.26, 0.42)
    x, y = 0.5 + rng.uniform(-0.08, 0.08), 0.54 + rng.uniform(-0.08, 0.08)
    turn = rng.choice([-1, 0, 0, 0, 1]) * rng.uniform(0.3, 0.8)  # towards a profile

    def label(name: str) -> int:
        return CELEBAMASK_HQ.index[name]

    def point(right: float, down: float) -> tuple[int, int]:
        return round((x + right * width) * SIZE), round((y + down * height) * SIZE)

    def ellipse(name: str, right: float, down: float, half_width: float, half_height: float) -> None:
        axes = max(1, round(half_width * width * SIZE)), max(1, round(half_height * height * SIZE))
        cv2.ellipse(mask, point(right, down), axes, float(rng.uniform(-8, 8)), 0, 360, label(name), -1)

    def stroke(name: str, *points: tuple[float, float], thickness: float) -> None:
        line = np.int32([point(*one) for one in points])
        cv2.polylines(mask, [line], False, label(name), max(1, round(thickness * SIZE)))

    def has(probability: float) -> bool:
        return bool(rng.random() < probability)

    if has(0.7):
        cv2.rectangle(mask, point(-2.2, 1.35), point(2.2, 5), label("cloth"), -1)
    if has(0.85):
        ellipse("hair", 0, -0.25, rng.uniform(1.1, 1.5), rng.uniform(1.0, 1.5))
    if has(0.8):
        cv2.rectangle(mask, point(-0.5, 0.7), point(0.5, 1.5), label("neck"), -1)
    ellipse("skin", 0, 0, 1, 1)
    for side, name in ((-1, "r"), (1, "l")):  # the subject's right is on the viewer's left
        is_hidden = turn * side > 0.25
        if has(0.4) and not is_hidden:
            ellipse(f"{name}_ear", side * 1.02, 0, 0.12, 0.2)
        middle = side * 0.42 + turn * 0.3
        if has(0.9) and not is_hidden:
            if has(0.15):
                ellipse(f"{name}_eye", middle, -0.15, 0.16, 0.03)  # closed
            else:
                ellipse(f"{name}_eye", middle, -0.15, rng.uniform(0.12, 0.22), rng.uniform(0.05, 0.11))
        if has(0.8) and not is_hidden:
            stroke(f"{name}_brow", (middle - 0.22, -0.36), (middle, -0.44), (middle + 0.22, -0.36), thickness=0.02)
    if has(0.9):
        ellipse("nose", turn * 0.45, 0.15, rng.uniform(0.1, 0.2), rng.uniform(0.15, 0.28))
    if has(0.9):
        ellipse("u_lip", turn * 0.3, 0.52, 0.32, 0.07)
        ellipse("l_lip", turn * 0.3, 0.62, 0.3, 0.08)
        if has(0.3):
            ellipse("mouth", turn * 0.3, 0.57, 0.25, 0.05)
    if has(0.1):
        for side in (-1, 1):
            ellipse("eye_g", side * 0.42, -0.15, 0.32, 0.16)
    if has(0.15):
        ellipse("hat", 0, -0.95, 1.2, 0.5)
    return mask
