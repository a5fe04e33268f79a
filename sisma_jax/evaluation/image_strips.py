"""Rows of images with captions as HTML, which wrap on narrow screens (`report.css`)."""

import html
from collections.abc import Sequence

import numpy as np

from sisma_jax.data.classes import ClassSet
from sisma_jax.evaluation.embedded_images import LARGEST_EXACT_SIDE, image_uri, mask_uri

# Width in pixels at which images are shown on a wide screen: small ones by a whole factor, near the first number.
_SMALL_CELL, _LARGE_CELL = 140, 176


def photo(image: np.ndarray, alt: str, caption: str) -> str:
    """Returns an image with its caption, a `<figure>` element.

    Args:
      image: uint8 RGB (H, W, 3).
      alt: text for readers who do not see the image; it is escaped here.
      caption: text below the image; it is escaped here.
    """
    return _figure(image_uri(image), image.shape[1], alt, caption)


def colored_mask(mask: np.ndarray, classes: ClassSet, alt: str, caption: str) -> str:
    """Returns a mask in the colours of its classes with its caption, a `<figure>` element.

    Args:
      mask: uint8 (H, W), class indices or the ignored label.
      classes: of the mask.
      alt: as `photo`.
      caption: as `photo`.
    """
    return _figure(mask_uri(mask, classes), mask.shape[1], alt, caption)


def strips(rows: Sequence[Sequence[str]], width: int, *, is_aligned: bool) -> str:
    """Returns rows of figures.

    Args:
      rows: figures of each row; at least one row.
      width: of the images, in pixels.
      is_aligned: whether the captions of the first row hold for all rows, as in a grid. Otherwise, two rows are beside
        each other where the screen is wide enough.
    """
    columns = max(map(len, rows))
    cell = width * max(1, round(_SMALL_CELL / width)) if width <= LARGEST_EXACT_SIDE else _LARGE_CELL
    narrow = 2 if columns in (2, 4) else 3
    style = f"--columns: {columns}; --columns-narrow: {narrow}; --cell: {cell}px"
    lines = [f'<div class="strip">{"".join(figures)}</div>' for figures in rows]
    return "\n".join([f'<div class="strips {"aligned" if is_aligned else "half"}" style="{style}">', *lines, "</div>"])


def legend(masks: Sequence[np.ndarray], classes: ClassSet) -> str:
    """Returns the names and colours of the classes that occur in masks, a `<ul>` element.

    Args:
      masks: uint8 arrays of any shapes, class indices or the ignored label; at least one.
      classes: of the masks.
    """
    present = np.unique(np.concatenate([mask.reshape(-1) for mask in masks])).tolist()
    items = [
        f"<li>{swatch(classes, classes.names[index])}{html.escape(classes.names[index])}</li>"
        for index in present
        if index < len(classes)
    ]
    return f'<ul class="legend" aria-label="Classes of the masks">{"".join(items)}</ul>'


def swatch(classes: ClassSet | None, name: str) -> str:
    """Returns a square in the colour of a class; "" if the class is unknown.

    Args:
      classes: which have colours.
      name: of the class.
    """
    if classes is None or name not in classes.index:
        return ""
    red, green, blue = classes.colors[classes.index[name]]
    return f'<span class="swatch" style="--color: #{red:02x}{green:02x}{blue:02x}"></span>'


def _figure(uri: str, width: int, alt: str, caption: str) -> str:
    kind = ' class="exact"' if width <= LARGEST_EXACT_SIDE else ""
    image = f'<img{kind} src="{uri}" alt="{html.escape(alt)}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"
