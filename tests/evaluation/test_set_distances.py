import json

import numpy as np
import pytest

from sisma_jax.errors import InputError
from sisma_jax.evaluation.features import FeatureNetwork
from sisma_jax.evaluation.frechet import FeatureStatistics, frechet_distance
from sisma_jax.evaluation.kernel_distance import polynomial_mmd
from sisma_jax.evaluation.manifold import density_coverage, precision_recall
from sisma_jax.evaluation.set_distances import format_distances, memorization, set_distances

NETWORK = FeatureNetwork("parser", lambda images: images, "0", "none")
RNG = np.random.default_rng(0)
REAL, SAMPLES = RNG.normal(size=(60, 4)), RNG.normal(0.5, 1, size=(50, 4))


def test_scores_are_those_of_the_single_metrics_with_intervals_around_them():
    distances, terms = set_distances(NETWORK, SAMPLES, REAL)
    scores = distances["scores"]
    assert json.loads(json.dumps(distances, allow_nan=False)) == distances
    fd = frechet_distance(*(FeatureStatistics.from_batches([features]) for features in (SAMPLES, REAL)))
    pr, dc = precision_recall(REAL, SAMPLES), density_coverage(REAL, SAMPLES)
    expected = {"fd_parser": fd, "precision": pr.precision, "recall": pr.recall}
    expected |= {"density": dc.density, "coverage": dc.coverage, "kernel_distance": polynomial_mmd(SAMPLES, REAL)}
    assert {name: pytest.approx(score["value"]) for name, score in scores.items()} == expected
    assert all(score["low"] <= score["value"] <= score["high"] for score in scores.values())
    assert (distances["num_samples"], distances["num_references"]) == (50, 60)
    assert {name: values.mean() for name, values in terms.items()} == {
        name: pytest.approx(scores[name]["value"]) for name in ("precision", "recall", "density", "coverage")
    }


def test_farther_samples_have_larger_distances():
    near, far = (set_distances(NETWORK, SAMPLES + shift, REAL)[0] for shift in (0, 2))
    assert near["scores"]["fd_parser"]["high"] < far["scores"]["fd_parser"]["low"]
    assert near["scores"]["kernel_distance"]["high"] < far["scores"]["kernel_distance"]["low"]
    assert near["scores"]["precision"]["value"] > far["scores"]["precision"]["value"]


def test_too_few_images_are_refused():
    with pytest.raises(InputError, match="5 samples and 60 references are too few to compare; give more than 5"):
        set_distances(NETWORK, SAMPLES[:5], REAL)


def test_copies_of_training_images_are_noticed():
    training, held_out = RNG.normal(size=(200, 4)), RNG.normal(size=(50, 4))
    copied = memorization(training[:50] + 1e-3, held_out, training)
    assert copied["ratio"]["high"] < 0.05
    new = memorization(RNG.normal(size=(50, 4)), held_out, training)
    assert 0.7 < new["ratio"]["low"] < new["ratio"]["value"] < new["ratio"]["high"] < 1.4
    assert memorization(REAL, training[:5], training)["ratio"] is None  # these are training images
    assert new["num_training_images"] == 200


def test_the_table_is_aligned():
    distances, _ = set_distances(NETWORK, SAMPLES, REAL)
    text = format_distances(distances, memorization(SAMPLES, REAL, REAL[:30]))
    lines = text.splitlines()
    assert lines[0].startswith("50 samples and 60 real images")
    assert len({line.index("[") for line in lines if "[" in line}) == 1
    assert any(line.startswith("fd_parser") for line in lines)
    assert any(line.startswith("nearest training image") for line in lines)
