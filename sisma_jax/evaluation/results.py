"""The result of an evaluation: a JSON file of values with their intervals, and of all that they depend on.

`evaluation.json` holds an `Evaluation`. `evaluation_terms.npz` holds the terms of each mask or image from which the
values are computed, so that two evaluations can be compared by paired tests (see `comparison.py`).
"""

import importlib.metadata
import io
import json
import platform
import zipfile
from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict, cast

import jax
import numpy as np

from sisma_jax.errors import InputError
from sisma_jax.evaluation.intervals import Interval
from sisma_jax.files import AnyPath, bucket_errors, to_npz, write_atomically

FORMAT = 2
"""Version of the format of `evaluation.json`; files of version 1 have no such number."""

_PACKAGES = ("sisma_jax", "jax", "jaxlib", "flax", "numpy", "opencv-python-headless")


class Score(TypedDict):
    """A metric with its bootstrap interval."""

    value: float
    low: float
    high: float
    level: float


class Subject(TypedDict):
    """What was evaluated.

    Attributes:
      kind: "run", "exported" or "folders".
      path: of the run, of the exported file, or of the folder of samples.
      step: training step of the parameters; absent for folders.
      checksum: CRC-32 of the EMA parameters, or a hash of the folder's files.
      parameters: number of parameters of the denoiser; absent for folders.
      objective: what the held-out loss measures; absent for folders.
    """

    kind: str
    path: str
    checksum: str
    step: NotRequired[int]
    parameters: NotRequired[int]
    objective: NotRequired[str]


class ProtocolRecord(TypedDict):
    """How the numbers were obtained. Two evaluations with different values here are not comparable.

    Attributes:
      name: "sdm", "scdm", or "" for the configuration's own values.
      data: name of the data set, or the folder of real images.
      data_fingerprint: identifies its files.
      num_masks: held-out masks for which a face was sampled; 0 for folders.
      num_references: real images.
      references: which real images they are.
      image_size: side of the images in pixels; 0 for folders.
      diversity_masks: masks of which several faces were sampled.
      samples_per_mask: faces of each of these.
      sampling: the sampling settings; its "seed" is the seed of the faces.
      resize: by network, how images are brought to its resolution.
    """

    name: str
    data: str
    data_fingerprint: str
    num_masks: int
    num_references: int
    references: str
    image_size: int
    diversity_masks: int
    samples_per_mask: int
    sampling: dict[str, Any]
    resize: dict[str, str]


class AgreementScores(TypedDict):
    """Scores of one set of predicted masks against target masks; None where no pixel counts."""

    miou: Score | None
    pixel_accuracy: Score | None
    iou_per_class: dict[str, Score | None]


class MaskAgreement(TypedDict):
    """How well faces follow their masks, by the face parser.

    Attributes:
      num_images: number of masks.
      samples: of the samples against their own masks.
      ceiling: of the original photographs against their masks, which are limited by the face parser only; None for
        two folders.
      floor: of the samples against the masks of other faces, which any well-aligned face reaches; None for a single
        image.
    """

    num_images: int
    samples: AgreementScores
    ceiling: AgreementScores | None
    floor: AgreementScores | None


class SetDistances(TypedDict):
    """Distances between samples and real images by the features of one network.

    Attributes:
      network: name of the network; the Fréchet distance is fid for Inception-v3, and fd_NAME for any other.
      num_samples: number of samples.
      num_references: number of real images.
      scores: by name: fid or fd_NAME, kernel_distance, precision, recall, density and coverage.
      kernel_spread: standard deviation of the kernel distance (KID) over subsets of 1000 images, which other programs
        report beside it; None if there are fewer images, of which all are one subset.
    """

    network: str
    num_samples: int
    num_references: int
    scores: dict[str, Score]
    kernel_spread: float | None


class Memorization(TypedDict):
    """How near samples are to training images, by the features of the face parser.

    Attributes:
      samples: mean distance of a sample to its nearest training image.
      held_out: the same of held-out real images.
      ratio: samples / held_out. Well below 1, the model repeats training images. None if all held-out images are among
        the training images.
      num_training_images: number of training images that were searched.
    """

    samples: Score
    held_out: Score
    ratio: Score | None
    num_training_images: int


