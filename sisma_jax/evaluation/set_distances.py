"""How far a set of samples is from a set of real images, by the features of one network."""

import numpy as np

from sisma_jax.errors import InputError
from sisma_jax.evaluation.features import FeatureNetwork
from sisma_jax.evaluation.frechet_interval import frechet_interval, num_frechet_resamples
from sisma_jax.evaluation.intervals import mean_interval, percentile_interval, resample_weights
from sisma_jax.evaluation.kernel_distance import kernel_distance, kernel_interval
from sisma_jax.evaluation.manifold import density_coverage_per_image, precision_recall_per_image
from sisma_jax.evaluation.neighbours import nearest_neighbours
from sisma_jax.evaluation.results import Memorization, Score, SetDistances, as_score

_SUBSET_SIZE = 1000
_RESAMPLES = 1000
LEAST_IMAGES = 5
"""Each set needs more images than this: the number of neighbours that density and coverage use."""


def set_distances(
    network: FeatureNetwork, samples: np.ndarray, references: np.ndarray, *, seed: int = 0
) -> tuple[SetDistances, dict[str, np.ndarray]]:
    """Returns the distances between the features of samples and those of real images, and terms of some of them.

    The terms are those whose mean is the value, float64: of precision and density per sample, and of recall and
    coverage per real image.

    Args:
      network: that computed the features.
      samples: float32 (N, D).
      references: float32 (M, D).
      seed: of the resamples and subsets.

    Raises:
      InputError: there are too few images.
    """
    least = min(len(samples), len(references))
    if least <= LEAST_IMAGES:
        raise InputError(
            f"{len(samples)} samples and {len(references)} references are too few to compare; give more than "
            f"{LEAST_IMAGES} of each."
        )
    terms = {}
    terms["precision"], terms["recall"] = precision_recall_per_image(references, samples)
    terms["density"], terms["coverage"] = density_coverage_per_image(references, samples, LEAST_IMAGES)
    kernel = kernel_distance(
        samples, references, subset_size=_SUBSET_SIZE if least >= _SUBSET_SIZE else None, seed=seed
    )
    frechet = "fid" if network.name == "inception" else f"fd_{network.name}"
    num_resamples = num_frechet_resamples(samples.shape[1])
    scores = {
        frechet: frechet_interval(samples, references, seed=seed, num_resamples=num_resamples),
        "kernel_distance": kernel_interval(samples, references, kernel.mean, seed=seed),
        **{name: mean_interval(values, seed=seed) for name, values in terms.items()},
    }
    distances: SetDistances = {
        "network": network.name,
        "num_samples": len(samples),
        "num_references": len(references),
        "scores": {name: as_score(interval) for name, interval in scores.items()},
        "kernel_spread": kernel.std if least >= _SUBSET_SIZE else None,
    }
    return distances, terms


def memorization(samples: np.ndarray, held_out: np.ndarray, training: np.ndarray, *, seed: int = 0) -> Memorization:
    """Returns how near samples are to training images, compared with held-out real images.

    Args:
      samples: features of samples, float32 (N, D).
      held_out: features of real images that were not trained on, float32 (M, D).
      training: features of training images, float32 (T, D).
      seed: of the resamples.

    Raises:
      InputError: there are too few images.
    """
    near, far = (nearest_neighbours(features, training, 1).distances[:, 0] for features in (samples, held_out))
    return {
        "samples": as_score(mean_interval(near, seed=seed)),
        "held_out": as_score(mean_interval(far, seed=seed)),
        "ratio": _ratio(near, far, seed),
        "num_training_images": len(training),
    }


def _ratio(near: np.ndarray, far: np.ndarray, seed: int) -> Score | None:
    """Returns the ratio of the means, whose resamples draw from both; None if it is not finite."""
    means = [
        np.concatenate([weights @ values for weights in resample_weights(len(values), _RESAMPLES, seed + index)])
        / len(values)
        for index, values in enumerate((near, far))
    ]
    if not (far.mean() > 0 and (means[1] > 0).all()):
        return None
    return as_score(percentile_interval(float(near.mean() / far.mean()), means[0] / means[1]))


def format_distances(distances: SetDistances, memorized: Memorization | None = None) -> str:
    """Returns the distances as an aligned text table with intervals.

    Args:
      distances: as `set_distances` returns them.
      memorized: as `memorization` returns it.
    """
    rows = dict(distances["scores"])
    if memorized is not None:
        rows |= {"nearest training image": memorized["samples"], "the same, held out": memorized["held_out"]}
    width = max(map(len, rows))
    title = (
        f"{distances['num_samples']} samples and {distances['num_references']} real images, by the features of the "
        f"network {distances['network']}"
    )
    lines = [
        f"{name:{width}} {row['value']:9.4f}   [{row['low']:.4f}, {row['high']:.4f}]" for name, row in rows.items()
    ]
    return "\n".join([title, f"{'':{width}} {'value':>9}   95 % interval", *lines]) + "\n"
