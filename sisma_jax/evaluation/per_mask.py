"""Measurements with one term per mask: mask agreement, distances to the original, and diversity.

Each function computes chunk by chunk in bounded memory, and keeps its terms in a cache (see `chunk_cache.py`). Every
process of a job must call it.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from sisma_jax.data.masks import resize_mask
from sisma_jax.errors import InputError
from sisma_jax.evaluation import chunk_cache, mask_agreement
from sisma_jax.evaluation.features import parser_checksum
from sisma_jax.evaluation.image_sets import ImageSet, MaskSet, cyclic_masks
from sisma_jax.evaluation.networks import Lpips
from sisma_jax.files import AnyPath
from sisma_jax.models.face_parser import FaceParser

_BATCH_SIZE = 32


def agreement_terms(
    parser: FaceParser, images: ImageSet, masks: MaskSet, *, cache: AnyPath | None
) -> chunk_cache.Arrays:
    """Returns confusion matrices of each image's predicted mask, int32 (N, K, K), by name.

    "own": against the mask of the image. "other": against the mask of the next image, which any well-aligned face
    reaches.

    Args:
      parser: predicts the masks of the images, at the resolution of the masks.
      images: image i belongs to mask i.
      masks: as many masks, in the classes of the parser.
      cache: folder for the terms.

    Raises:
      InputError: an image or a mask is damaged, or a mask is not square.
    """

    def make(start: int, stop: int) -> chunk_cache.Arrays:
        own, other = (cyclic_masks(masks, first, stop - start) for first in (start, start + 1))
        triples = zip(images.images(start, stop), own, other, strict=True)
        terms: dict[str, list[np.ndarray]] = {"own": [], "other": []}
        for _, same in itertools.groupby(triples, key=lambda triple: (triple[0].shape, triple[1].shape)):
            while batch := list(itertools.islice(same, _BATCH_SIZE)):
                faces, targets, others = zip(*batch, strict=True)
                height, width = targets[0].shape
                if height != width:
                    raise InputError(f"A mask of the agreement is {height} x {width}; masks must be square.")
                predicted = parser.predict(np.stack(faces), size=width, batch_size=_BATCH_SIZE)
                others = [resize_mask(mask, width) for mask in others]
                for name, of_name in (("own", targets), ("other", others)):
                    terms[name].append(mask_agreement.confusion_matrices(predicted, np.stack(of_name), parser.classes))
        return {name: np.concatenate(parts) for name, parts in terms.items()}

    meaning = ("agreement", parser_checksum(parser), images.fingerprint, masks.fingerprint, len(images))
    return chunk_cache.compute(meaning, len(images), make, cache=cache, title="mask agreement")


def lpips_terms(lpips: Lpips, images: ImageSet, others: ImageSet, *, cache: AnyPath | None) -> np.ndarray:
    """Returns the LPIPS distance of each image to the other one of its pair, float32 (N,).

    Args:
      lpips: the distance.
      images: the images.
      others: as many images of the same sizes.
      cache: folder for the terms.

    Raises:
      InputError: an image is damaged, or too small for the network.
    """

    def make(start: int, stop: int) -> chunk_cache.Arrays:
        pairs = zip(_batches(images, start, stop), _batches(others, start, stop), strict=True)
        return {"distance": np.concatenate([lpips.compare(*pair, batch_size=_BATCH_SIZE) for pair in pairs])}

    meaning = ("lpips", lpips.network, lpips.checksum, images.fingerprint, others.fingerprint)
    return chunk_cache.compute(meaning, len(images), make, cache=cache, title="LPIPS to originals")["distance"]


def diversity_terms(
    repetitions: Sequence[ImageSet], count: int, lpips: Lpips | None, *, cache: AnyPath | None
) -> chunk_cache.Arrays:
    """Returns how much the samples of one mask differ: means over all pairs of samples, by name.

    "pixel_diversity", float32 (M,): the root mean square difference of pixels, in units of the range of values, that
    is, in [0, 1]. "lpips_diversity", float32 (M,), if LPIPS is given.

    Args:
      repetitions: at least two sets of images; image i of each is a sample of mask i.
      count: number of masks M, from the first on.
      lpips: the distance.
      cache: folder for the terms.

    Raises:
      InputError: an image is damaged, or too small for the network.
    """
    if len(repetitions) < 2:
        raise InputError(f"Diversity needs at least 2 samples per mask, got {len(repetitions)}.")

    def make(start: int, stop: int) -> chunk_cache.Arrays:
        terms: dict[str, list[float]] = {"pixel_diversity": []}
        if lpips is not None:
            terms["lpips_diversity"] = []
        for same in zip(*(one.images(start, stop) for one in repetitions), strict=True):
            faces = np.stack(same)
            terms["pixel_diversity"].append(_pixel_diversity(faces))
            if lpips is not None:
                terms["lpips_diversity"].append(float(lpips.pairwise(faces).mean()))
        return {name: np.array(values, np.float32) for name, values in terms.items()}

    network = "" if lpips is None else f"{lpips.network}-{lpips.checksum}"
    meaning = ("diversity", network, *(one.fingerprint for one in repetitions))
    return chunk_cache.compute(meaning, count, make, cache=cache, title="diversity", unit="mask")


def _pixel_diversity(faces: np.ndarray) -> float:
    values = faces.reshape(len(faces), -1).astype(np.float64) / 255
    pairs = itertools.combinations(values, 2)
    return float(np.mean([np.sqrt(np.mean((x - y) ** 2)) for x, y in pairs]))


def _batches(images: ImageSet, start: int, stop: int) -> Iterator[np.ndarray]:
    source = images.images(start, stop)
    while batch := list(itertools.islice(source, _BATCH_SIZE)):
        yield np.stack(batch)