class Evaluation(TypedDict):
    """The content of `evaluation.json`.

    Attributes:
      format: `FORMAT`.
      subject: what was evaluated.
      protocol: how.
      networks: checksums of the weights, by the name of the network.
      versions: of Python, the packages and the platform of JAX.
      held_out_loss: the training objective on held-out images; None if it was not computed.
      mask_agreement: None without a face parser.
      distances: one entry per feature network.
      diversity: distances between samples of the same mask, by name, such as "lpips_diversity".
      paired: distances of samples to the originals of their masks, by name, such as "lpips_distance".
      reconstruction: PSNR in dB and SSIM of the autoencoder's reconstructions, by name.
      memorization: None without a face parser of this project.
      not_computed: by the name of a metric, why it is missing and what it needs.
    """

    format: int
    subject: Subject
    protocol: ProtocolRecord
    networks: dict[str, str]
    versions: dict[str, str]
    held_out_loss: Score | None
    mask_agreement: MaskAgreement | None
    distances: list[SetDistances]
    diversity: dict[str, Score]
    paired: dict[str, Score]
    reconstruction: dict[str, Score]
    memorization: Memorization | None
    not_computed: dict[str, str]


def as_score(interval: Interval) -> Score:
    """Returns an interval in the form that JSON can represent."""
    return {"value": interval.value, "low": interval.low, "high": interval.high, "level": interval.level}


def versions() -> dict[str, str]:
    """Returns the versions of Python, of the packages on which the values depend, and the platform of JAX."""
    found = {"python": platform.python_version(), "platform": jax.default_backend()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # a clone that is not installed
            continue
    return found


def flat_scores(evaluation: Evaluation) -> dict[str, Score]:
    """Returns all values that have an interval, by their names in tables: "miou", "fid", "parser_precision", ..."""
    scores: dict[str, Score] = {}
    agreement = evaluation["mask_agreement"]
    if agreement is not None:
        named = {"miou": agreement["samples"]["miou"], "pixel_accuracy": agreement["samples"]["pixel_accuracy"]}
        scores |= {name: score for name, score in named.items() if score is not None}
    for one in evaluation["distances"]:
        for name, score in one["scores"].items():
            is_frechet = name == "fid" or name.startswith("fd_")
            scores[name if is_frechet else f"{one['network']}_{name}"] = score
    if evaluation["held_out_loss"] is not None:
        scores["held_out_loss"] = evaluation["held_out_loss"]
    scores |= evaluation["diversity"] | evaluation["paired"] | evaluation["reconstruction"]
    return scores


def write(path: AnyPath, evaluation: Evaluation) -> None:
    """Writes `evaluation.json`, atomically.

    Args:
      path: of the file.
      evaluation: the values.

    Raises:
      OSError: the file cannot be written.
    """
    write_atomically(path, json.dumps(evaluation, indent=2, allow_nan=False) + "\n")


def read(path: AnyPath) -> Evaluation:
    """Returns the content of an `evaluation.json`.

    Args:
      path: of the file.

    Raises:
      InputError: the file does not exist, is damaged, or has the format of another version.
    """
    try:
        with bucket_errors(path):
            content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; run the command `evaluate` first.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}).") from error
    found = content.get("format", 1) if isinstance(content, dict) else None
    if found != FORMAT:
        raise InputError(f"{path} has format {found}, not {FORMAT}; run the command `evaluate` again.")
    return cast(Evaluation, content)


def write_terms(path: AnyPath, terms: Mapping[str, np.ndarray]) -> None:
    """Writes the terms of each mask or image, atomically.

    Args:
      path: of the file, `evaluation_terms.npz`.
      terms: by name: "ids", "confusion" (N, K, K), names of `Evaluation.diversity` (M,) and `Evaluation.paired` (N,),
        "held_out_loss" (N,), "NETWORK_precision" and the like (N,),
        "features_NETWORK" (N, D), and the `FeatureStatistics` of the real images: "real_count_NETWORK",
        "real_mean_NETWORK" and "real_scatter_NETWORK".

    Raises:
      OSError: the file cannot be written.
    """
    write_atomically(path, to_npz(terms))


def read_terms(path: AnyPath) -> dict[str, np.ndarray]:
    """Returns the terms that `write_terms` wrote.

    Args:
      path: of the file.

    Raises:
      InputError: the file does not exist or is damaged.
    """
    try:
        with bucket_errors(path), np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as content:
            return dict(content)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read ({error}); run the command `evaluate` again.") from error
