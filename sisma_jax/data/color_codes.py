"""Colour-coded masks: from the colours of a published palette to class indices.

A colour is read as a class only if a palette has exactly this colour. Editors and resizing leave mixed colours on the
outlines; a mixed pixel gets the class, of the two that meet there, whose colour is nearer. A *region* in a colour of no
class is never read: its nearest colour may be that of another class.
"""

import dataclasses

import cv2
import numpy as np

from sisma_jax.data.classes import ClassSet, known_class_sets
from sisma_jax.errors import InputError

# An outline is thinner than this many pixels; what contains a square of this size in colours of no class is a region.
_REGION_SIDE = 5
# So is a square of this size in one such colour: mixed colours change across an outline.
_FLAT_SIDE = 3
# Where the classes are looked for whose colours are mixed. The second is for parts thinner than a pixel, which show
# their own colour nowhere near.
_NEIGHBOURHOOD_SIDES = (5, 15)
# How far a mixed colour may be from the line between the colours of the two classes, in grey levels: rounding, and what
# resampling filters overshoot.
_MIX_TOLERANCE = 40.0
# Least squares with non-negative weights of colours: makes their sum 1.
_SUM_WEIGHT = 1e4


@dataclasses.dataclass(frozen=True)
class ColorReading:
    """A mask read by its colours.

    Attributes:
      mask: uint8 (H, W), class indices.
      palette: title of the class set whose colours these are.
      num_colors: how many distinct class colours occur, grey ones (black and white, too) not counted.
      num_snapped: how many mixed pixels got the class of a neighbour.
    """

    mask: np.ndarray
    palette: str
    num_colors: int
    num_snapped: int


def read_colors(image: np.ndarray, classes: ClassSet, source: str) -> ColorReading:
    """Returns the mask that an image in the colours of a palette shows.

    Tried are the colours of `classes` and of every class set known by name that has no other classes.

    Args:
      image: uint8 (H, W, 3), RGB.
      classes: whose indices are returned.
      source: what the image was read from, for the message.

    Raises:
      InputError: a region has a colour that no palette has, or two palettes name different classes by these colours.
    """
    colors, codes = np.unique(_codes(image), return_inverse=True)
    codes = codes.reshape(image.shape[:2])
    readings, failures = [], []
    for palette in (classes, *known_class_sets()):
        if set(palette.names) <= set(classes.names):
            result = _read_by(palette, classes, image, colors, codes)
            (readings if isinstance(result, ColorReading) else failures).append(result)
    if not readings:
        failure = min(failures, key=lambda failure: failure.num_pixels)
        raise InputError(
            f"{source}: the colour {failure.color} ({failure.num_pixels} pixels) names no class in the palette of "
            f"{failure.palette}, which fits best; repaint it, or save class indices 0..{len(classes) - 1} as grey PNG."
        )
    first, *others = readings
    for other in others:
        if (other.mask != first.mask).any():
            raise InputError(
                f"{source}: its colours name different classes in the palettes of {first.palette} and "
                f"{other.palette}; say which it is with `mask_classes`."
            )
    return first


@dataclasses.dataclass(frozen=True)
class _Failure:
    palette: str
    color: tuple[int, ...]
    num_pixels: int


def _read_by(
    palette: ClassSet, classes: ClassSet, image: np.ndarray, colors: np.ndarray, codes: np.ndarray
) -> ColorReading | _Failure:
    """Reads an image whose distinct colours, as numbers, are `colors[codes]`."""
    table = {_code(color): classes.index[name] for name, color in zip(palette.names, palette.colors, strict=True)}
    label_of_color = np.array([table.get(int(color), -1) for color in colors])
    labels = label_of_color[codes]
    unknown = labels < 0
    used = {palette.colors[palette.index[classes.names[label]]] for label in np.unique(labels[~unknown])}
    num_colors = sum(len(set(color)) > 1 for color in used)
    unread = unknown
    if unknown.any():
        labels, unread = _snapped(image, labels, palette, classes, codes)
    if unread.any():
        worst = np.bincount(codes[unread]).argmax()
        color = tuple(int(x) for x in (colors[worst] >> 16, colors[worst] >> 8 & 255, colors[worst] & 255))
        return _Failure(palette.title, color, int(unread.sum()))
    return ColorReading(labels.astype(np.uint8), palette.title, num_colors, int(unknown.sum()))


