"""Samples the parameters of a random face.

Sizes and positions of the parts have the means and standard deviations of the label maps of CelebAMask-HQ.
"""

from collections.abc import Mapping
from typing import TypeVar

import numpy as np

from sisma_jax.data.drawing.parameters import (
    Background,
    Brows,
    Clothes,
    EarringKind,
    Eyes,
    Face,
    Glasses,
    Hair,
    HairKind,
    HairSide,
    HairTexture,
    Hat,
    Head,
    Jewel,
    Light,
    Mouth,
    NecklaceKind,
    Neckline,
    Nose,
    Pose,
    Skin,
)

_T = TypeVar("_T")

# RGB colours under neutral light, from light to dark.
SKIN_TONES = np.array(
    [
        [0.96, 0.79, 0.70],
        [0.94, 0.74, 0.63],
        [0.90, 0.69, 0.55],
        [0.83, 0.62, 0.47],
        [0.72, 0.51, 0.37],
        [0.57, 0.39, 0.28],
        [0.43, 0.29, 0.21],
        [0.31, 0.21, 0.16],
    ]
)
HAIR_COLORS = {
    "black": (0.07, 0.06, 0.065),
    "dark_brown": (0.16, 0.105, 0.08),
    "brown": (0.30, 0.19, 0.125),
    "auburn": (0.40, 0.18, 0.10),
    "ginger": (0.62, 0.30, 0.13),
    "dark_blond": (0.54, 0.41, 0.26),
    "blond": (0.78, 0.62, 0.39),
    "platinum": (0.90, 0.82, 0.66),
    "grey": (0.53, 0.52, 0.52),
    "white": (0.84, 0.83, 0.81),
    "pink": (0.78, 0.36, 0.52),
    "blue": (0.20, 0.36, 0.62),
}
IRIS_COLORS = {
    "dark": (0.20, 0.11, 0.06),
    "brown": (0.34, 0.20, 0.10),
    "hazel": (0.45, 0.33, 0.16),
    "green": (0.33, 0.42, 0.24),
    "blue": (0.30, 0.47, 0.60),
    "grey": (0.46, 0.52, 0.56),
}


def sample_face(rng: np.random.Generator) -> Face:
    """Returns the parameters of a random face."""
    # A latent variable correlates features: 0 is angular with short hair, 1 is soft with long hair and make-up.
    softness = float(np.clip(rng.beta(0.45, 0.4), 0, 1))
    age = float(rng.beta(1.3, 2.6))
    tone = float(rng.uniform(0, len(SKIN_TONES) - 1))
    light = _sample_light(rng)
    hat = _sample_hat(rng) if rng.random() < 0.1 else None
    hair = _sample_hair(rng, softness, age, tone, hat is not None)
    skin = _sample_skin(rng, softness, age, tone)
    return Face(
        pose=_sample_pose(rng),
        head=Head(
            width=_normal(rng, 1.03 - 0.03 * softness, 0.035),
            cheeks=_normal(rng, 1.0, 0.02),
            jaw=_normal(rng, 1.02 - 0.08 * softness, 0.05),
            chin=_normal(rng, 1.06 - 0.14 * softness, 0.14),
            chin_drop=_normal(rng, 0.008 - 0.012 * softness, 0.016),
            ear_size=_normal(rng, 1.18 - 0.08 * softness, 0.08),
            neck_width=_normal(rng, 0.185 - 0.05 * softness, 0.008),
        ),
        skin=skin,
        eyes=_sample_eyes(rng, softness, tone),
        brows=Brows(
            thickness=_normal(rng, 0.032 - 0.009 * softness, 0.003),
            arch=_normal(rng, 0.013 + 0.007 * softness, 0.005),
            slope=_normal(rng, -0.001, 0.007),
            height=_normal(rng, 0.061 + 0.006 * softness, 0.007),
            length=_normal(rng, 0.158, 0.008),
            color=0.7 * hair.color * (0.9 if hair.kind != "bald" else 0.5) + 0.1 * skin.color,
        ),
        nose=Nose(
            width=_normal(rng, 1.05 - 0.1 * softness + 0.06 * tone / 7, 0.08),
            length=_normal(rng, 0.190, 0.008),
            bridge=_normal(rng, 1.0, 0.12),
            height=_normal(rng, 1.0, 0.12),
        ),
        mouth=_sample_mouth(rng, softness, skin.color),
        hair=hair,
        light=light,
        clothes=_sample_clothes(rng, softness),
        background=_sample_background(rng),
        glasses=_sample_glasses(rng) if rng.random() < 0.1 else None,
        hat=hat,
        earring=_sample_jewel(rng, ("stud", "drop", "hoop")) if rng.random() < 0.05 + 0.35 * softness else None,
        necklace=_sample_jewel(rng, ("chain", "pearls", "pendant")) if rng.random() < 0.04 + 0.14 * softness else None,
        texture_seed=int(rng.integers(2**31)),
    )


