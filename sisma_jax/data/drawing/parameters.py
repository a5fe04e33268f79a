"""The parameters of a drawn face.

Lengths and positions are fractions of the side of the image, angles are in radians, and colours are float RGB arrays
(3,) in [0, 1]. Positions in the face are relative to the point between the eyes. Left and right are those of the image;
only class names refer to the subject's left and right. The subject's left eye is on the right of the image, at +u.
"""

import dataclasses
from typing import Literal

import numpy as np

HairKind = Literal["bald", "receding", "buzz", "short", "afro", "bob", "long", "tied"]
HairTexture = Literal["straight", "wavy", "curly", "spiky"]
Neckline = Literal["crew", "v", "collar", "turtleneck", "wide", "none"]
EarringKind = Literal["stud", "drop", "hoop"]
NecklaceKind = Literal["chain", "pearls", "pendant"]


@dataclasses.dataclass(frozen=True)
class Pose:
    """The orientation of the head, and its place in the image.

    Attributes:
      yaw: rotation about the vertical axis; positive turns the face to the right of the image.
      pitch: rotation about the horizontal axis; positive turns the face up.
      roll: rotation in the image plane; positive is clockwise.
      center: image position (x, y) of the point between the eyes.
      zoom: factor on the size of the face.
      body_shift: displacement (x, y) of neck and shoulders relative to the head.
    """

    yaw: float
    pitch: float
    roll: float
    center: tuple[float, float]
    zoom: float
    body_shift: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Head:
    """The shape of the head, ears and neck.

    Attributes:
      width: factor on the width of the head.
      cheeks: further factor on the width at the cheeks.
      jaw: further factor on the width at the jaw.
      chin: further factor on the width of the chin.
      chin_drop: length added to the distance from the eyes to the chin.
      ear_size: factor on the size of the ears.
      neck_width: half the width of the neck.
    """

    width: float
    cheeks: float
    jaw: float
    chin: float
    chin_drop: float
    ear_size: float
    neck_width: float


@dataclasses.dataclass(frozen=True)
class Skin:
    """The appearance of the skin. All strengths are in [0, 1].

    Attributes:
      color: colour under neutral light.
      blush: redness of the cheeks.
      freckles: contrast of the freckles; 0 for none.
      age: depth of the folds around eyes and mouth.
      stubble: darkness of the beard's shadow; 0 for none.
      shine: strength of the specular highlights.
    """

    color: np.ndarray
    blush: float
    freckles: float
    age: float
    stubble: float
    shine: float


@dataclasses.dataclass(frozen=True)
class Eyes:
    """The eyes and their make-up.

    Attributes:
      spacing: factor on the distance between the eyes.
      size: factor on the size of each eye.
      opening: factor on how far the eyes are open.
      tilt: height of the outer corner relative to the inner corner.
      lid: height of the crease above the edge of the upper lid.
      iris: colour of the iris.
      gaze: displacement (right, down) of the iris.
      liner: strength of the eyeliner, in [0, 1].
      shadow: colour of the eye shadow.
      shadow_strength: opacity of the eye shadow, in [0, 1].
    """

    spacing: float
    size: float
    opening: float
    tilt: float
    lid: float
    iris: np.ndarray
    gaze: tuple[float, float]
    liner: float
    shadow: np.ndarray
    shadow_strength: float


@dataclasses.dataclass(frozen=True)
class Brows:
    """The eyebrows.

    Attributes:
      thickness: height of the brow at its thickest point.
      arch: height of the arch.
      slope: height of the outer end relative to the inner end.
      height: height of the inner end above the eyes.
      length: length from the inner to the outer end.
      color: colour of the hair.
    """

    thickness: float
    arch: float
    slope: float
    height: float
    length: float
    color: np.ndarray


@dataclasses.dataclass(frozen=True)
class Nose:
    """The shape of the nose.

    Attributes:
      width: factor on the width.
      length: distance from the eyes to the lower end.
      bridge: factor on the relief of the bridge.
      height: factor on the relief of the tip.
    """

    width: float
    length: float
    bridge: float
    height: float


@dataclasses.dataclass(frozen=True)
class Mouth:
    """The mouth and the teeth.

    Attributes:
      width: half the width of the mouth.
      height: distance from the eyes down to the line between the lips.
      upper: thickness of the upper lip.
      lower: thickness of the lower lip.
      smile: how far the corners are raised, from about -0.15 (lowered) to 1.
      gap: height of the opening between the lips; 0 for a closed mouth.
      teeth: brightness of the teeth, in [0, 1].
      color: colour of the lips.
    """

    width: float
    height: float
    upper: float
    lower: float
    smile: float
    gap: float
    teeth: float
    color: np.ndarray