def _snapped(
    image: np.ndarray, labels: np.ndarray, palette: ClassSet, classes: ClassSet, codes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns labels in which mixed pixels have the class of a neighbour, and where this was not possible."""
    unknown = labels < 0
    square = np.ones((_REGION_SIDE, _REGION_SIDE), np.uint8)
    region = cv2.erode(unknown.astype(np.uint8), square, borderValue=0) > 0
    flat_square = np.ones((_FLAT_SIDE, _FLAT_SIDE), np.uint8)
    values = codes.astype(np.float32)
    # The border counts as another colour.
    is_flat = cv2.erode(values, flat_square, borderValue=-1.0) == cv2.dilate(values, flat_square, borderValue=-1.0)
    region |= is_flat & unknown & (cv2.erode(values, flat_square, borderValue=-1.0) >= 0)
    if (region & unknown).any():
        return labels, region & unknown
    colors = np.full((len(classes), 3), np.nan)
    for name, color in zip(palette.names, palette.colors, strict=True):
        colors[classes.index[name]] = color
    result, unread = labels.copy(), unknown.copy()
    for side in _NEIGHBOURHOOD_SIDES:
        rows, columns = np.nonzero(unread)
        square = np.ones((side, side), np.uint8)
        near = [cv2.dilate((labels == label).astype(np.uint8), square)[rows, columns] for label in range(len(classes))]
        chosen, distance = _nearest_mix(image[rows, columns].astype(np.float64), np.stack(near, -1) > 0, colors)
        result[rows, columns] = chosen
        unread[rows, columns] = distance > _MIX_TOLERANCE
    return result, unread


def _nearest_mix(pixels: np.ndarray, present: np.ndarray, colors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the class with the largest share in the best mix of neighbouring classes, and the distance from that mix.

    Args:
      pixels: float64 (n, 3).
      present: bool (n, K), classes in the neighbourhood of each pixel.
      colors: float64 (K, 3).
    """
    best = np.full(len(pixels), np.inf)
    chosen = np.zeros(len(pixels), np.int64)
    candidates = np.nonzero(present.any(0))[0]
    for i, first in enumerate(candidates):
        for second in candidates[i:]:
            valid = present[:, first] & present[:, second]
            if not valid.any():
                continue
            start, step = colors[first], colors[second] - colors[first]
            share = np.clip((pixels[valid] - start) @ step / max(step @ step, 1.0), 0.0, 1.0)
            distance = np.linalg.norm(pixels[valid] - start - share[:, None] * step, axis=1)
            where = np.nonzero(valid)[0]
            better = distance < best[where]
            best[where[better]] = distance[better]
            chosen[where[better]] = np.where(share[better] < 0.5, first, second)
    import scipy.optimize  # takes a while, and few masks need it

    # Where three classes or more meet, which is at few pixels.
    for pixel in np.nonzero(best > _MIX_TOLERANCE)[0]:
        near = np.nonzero(present[pixel])[0]
        if len(near) > 2:
            weights, best[pixel] = scipy.optimize.nnls(
                np.vstack([colors[near].T, np.full(len(near), _SUM_WEIGHT)]), np.append(pixels[pixel], _SUM_WEIGHT)
            )
            chosen[pixel] = near[weights.argmax()]
    return chosen, best


def _codes(image: np.ndarray) -> np.ndarray:
    wide = image.astype(np.int32)
    return (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]


def _code(color: tuple[int, int, int]) -> int:
    return (color[0] << 16) | (color[1] << 8) | color[2]