def _normal(rng: np.random.Generator, mean: float, std: float) -> float:
    """Returns a normal sample, clipped at 2.5 standard deviations to keep faces plausible."""
    return float(mean + std * np.clip(rng.standard_normal(), -2.5, 2.5))


def _pick(rng: np.random.Generator, weights: Mapping[_T, float]) -> _T:
    """Returns a random key, with probability proportional to its weight."""
    keys = list(weights)
    steps = np.cumsum(list(weights.values()))
    return keys[int(np.searchsorted(steps, rng.random() * steps[-1], side="right"))]


def _color(rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
    """Returns a random RGB colour of uniform hue, with saturation and value (HSV) uniform in the given ranges."""
    hue, s, v = rng.uniform(0, 6), rng.uniform(*saturation), rng.uniform(*value)
    k = (np.array([5.0, 3.0, 1.0]) + hue) % 6
    return v * (1 - s * np.clip(np.minimum(k, 4 - k), 0, 1))


def _sample_pose(rng: np.random.Generator) -> Pose:
    return Pose(
        yaw=_normal(rng, 0, 0.2),
        pitch=_normal(rng, 0, 0.07),
        roll=_normal(rng, 0, 0.045),
        center=(_normal(rng, 0.497, 0.007), _normal(rng, 0.481, 0.006)),
        zoom=_normal(rng, 1.02, 0.025),
        body_shift=(_normal(rng, 0, 0.03), _normal(rng, 0, 0.012)),
    )


def _sample_light(rng: np.random.Generator) -> Light:
    azimuth, elevation = _normal(rng, 0, 0.5), rng.uniform(0.15, 0.85)
    direction = np.array([np.sin(azimuth) * np.cos(elevation), -np.sin(elevation), np.cos(azimuth) * np.cos(elevation)])
    warmth = rng.normal(0, 0.045)
    key = np.array([1 + warmth, 1, 1 - warmth * 1.2])
    ambient = np.array([1 - 0.6 * warmth, 1, 1 + 0.7 * warmth])
    return Light(direction, key, ambient, contrast=float(rng.uniform(0.45, 0.85)))


def _sample_skin(rng: np.random.Generator, softness: float, age: float, tone: float) -> Skin:
    low = min(int(tone), len(SKIN_TONES) - 2)
    color = SKIN_TONES[low] + (tone - low) * (SKIN_TONES[low + 1] - SKIN_TONES[low])
    color = np.clip(color * (1 + rng.normal(0, 0.02, 3)), 0.08, 0.98)
    return Skin(
        color=color,
        blush=float(rng.uniform(0.2, 1.0)),
        freckles=float(rng.uniform(0.3, 1.0)) if tone < 3 and rng.random() < 0.15 else 0.0,
        age=age,
        stubble=float(rng.uniform(0.2, 1.0)) if softness < 0.4 and rng.random() < 0.45 else 0.0,
        shine=float(rng.uniform(0.3, 1.0)),
    )


def _sample_eyes(rng: np.random.Generator, softness: float, tone: float) -> Eyes:
    names = {"dark": 3, "brown": 3, "hazel": 1.2, "green": 1, "blue": 1.8, "grey": 1.2}
    if tone > 3:
        names = {"dark": 5, "brown": 2, "hazel": 0.4, "green": 0.1, "blue": 0.1, "grey": 0.1}
    return Eyes(
        spacing=_normal(rng, 1.0, 0.025),
        size=_normal(rng, 0.98 + 0.08 * softness, 0.06),
        opening=_normal(rng, 0.92 + 0.16 * softness, 0.14),
        tilt=_normal(rng, 0.006, 0.006),
        lid=_normal(rng, 0.013, 0.003),
        iris=np.array(IRIS_COLORS[_pick(rng, names)]) * rng.uniform(0.85, 1.15),
        gaze=(_normal(rng, 0, 0.007), _normal(rng, 0, 0.002)),
        liner=float(np.clip(0.25 + 0.75 * softness * rng.uniform(0.3, 1.2), 0, 1)),
        shadow=_color(rng, (0.2, 0.6), (0.25, 0.6)),
        shadow_strength=float(softness * rng.uniform(0, 0.4)),
    )


def _sample_mouth(rng: np.random.Generator, softness: float, skin: np.ndarray) -> Mouth:
    smile = float(rng.uniform(-0.15, 0.25) if rng.random() < 0.45 else rng.uniform(0.4, 1.0))
    is_open = rng.random() < 0.25 + 0.75 * max(smile, 0)
    natural = skin * np.array([0.86, 0.62, 0.62])
    lipstick = np.array([rng.uniform(0.5, 0.8), rng.uniform(0.1, 0.3), rng.uniform(0.15, 0.35)])
    paint = softness * rng.uniform(0, 0.8)
    return Mouth(
        width=_normal(rng, 0.090 + 0.022 * max(smile, 0), 0.005),
        height=_normal(rng, 0.262, 0.008),
        upper=_normal(rng, 0.0225 + 0.004 * softness - 0.004 * max(smile, 0), 0.0025),
        lower=_normal(rng, 0.029 + 0.005 * softness - 0.003 * max(smile, 0), 0.003),
        smile=smile,
        gap=float(rng.uniform(0.022, 0.060 if smile > 0.3 else 0.038)) if is_open else 0.0,
        teeth=float(rng.uniform(0.75, 1.0)),
        color=(1 - paint) * natural + paint * lipstick,
    )


def _sample_hair(rng: np.random.Generator, softness: float, age: float, tone: float, hat: bool) -> Hair:
    kind: HairKind
    texture: HairTexture
    long_haired = rng.random() < 0.08 + 0.88 * softness
    if long_haired:
        kind = _pick(rng, {"long": 62, "bob": 20, "tied": 13, "afro": 5})
    else:
        kind = _pick(rng, {"short": 72, "buzz": 10, "receding": 8, "bald": 6, "afro": 4})
    if hat and kind == "afro":
        kind = "short"
    if kind == "afro":
        texture = "curly"
    elif kind in ("buzz", "receding", "bald"):
        texture = "straight"
    elif kind == "short":
        texture = _pick(rng, {"straight": 45, "wavy": 20, "curly": 15, "spiky": 20})
    else:
        texture = _pick(rng, {"straight": 45, "wavy": 38, "curly": 17})
    color = _sample_hair_color(rng, age, tone)
    tip = np.clip(color * rng.uniform(1.0, 1.5) + rng.uniform(0, 0.06), 0, 1) if rng.random() < 0.4 else color
    curtains = {"long": 0.85, "bob": 0.85}.get(kind, 0.0)
    both = rng.random() < curtains
    fringe = long_haired and kind != "afro" and rng.random() < 0.22
    return Hair(
        kind=kind,
        color=color,
        tip_color=tip,
        texture=texture,
        top={"buzz": 0.012, "receding": 0.01, "bald": 0.0, "afro": 0.12}.get(kind, _normal(rng, 0.070, 0.018)),
        side={"buzz": 0.008, "receding": 0.02, "bald": 0.0, "afro": 0.13, "short": _normal(rng, 0.026, 0.008)}.get(
            kind, 0.02 if kind == "tied" else _normal(rng, 0.108, 0.026)
        ),
        bottom=float({"bob": rng.uniform(0.28, 0.42), "long": rng.uniform(0.5, 0.75)}.get(kind, 0.04)),
        flare=_normal(rng, 0.065, 0.035),
        parting=_normal(rng, 0, 0.07),
        line=_normal(rng, 0.285, 0.016),
        fringe=_normal(rng, 0.085, 0.012) if fringe else 0.0,
        bun=float(rng.uniform(0.09, 0.13)) if kind == "tied" and rng.random() < 0.45 else 0.0,
        tail=int(rng.integers(-1, 2)) if kind == "tied" else 0,
        left=HairSide(bool(both or rng.random() < curtains / 2), float(rng.beta(1, 2.2))),
        right=HairSide(bool(both or rng.random() < curtains / 2), float(rng.beta(1, 2.2))),
        gloss=float(rng.uniform(0.3, 1.0)),
    )


def _sample_hair_color(rng: np.random.Generator, age: float, tone: float) -> np.ndarray:
    if age > 0.6 and rng.random() < 0.7:
        weights = {"grey": 1, "white": 1}
    elif tone > 3.5:
        weights = {"black": 62, "dark_brown": 28, "brown": 7, "blond": 3}
    else:
        weights = {"black": 13, "dark_brown": 19, "brown": 19, "auburn": 8, "ginger": 6, "dark_blond": 12, "blond": 14}
        weights |= {"platinum": 6, "pink": 1.5, "blue": 1.5}
    shade = rng.uniform(0.88, 1.14) * (1 + rng.normal(0, 0.02, 3))
    return np.clip(np.array(HAIR_COLORS[_pick(rng, weights)]) * shade, 0.03, 0.95)


def _sample_clothes(rng: np.random.Generator, softness: float) -> Clothes:
    necklines: dict[Neckline, float] = {
        "crew": 30,
        "v": 20,
        "collar": 32 - 20 * softness,
        "turtleneck": 5,
        "wide": 4 + 18 * softness,
        "none": 9,
    }
    return Clothes(
        neckline=_pick(rng, necklines),
        pattern=_pick(rng, {"plain": 50, "stripes": 14, "dots": 8, "check": 10, "jacket": 18}),
        color=_color(rng, (0.0, 0.65), (0.08, 0.9)),
        second=_color(rng, (0.0, 0.6), (0.3, 0.95)),
        height=_normal(rng, 0.388, 0.03),
    )


def _sample_background(rng: np.random.Generator) -> Background:
    base = _color(rng, (0.02, 0.38), (0.25, 0.92))
    colors = np.stack([np.clip(base + rng.normal(0, 0.13) + rng.normal(0, 0.05, 3), 0.03, 0.97) for _ in range(5)])
    return Background(
        kind=_pick(rng, {"gradient": 22, "blobs": 26, "stripes": 12, "outdoors": 20, "studio": 20}),
        colors=colors,
        angle=float(rng.uniform(0, 2 * np.pi)),
    )


def _sample_glasses(rng: np.random.Generator) -> Glasses:
    dark = rng.random() < 0.3
    return Glasses(
        shape=_pick(rng, dict.fromkeys(("round", "rectangle", "aviator", "cat"), 1)),
        color=_color(rng, (0, 0.6), (0.05, 0.35)) if rng.random() < 0.75 else _color(rng, (0.2, 0.5), (0.5, 0.85)),
        thickness=float(rng.uniform(0.006, 0.014)),
        tint=_color(rng, (0.1, 0.5), (0.06, 0.22)) if dark else _color(rng, (0.0, 0.2), (0.75, 0.95)),
        opacity=float(rng.uniform(0.8, 0.97)) if dark else 0.12,
    )


def _sample_hat(rng: np.random.Generator) -> Hat:
    return Hat(
        kind=_pick(rng, dict.fromkeys(("beanie", "cap", "brim", "scarf"), 1)),
        color=_color(rng, (0.05, 0.6), (0.1, 0.75)),
        second=_color(rng, (0.05, 0.55), (0.15, 0.85)),
    )


def _sample_jewel(rng: np.random.Generator, kinds: tuple[EarringKind | NecklaceKind, ...]) -> Jewel:
    metals = np.array([[0.86, 0.70, 0.34], [0.80, 0.81, 0.84], [0.93, 0.90, 0.86]])
    color = metals[rng.integers(3)] if rng.random() < 0.75 else _color(rng, (0.5, 0.9), (0.4, 0.9))
    return Jewel(kind=_pick(rng, dict.fromkeys(kinds, 1)), color=color, size=float(rng.uniform(0.9, 1.6)))
