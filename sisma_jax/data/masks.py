"""Masks in every form in which they come, to uint8 class indices (H, W); and resizing.

    form                                how it is recognised            what is done
    label map, grey of 1 to 16 bits     one channel                     the sample is the label
    label map as RGB or RGBA            three equal channels            one of them is the label
    palette PNG or GIF                  indices with a palette          by the palette's colours if these name classes,
                                                                        else by index; refused if both are plausible
                                                                        and differ
    colour-coded mask                   three channels that differ      by the colours of a published palette, see
                                                                        `color_codes`
    part files as in CelebAMask-HQ      a folder of <id>_<part>.png     painted in the order of the classes
    array (H, W), (H, W, 1), a batch    integers                        labels
    array (H, W, 3) or (H, W, 4)        last axis                       as a file with these channels
    array (H, W, K) or (K, H, W)        of K classes each pixel has 1   one-hot
    PIL image, path                     type                            as the file
    JPEG, lossy WebP, AVIF, JPEG 2000,  content of the file, not its    refused by name
    several pages or frames, CMYK, ...  name

Fully transparent pixels belong to the first class, where no part is; they must not show another class. Every mask is
turned upright by its EXIF orientation. What is not read exactly as it is stored is logged in one line.
"""

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from sisma_jax.data.classes import ClassSet
from sisma_jax.data.color_codes import ColorReading, read_colors
from sisma_jax.data.photos import PNG_START, central_square, decode_by_opencv, read_bytes, require_readable
from sisma_jax.data.rasters import Raster, decode_raster, raster_of
from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath

logger = logging.getLogger(__name__)

Masks = Any
"""One mask or several, in any form that `read_masks` reads: arrays, lists, PIL images, paths, and lists of these."""

# Bit depth and colour type in a PNG's header, which is always its first chunk.
_GREY_8_BIT, _RGB_8_BIT = b"\x08\x00", b"\x08\x02"
# What gives samples another meaning: transparency, and orientation in a chunk of its own or in a text.
_PNG_QUALIFIERS = (b"tRNS", b"eXIf", b"exif", b"acTL")
# With fewer class colours than this in a palette, they may be there by chance.
_COLORS_WITHOUT_DOUBT = 4


def decode_mask(data: bytes, source: str, classes: ClassSet, *, stored_size: int | None = None) -> np.ndarray:
    """Decodes a mask file to uint8 class indices, (H, W).

    Args:
      data: the bytes of a file in any form of the table above.
      source: where the bytes come from, for the message.
      classes: that the mask's labels belong to.
      stored_size: for a raw file of a data set, the side to which a grey PNG of 8 bits is reduced, or 0; see
        `require_readable`.

    Raises:
      InputError: the bytes are empty, truncated, no image, too large, or in a form that is not read; or the image holds
        values or colours that are no label.
    """
    if _is_plain_png(data, _GREY_8_BIT):  # what prepared shards hold
        require_readable(data, source, stored_size)
        return classes.check(decode_by_opencv(data, source, cv2.IMREAD_GRAYSCALE), source)
    return _labels(decode_raster(data, source), source, classes)


def _is_plain_png(data: bytes, *kinds: bytes) -> bool:
    """Whether OpenCV, which takes a third of Pillow's time, decodes the bytes to the samples of the file."""
    return data.startswith(PNG_START) and data[24:26] in kinds and not any(chunk in data for chunk in _PNG_QUALIFIERS)


def _labels(raster: Raster, source: str, classes: ClassSet) -> np.ndarray:
    samples, transparent = raster.samples, raster.transparent
    if samples.size == 0:
        raise InputError(f"{source} has no pixels: its shape is {samples.shape}.")
    if transparent is not None and transparent.all():
        raise InputError(f"{source} is fully transparent; remove its transparency.")
    if raster.palette is not None:
        return _by_palette(samples, raster.palette, transparent, source, classes)
    if samples.ndim == 2:
        return _by_number(samples, transparent, source, classes)
    shown = samples if transparent is None else samples[~transparent]
    if (shown == shown[..., :1]).all():
        return _by_number(samples[..., 0], transparent, source, classes)
    reading = _by_color(_8_bit(samples, source), transparent, source, classes)
    _report(reading, source, classes)
    return reading.mask