@dataclasses.dataclass(frozen=True)
class HairSide:
    """One half of the hair, from the parting down one side of the face.

    Attributes:
      curtain: whether the hair falls in front of the ear; otherwise it ends at the ear.
      sweep: how far the strands at the forehead hang towards the eye, in [0, 1].
    """

    curtain: bool
    sweep: float


@dataclasses.dataclass(frozen=True)
class Hair:
    """The hair.

    Attributes:
      kind: hairstyle.
      color: colour at the roots.
      tip_color: colour at the tips.
      texture: shape of the strands.
      top: volume above the skull.
      side: volume beside the skull.
      bottom: distance from the eyes down to the lower end.
      flare: width added on each side at the lower end.
      parting: horizontal position of the parting; 0 is the middle.
      line: height of the hairline above the eyes.
      fringe: height of the lower edge of the fringe above the eyes; 0 for no fringe.
      bun: radius of the bun; 0 for none.
      tail: side of the ponytail, -1 for left and +1 for right; 0 for none.
      left: half of the hair on the left of the image.
      right: half of the hair on the right of the image.
      gloss: strength of the highlights, in [0, 1].
    """

    kind: HairKind
    color: np.ndarray
    tip_color: np.ndarray
    texture: HairTexture
    top: float
    side: float
    bottom: float
    flare: float
    parting: float
    line: float
    fringe: float
    bun: float
    tail: int
    left: HairSide
    right: HairSide
    gloss: float


@dataclasses.dataclass(frozen=True)
class Light:
    """A directional key light and ambient light.

    Attributes:
      direction: unit vector towards the key light: (right, down, towards the viewer).
      key: RGB intensity of the key light, about 1.
      ambient: RGB intensity of the ambient light, about 1.
      contrast: share of the key light in the total, in [0, 1].
    """

    direction: np.ndarray
    key: np.ndarray
    ambient: np.ndarray
    contrast: float


@dataclasses.dataclass(frozen=True)
class Clothes:
    """The clothes.

    Attributes:
      neckline: shape of the neckline; none for no clothes.
      pattern: pattern of the cloth.
      color: main colour.
      second: colour of the pattern, or of the shirt under a jacket.
      height: distance from the eyes down to the shoulder end of the neckline.
    """

    neckline: Neckline
    pattern: Literal["plain", "stripes", "dots", "check", "jacket"]
    color: np.ndarray
    second: np.ndarray
    height: float


@dataclasses.dataclass(frozen=True)
class Background:
    """The background.

    Attributes:
      kind: what the background shows.
      colors: float RGB colours (5, 3).
      angle: direction of the colour gradient; 0 is to the right, and positive angles turn clockwise.
    """

    kind: Literal["gradient", "blobs", "stripes", "outdoors", "studio"]
    colors: np.ndarray
    angle: float


@dataclasses.dataclass(frozen=True)
class Glasses:
    """A pair of glasses.

    Attributes:
      shape: shape of the lenses.
      color: colour of the frame.
      thickness: width of the lines of the frame.
      tint: colour of the lenses.
      opacity: opacity of the lenses, in [0, 1].
    """

    shape: Literal["round", "rectangle", "aviator", "cat"]
    color: np.ndarray
    thickness: float
    tint: np.ndarray
    opacity: float


@dataclasses.dataclass(frozen=True)
class Hat:
    """A hat.

    Attributes:
      kind: form of the hat.
      color: main colour.
      second: colour of the band, the visor or the folds.
    """

    kind: Literal["beanie", "cap", "brim", "scarf"]
    color: np.ndarray
    second: np.ndarray


@dataclasses.dataclass(frozen=True)
class Jewel:
    """A necklace, or a pair of earrings.

    Attributes:
      kind: form of the jewel.
      color: colour of the material.
      size: factor on the size.
    """

    kind: EarringKind | NecklaceKind
    color: np.ndarray
    size: float


@dataclasses.dataclass(frozen=True)
class Face:
    """All parameters of a drawn face.

    Attributes:
      pose: orientation of the head.
      head: shape of the head.
      skin: appearance of the skin.
      eyes: eyes.
      brows: eyebrows.
      nose: nose.
      mouth: mouth.
      hair: hair.
      light: light on face, hair and clothes.
      clothes: clothes.
      background: background.
      glasses: glasses; None for none.
      hat: hat; None for none.
      earring: pair of earrings; None for none.
      necklace: necklace; None for none.
      texture_seed: seed of the random details: skin grain, strands of hair, folds of cloth, and background.
    """

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
