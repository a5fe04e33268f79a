"""Edits of photographs: which faces to sample, and how they are put into the photograph."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Array, Key, UInt8

from sisma_jax.call_arguments import finite_number
from sisma_jax.data import photos, regions
from sisma_jax.data.classes import ClassSet, as_classes
from sisma_jax.data.faces import Square, find_faces
from sisma_jax.data.masks import Masks
from sisma_jax.data.photo_files import to_8_bits
from sisma_jax.data.regions import Region
from sisma_jax.errors import InputError
from sisma_jax.sampler import Faces

if TYPE_CHECKING:
    from sisma_jax.pipeline import Pipeline

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Edit:
    """An edit of a photograph, before its faces are sampled.

    Attributes:
      faces: what to sample.
      image: the photograph, (H, W, 3).
      square: its part in which the faces are.
      weights: opacity of each face in the square.
    """

    faces: Faces
    image: np.ndarray
    square: Square
    weights: Sequence[np.ndarray]

    def composite(self, images: UInt8[np.ndarray, "N S S 3"]) -> np.ndarray:
        """Returns the edited photographs, (N, H, W, 3), with the sampled faces."""
        return np.stack(
            [
                regions.composite(self.image, face, weight, self.square)
                for face, weight in zip(images, self.weights, strict=True)
            ]
        )


def prepare_edit(
    pipe: "Pipeline",
    image: np.ndarray,
    mask: Masks,
    *,
    key: Key[Array, ""] | Key[Array, " N"],
    image_mask: Masks | None = None,
    region: Region | None = None,
    square: Square | None = None,
    margin: float | None = None,
    num_samples: int = 1,
    classes: ClassSet | str | None = None,
) -> Edit:
    """Returns what `Pipeline.edit` samples, and how it puts the faces into the photograph.

    Args:
      pipe: the pipeline that samples.
      image: photograph, uint8 or uint16 (H, W, 3), RGB.
      mask: as for `Pipeline.edit`, like all other arguments.
      key: random keys.
      image_mask: mask before it was edited.
      region: the region to generate.
      square: part of the photograph in which the model generates.
      margin: width of the band in which the face is blended.
      num_samples: edits per mask.
      classes: of the masks.

    Raises:
      InputError: as for `Pipeline.edit`.
    """
    size = pipe.config.data.image_size
    (height, width), small = image.shape[:2], to_8_bits(image)
    band = size // 32 if margin is None else finite_number(margin, "margin")
    classes = as_classes(classes)
    masks = pipe.read_masks(mask, "mask", classes)
    if image_mask is not None and region is not None:
        raise InputError("give either image_mask, the mask before it was edited, or region, not both.")
    if image_mask is not None:
        changed = regions.changed_regions(masks, pipe.read_masks(image_mask, "image_mask", classes))
    elif region is not None:
        changed = [regions.as_region(region)] * len(masks)
    else:
        changed = regions.guessed_regions(masks, _guess(pipe, small))
    for one in changed:
        regions.require_region(one, height, width)
    if square is None:
        square = regions.choose_square(changed, find_faces(small), height, width)
    regions.require_square(square, height, width)
    inside = [regions.crop_region(one, square, height, width) for one in changed]
    weights = [regions.feather(one, band * square.side / size) for one in inside]
    reach = np.stack([regions.feather(regions.resize_region(one, size), band) > 0 for one in inside])
    framed = [regions.sample_mask(one, square, height, width, size) for one in masks]
    faces = pipe.faces(
        np.stack(pipe.require_known_order(framed, "mask", classes)),
        key,
        num_samples,
        photos.resize_image(square.crop(small), size),
        reach,
    )
    return Edit(faces, image, square, [weight for weight in weights for _ in range(num_samples)])


def _guess(pipe: "Pipeline", photo: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W"]:
    """Returns the predicted mask of a photograph whose mask is not given."""
    if pipe.parser is None:
        raise InputError(
            "give image_mask, the mask before it was edited, or region, the region to generate: there is no face "
            "parser that could predict the mask."
        )
    logger.warning(
        "The photograph's own mask (image_mask) is not given. The region to generate is where the mask differs "
        "from the prediction of the face parser, which is a rough guess."
    )
    return pipe.segment(photo, whole=True)