def _by_number(values: np.ndarray, transparent: np.ndarray | None, source: str, classes: ClassSet) -> np.ndarray:
    if transparent is not None:
        hidden = np.unique(values[transparent])
        _require_nothing_hidden(hidden[(hidden > 0) & (hidden < len(classes))].tolist(), source, classes)
        values = np.where(transparent, 0, values)
    return classes.check(values, source)


def _by_color(image: np.ndarray, transparent: np.ndarray | None, source: str, classes: ClassSet) -> ColorReading:
    if transparent is not None:
        hidden = {tuple(color) for color in np.unique(image[transparent], axis=0).tolist()}
        labels = [label for label, color in enumerate(classes.colors) if label and color in hidden]
        _require_nothing_hidden(labels, source, classes)
        image = np.where(transparent[..., None], np.asarray(classes.colors[0], np.uint8), image)
    return read_colors(image, classes, source)


def _require_nothing_hidden(labels: Iterable[int], source: str, classes: ClassSet) -> None:
    if names := ", ".join(classes.names[label] for label in labels):
        raise InputError(
            f"{source}: pixels that are fully transparent show {names}; remove the transparency, or paint them as "
            f"{classes.names[0]}."
        )


def _by_palette(
    indices: np.ndarray, palette: np.ndarray, transparent: np.ndarray | None, source: str, classes: ClassSet
) -> np.ndarray:
    """Decides between the two meanings of an index: the class itself, or its colour."""
    used = np.unique(indices if transparent is None else indices[~transparent])
    by_index = by_color = None
    refusal: InputError | None = None
    try:
        by_index = _by_number(indices, transparent, source, classes)
    except InputError as error:
        refusal = error
    colors = palette[used[used < len(palette)]]
    if len(colors) == len(used) and len(np.unique(colors, axis=0)) > 1:
        if (colors == colors[:, :1]).all():
            # PNG optimisers rewrite a grey label map as a palette of the greys that occur, in any order. A palette
            # made of nothing but labels as greys is such a one: there the grey is the label.
            if classes.is_label(colors[:, 0]).all():
                return _by_number(palette[indices, 0], transparent, source, classes)
        else:
            try:
                by_color = _by_color(palette[np.minimum(indices, len(palette) - 1)], transparent, source, classes)
            except InputError as error:
                refusal = refusal and error
    if by_color is None:
        if by_index is None:
            assert refusal is not None
            raise refusal
        return by_index
    is_certain = by_index is None or by_color.num_colors >= _COLORS_WITHOUT_DOUBT
    if by_index is not None and not is_certain and (by_index != by_color.mask).any():
        raise InputError(
            f"{source}: the palette's indices are classes, and its colours are those of other classes; both could be "
            "meant. Save the class indices as grey PNG."
        )
    if by_index is None or (by_index != by_color.mask).any():
        _report(by_color, source, classes)
    return by_color.mask


def _report(reading: ColorReading, source: str, classes: ClassSet) -> None:
    """Logs what is not obvious about a reading by colour."""
    if reading.num_snapped:
        logger.warning(
            "%s: %d pixels of mixed colour on outlines got the class of a neighbour (%.1f %% of the mask).",
            *(source, reading.num_snapped, 100 * reading.num_snapped / reading.mask.size),
        )
    if reading.palette != classes.title:
        logger.warning("%s: the classes are read by the colours of %s.", source, reading.palette)


