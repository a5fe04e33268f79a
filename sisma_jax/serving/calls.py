"""Parsed fields to calls of the pipeline, and their images to bytes. All of it runs in worker threads."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sisma_jax.config import Sampling
from sisma_jax.data.classes import ClassSet, known_names
from sisma_jax.data.faces import Square
from sisma_jax.data.photo_files import Photo
from sisma_jax.edits import prepare_edit
from sisma_jax.errors import InputError
from sisma_jax.pipeline import Pipeline
from sisma_jax.sampler import Faces
from sisma_jax.serving import images
from sisma_jax.serving.fields import SETTINGS
from sisma_jax.serving.limits import Limits
from sisma_jax.serving.problems import Problem

OWN_CLASSES = "model"
"""Value of the field `classes` for the classes of the model. A mask that names its classes is not checked for another
order, so people may paint what no training mask shows."""


@dataclasses.dataclass(frozen=True)
class Call:
    """What a request samples, and what it sends.

    Attributes:
      faces: what to sample.
      settings: how.
      seeds: of the images.
      size: width and height of the images, in pixels.
      encode: sampled faces to the bytes of the PNG files.
      every: predictions of every so many steps, for a stream.
    """

    faces: Faces
    settings: Sampling
    seeds: list[int]
    size: tuple[int, int]
    encode: Callable[[np.ndarray], list[bytes]]
    every: int = 1

    def shown_settings(self) -> dict[str, Any]:
        """Returns the settings as the response states them."""
        return {name: getattr(self.settings, name) for name in SETTINGS}


class Calls:
    """Makes calls of a pipeline from fields.

    Attributes:
      class_sets: names of the class sets that convert to the classes of the model.
    """

    def __init__(self, pipe: Pipeline, limits: Limits):
        self._pipe = pipe
        self._limits = limits
        own = pipe.config.data.classes
        known = {name: ClassSet.load(name) for name in known_names()}
        self._known = {name: classes for name, classes in known.items() if classes.table_to(own) is not None}
        self._known[OWN_CLASSES] = own
        self.class_sets = tuple(sorted(self._known))

    def sample(self, given: Mapping[str, Any]) -> Call:
        """Returns the call for the fields of `POST /v1/sample`.

        Raises:
          Problem, InputError: a field does not fit.
        """
        masks = self._pipe.masks(self._mask(given, "mask"), self._named(given))
        seeds, keys = _seeds_and_keys(given, self._pipe.config.sample.seed)
        faces = self._pipe.faces(masks, keys, len(seeds))
        size = self._pipe.config.data.image_size
        return Call(faces, self._settings(given), seeds, (size, size), _pngs, given.get("every", 1))

    def edit(self, given: Mapping[str, Any]) -> Call:
        """Returns the call for the fields of `POST /v1/edit`.

        Raises:
          Problem, InputError: a field does not fit.
        """
        photo = images.photo_of(given["image"], "image", self._limits)
        height, width, _ = photo.pixels.shape
        seeds, keys = _seeds_and_keys(given, self._pipe.config.sample.seed)
        most = 2 * self._limits.photo_pixels
        if len(seeds) * height * width > most:
            raise Problem(413, f"{len(seeds)} images of {width}x{height} pixels are more than {most:,} pixels.")
        square = given.get("square")
        if square is not None and len(square) != 3:
            raise Problem(422, "'square' must be [top, left, side].")
        edit = prepare_edit(
            self._pipe,
            photo.pixels,
            self._mask(given, "mask"),
            key=keys,
            image_mask=self._mask(given, "image_mask") if "image_mask" in given else None,
            region=images.region_of(given["region"], "region", self._limits) if "region" in given else None,
            square=None if square is None else Square(*square),
            margin=given.get("margin"),
            num_samples=len(seeds),
            classes=self._named(given),
        )

        def encode(faces: np.ndarray) -> list[bytes]:
            return [images.png_of(one, photo) for one in edit.composite(faces)]

        return Call(edit.faces, self._settings(given), seeds, (width, height), encode)

    def segment(self, given: Mapping[str, Any]) -> np.ndarray:
        """Returns the mask for the fields of `POST /v1/segment`: class indices.

        Raises:
          Problem, InputError: a field does not fit.
        """
        if self._pipe.parser is None:
            raise Problem(404, "this model has no face parser; train one with the command `parser`, and export again.")
        photo: Photo = images.photo_of(given["photo"], "photo", self._limits)
        return self._pipe.segment(photo.pixels, whole=given.get("whole", False))

    def _named(self, given: Mapping[str, Any]) -> ClassSet | None:
        """Returns the class set that the request names."""
        return self._known[given["classes"]] if "classes" in given else None

    def _mask(self, given: Mapping[str, Any], name: str) -> np.ndarray:
        """Returns a mask in the classes that the request names, or in those of the model."""
        classes = self._named(given) or self._pipe.config.data.classes
        return images.mask_of(given[name], name, classes, self._limits)

    def _settings(self, given: Mapping[str, Any]) -> Sampling:
        return self._pipe.settings(**{name: given[name] for name in SETTINGS if name in given})


def _seeds_and_keys(given: Mapping[str, Any], default: int) -> tuple[list[int], jax.Array]:
    """Returns the seed and the key of each image, as `pipe(mask, key=jax.random.key(seed))` derives them."""
    if "seeds" in given:
        if "seed" in given or "num_samples" in given:
            raise Problem(422, "'seeds' takes the place of 'seed' and 'num_samples'; give one or the other.")
        seeds, numbers = list(given["seeds"]), [0] * len(given["seeds"])
    else:
        numbers = list(range(given.get("num_samples", 1)))
        seeds = [given.get("seed", default)] * len(numbers)
    if not seeds:
        raise Problem(422, "'seeds' is empty; give at least one.")
    keys = [jax.random.fold_in(jax.random.key(seed), number) for seed, number in zip(seeds, numbers, strict=True)]
    return seeds, jnp.stack(keys)


def _pngs(faces: np.ndarray) -> list[bytes]:
    return [images.png_of(face) for face in faces]


def refusal(error: InputError) -> Problem:
    """Returns the problem (422) for an error of the library, which names the argument and the fix."""
    return Problem(422, str(error))
