"""What distinguishes one face from another.

Lengths are in picture sides, angles in radians, colours RGB in [0, 1]. Sides are the picture's: its right, +u, is
where the subject's left eye is; class names go by the subject's side.
"""

import dataclasses
from typing import Literal

import numpy as np


@dataclasses.dataclass(frozen=True)
class Pose:
    yaw: float
    pitch: float
    roll: float
    center: tuple[float, float]
    """Where the point between the eyes lands in the picture."""
    zoom: float
    body_shift: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Head:
    width: float
    """Factor on the head's width; the next three are factors on widths of its parts."""
    cheeks: float
    jaw: float
    chin: float
    chin_drop: float
    """Added to the chin's distance from the eyes."""
    ear_size: float
    neck_width: float


@dataclasses.dataclass(frozen=True)
class Skin:
    color: np.ndarray
    blush: float
    freckles: float
    age: float
    stubble: float
    shine: float


@dataclasses.dataclass(frozen=True)
class Eyes:
    spacing: float
    size: float
    opening: float
    tilt: float
    lid: float
    """Height of the upper lid's crease."""
    iris: np.ndarray
    gaze: tuple[float, float]
    liner: float
    shadow: np.ndarray
    shadow_strength: float


@dataclasses.dataclass(frozen=True)
class Brows:
    thickness: float
    arch: float
    slope: float
    height: float
    length: float
    color: np.ndarray


@dataclasses.dataclass(frozen=True)
class Nose:
    width: float
    length: float
    bridge: float
    height: float


@dataclasses.dataclass(frozen=True)
class Mouth:
    width: float
    height: float
    upper: float
    lower: float
    smile: float
    gap: float
    """Height of the opening between the lips; 0 is closed."""
    teeth: float
    color: np.ndarray


@dataclasses.dataclass(frozen=True)
class HairSide:
    """One half of the hair, from the parting down one side of the face."""

    curtain: bool
    """Falls in front of the ear; otherwise it ends at the ear."""
    sweep: float
    """How far the strands at the forehead hang towards the eye, in [0, 1]."""


@dataclasses.dataclass(frozen=True)
class Hair:
    kind: Literal["bald", "receding", "buzz", "short", "afro", "bob", "long", "tied"]
    color: np.ndarray
    tip_color: np.ndarray
    texture: Literal["straight", "wavy", "curly", "spiky"]
    top: float
    """Volume above the skull and, next, beside it."""
    side: float
    bottom: float
    """Height of the lower end, measured down from the eyes."""
    flare: float
    parting: float
    line: float
    """Height of the hairline above the eyes."""
    fringe: float
    """Height above the eyes that a fringe hangs down to; 0 for none."""
    bun: float
    tail: int
    left: HairSide
    right: HairSide
    gloss: float


@dataclasses.dataclass(frozen=True)
class Light:
    direction: np.ndarray
    """Unit vector towards the light: right, down, to the viewer."""
    key: np.ndarray
    ambient: np.ndarray
    contrast: float


@dataclasses.dataclass(frozen=True)
class Clothes:
    neckline: Literal["crew", "v", "collar", "turtleneck", "wide", "none"]
    pattern: Literal["plain", "stripes", "dots", "check", "jacket"]
    color: np.ndarray
    second: np.ndarray
    height: float


@dataclasses.dataclass(frozen=True)
class Background:
    kind: Literal["gradient", "blobs", "stripes", "outdoors", "studio"]
    colors: np.ndarray
    angle: float


@dataclasses.dataclass(frozen=True)
class Glasses:
    shape: Literal["round", "rectangle", "aviator", "cat"]
    color: np.ndarray
    thickness: float
    tint: np.ndarray
    opacity: float


@dataclasses.dataclass(frozen=True)
class Hat:
    kind: Literal["beanie", "cap", "brim", "scarf"]
    color: np.ndarray
    second: np.ndarray


@dataclasses.dataclass(frozen=True)
class Jewel:
    kind: str
    color: np.ndarray
    size: float


@dataclasses.dataclass(frozen=True)
class Face:
    pose: Pose
    head: Head
    skin: Skin
    eyes: Eyes
    brows: Brows
    nose: Nose
    mouth: Mouth
    hair: Hair
    light: Light
    clothes: Clothes
    background: Background
    glasses: Glasses | None
    hat: Hat | None
    earring: Jewel | None
    necklace: Jewel | None
    texture_seed: int