def _8_bit(samples: np.ndarray, source: str) -> np.ndarray:
    """Returns colours of 8 or 16 bits as uint8, if nothing is lost."""
    if samples.dtype == np.uint8:
        return samples
    for divisor in (257, 256, 1):  # stretched by repetition, by shifting, or not at all
        if not (samples % divisor).any() and samples.max() // divisor <= 255:
            return (samples // divisor).astype(np.uint8)
    raise InputError(f"{source} has colours of 16 bits, which are no class colours; save them with 8 bits.")


def read_mask_file(path: str | os.PathLike[str], classes: ClassSet, *, stored_size: int | None = None) -> np.ndarray:
    """Returns a mask file as uint8 class indices, (H, W), decoded by `decode_mask`.

    Args:
      path: of the file.
      classes: that the mask's labels belong to.
      stored_size: as for `decode_mask`.

    Raises:
      InputError: the file cannot be read, or is not a mask of these classes.
    """
    return decode_mask(read_bytes(path), os.fspath(path), classes, stored_size=stored_size)


def read_masks(value: Any, classes: ClassSet, name: str = "mask") -> list[np.ndarray]:
    """Returns the masks that a caller gives in any form of the table above: uint8 class indices, each (H, W).

    Args:
      value: a path, a PIL image, an array or nested list, or a list of paths, images and arrays. An array is
        (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) as an image file has its channels, one-hot (H, W, K) or (K, H, W), or
        any of these in a batch.
      classes: that the labels belong to.
      name: of the argument, for messages.

    Raises:
      InputError: the value has another shape or type, no pixels, or values that are no label.
    """
    if isinstance(value, str | os.PathLike):
        return [read_mask_file(value, classes)]
    if isinstance(value, Image.Image):
        return [_labels(raster_of(value, name), name, classes)]
    if isinstance(value, list | tuple) and any(
        isinstance(x, str | os.PathLike | Image.Image | np.ndarray) for x in value
    ):
        return [mask for i, one in enumerate(value) for mask in read_masks(one, classes, f"{name}[{i}]")]
    try:
        array = np.asarray(value)
    except ValueError as error:  # a ragged list
        raise _wrong_array(name, "rows of different lengths") from error
    if array.dtype == object or array.dtype.kind not in "biuf":
        raise _wrong_array(name, f"{type(value).__name__} of dtype {array.dtype}")
    if array.size == 0 or not 2 <= array.ndim <= 4:
        raise _wrong_array(name, f"shape {array.shape}")
    return _from_array(array, classes, name)


def _from_array(array: np.ndarray, classes: ClassSet, name: str) -> list[np.ndarray]:
    for axis in (-1, -3):
        if array.ndim > 2 and array.shape[axis] == len(classes) and _is_one_hot(array, axis):
            labels = array.argmax(axis).astype(np.uint8)
            return list(labels.reshape(-1, *labels.shape[-2:]))
    if array.dtype.kind not in "iu":
        raise _wrong_array(name, f"dtype {array.dtype} and shape {array.shape}; of probabilities give argmax(-1)")
    if array.ndim > 2 and array.shape[-1] == 1:
        array = array[..., 0]
    elif array.ndim > 2 and array.shape[-1] in (3, 4):
        images = array.reshape(-1, *array.shape[-3:])
        return [_labels(_raster_of_channels(image, name), name, classes) for image in images]
    if array.ndim == 4:
        raise _wrong_array(name, f"shape {array.shape}")
    return list(classes.check(array.reshape(-1, *array.shape[-2:]), name))


def _is_one_hot(array: np.ndarray, axis: int) -> bool:
    return bool(((array == 0) | (array == 1)).all() and (array.sum(axis) == 1).all())


def _raster_of_channels(image: np.ndarray, name: str) -> Raster:
    if image.min() < 0 or image.max() > 65535:
        raise _wrong_array(name, f"values {image.min()}..{image.max()} in an image of shape {image.shape}")
    image = image.astype(np.uint8 if image.max() <= 255 else np.uint16)
    transparent = None if image.shape[-1] == 3 or image[..., 3].all() else image[..., 3] == 0
    return Raster(image[..., :3], None, transparent)


def _wrong_array(name: str, given: str) -> InputError:
    return InputError(
        f"{name} has {given}; wanted is an array of class indices (H, W), a batch (B, H, W), one-hot (H, W, K), an "
        "image (H, W, 3) in class colours, a PIL image or a path."
    )


def convert_mask(mask: np.ndarray, classes: ClassSet, to: ClassSet, name: str) -> np.ndarray:
    """Returns a mask in the order of other classes, by the names of the classes: uint8 (H, W).

    Args:
      mask: uint8 (H, W), labels of `classes`.
      classes: of the mask.
      to: of the result.
      name: what the mask was read from, for the message.

    Raises:
      InputError: a class of the mask has no namesake in `to`.
    """
    table = classes.table_to(to)
    if table is None:
        missing = ", ".join(name for name in classes.names if name not in to.names)
        raise InputError(f"{name}: {to.title} has no classes {missing} of {classes.title}, so the mask cannot be read.")
    return table[mask]


def palette_image(mask: np.ndarray, classes: ClassSet) -> Image.Image:
    """Returns a mask as a PIL image of class indices with a palette, the colours of the classes.

    Args:
      mask: uint8 (H, W), class indices or the ignored label.
      classes: of the mask.
    """
    image = Image.fromarray(mask)
    image.putpalette(classes.colorize(np.arange(256, dtype=np.uint8)).tobytes())
    return image


def report_cropping(masks: Sequence[np.ndarray]) -> None:
    """Logs in one line how much of masks (H, W) that are not square lies outside of their central squares."""
    oblong = [mask for mask in masks if mask.shape[0] != mask.shape[1]]
    if not oblong:
        return
    shown = sum(np.count_nonzero(mask) for mask in oblong)
    lost = shown - sum(np.count_nonzero(central_square(mask)) for mask in oblong)
    sizes = ", ".join(sorted({f"{mask.shape[1]}x{mask.shape[0]}" for mask in oblong})[:3])
    logger.warning(
        "%d of %d masks are not square (%s) and are cropped to their central squares, which leaves out %.0f %% of what "
        "is not background.",
        *(len(oblong), len(masks), sizes, 100 * lost / max(shown, 1)),
    )


def decode_part(data: bytes, source: str) -> np.ndarray:
    """Decodes the image of one facial part to bool (H, W): the part is where it is neither black nor transparent.

    Args:
      data: the bytes of a lossless image file.
      source: where the bytes come from, for the message.

    Raises:
      InputError: the bytes are empty, truncated, no image, a lossy one, or one that is too large.
    """
    if _is_plain_png(data, _GREY_8_BIT, _RGB_8_BIT):
        require_readable(data, source)
        image = decode_by_opencv(data, source, cv2.IMREAD_ANYCOLOR)
        return image.astype(bool) if image.ndim == 2 else np.asarray(image.any(axis=-1))
    raster = decode_raster(data, source)
    samples = raster.samples
    if raster.palette is not None:
        if (highest := int(samples.max())) >= len(raster.palette):
            raise InputError(
                f"{source} is damaged: it has color {highest} of a palette of {len(raster.palette)} colors."
            )
        samples = raster.palette[samples]
    part = samples.astype(bool) if samples.ndim == 2 else np.asarray(samples.any(axis=-1))
    return part if raster.transparent is None else part & ~raster.transparent


def paint_parts(files: Iterable[AnyPath | str], classes: ClassSet) -> np.ndarray:
    """Returns the label map, uint8 (H, W), of a face that is stored as one file per part.

    Args:
      files: paths of the form `<id>_<part>.png`, at least one. Each part covers the parts before it; the first class
        covers the pixels of no part.
      classes: class set whose names are the names of the parts.

    Raises:
      InputError: a file is damaged, or differs in size from the first.
    """
    mask = None
    for file in files:
        part = decode_part(read_bytes(file), os.fspath(file))
        if mask is None:
            mask = np.zeros(part.shape, np.uint8)
        if part.shape != mask.shape:
            raise InputError(
                f"{file} has height and width {part.shape}, but the other parts of this face have {mask.shape}; all "
                "parts of a face must have the same size."
            )
        mask[part] = classes.index[_part_name(file)]
    if mask is None:
        raise InputError("a face has no part files.")
    return mask


def _part_name(file: AnyPath | str) -> str:
    return Path(file).stem.split("_", 1)[-1]


def resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """Returns the central square of a mask, resized to (size, size) by nearest-neighbour sampling at pixel centres.

    Args:
      mask: uint8 (H, W).
      size: height and width of the result, in pixels.
    """
    mask = central_square(mask)
    if mask.shape[0] == size:
        return mask
    # INTER_NEAREST samples the corner of each cell, which shifts the mask relative to the image.
    return cv2.resize(mask, (size, size), interpolation=cv2.INTER_NEAREST_EXACT)
