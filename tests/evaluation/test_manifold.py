from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from sisma_jax.errors import InputError
from sisma_jax.evaluation import neighbours
from sisma_jax.evaluation.manifold import density_coverage, precision_recall

GOLDEN = np.load(Path(__file__).parent / "golden" / "feature_metrics.npz")
SEEDS = st.integers(0, 2**32 - 1)


def scores(real, generated, k=3):
    return np.array([*precision_recall(real, generated, k), *density_coverage(real, generated, k)])


def scores_of_all_distances(real, generated, k=3):
    def distances(x, y):
        return np.sqrt(((x[:, np.newaxis] - y[np.newaxis]) ** 2).sum(axis=-1))

    is_in_real, is_in_generated = (
        distances(x, y) <= np.sort(distances(x, x), axis=1)[:, k, np.newaxis]
        for x, y in ((real, generated), (generated, real))
    )
    precision, recall = is_in_real.any(axis=0).mean(), is_in_generated.any(axis=0).mean()
    return np.array([precision, recall, is_in_real.sum(axis=0).mean() / k, is_in_real.any(axis=1).mean()])


def sets(seed, num_real=40, num_generated=30, dimensions=5):
    generator = np.random.default_rng(seed)
    real = generator.normal(size=(num_real, dimensions))
    return real, generator.normal(0.3, 0.9, size=(num_generated, dimensions))


@pytest.mark.parametrize("case", ["many", "few"])
def test_scores_equal_those_of_prdc(case):
    actual = scores(GOLDEN[f"{case}/real"], GOLDEN[f"{case}/generated"], int(GOLDEN["k"]))
    np.testing.assert_allclose(actual, GOLDEN[f"{case}/prdc"], rtol=1e-12)


@hypothesis.given(SEEDS)
@hypothesis.settings(max_examples=30)
def test_scores_equal_those_of_all_distances(seed):
    real, generated = sets(seed)
    np.testing.assert_allclose(scores(real, generated), scores_of_all_distances(real, generated), rtol=1e-12)


def test_scores_do_not_depend_on_blocks(monkeypatch):
    real, generated = sets(0)
    expected = scores(real, generated)
    monkeypatch.setattr(neighbours, "_ROWS_PER_BLOCK", 8)
    monkeypatch.setattr(neighbours, "_COLUMNS_PER_BLOCK", 16)
    np.testing.assert_array_equal(scores(real, generated), expected)


@hypothesis.given(SEEDS)
@hypothesis.settings(max_examples=30)
def test_the_order_of_images_and_the_place_of_all_features_do_not_matter(seed):
    real, generated = sets(seed)
    generator = np.random.default_rng(seed)
    expected = scores(real, generated)
    permuted = scores(generator.permutation(real), generator.permutation(generated))
    np.testing.assert_allclose(permuted, expected, rtol=1e-14)  # a sum in another order
    np.testing.assert_array_equal(scores(4.0 * real, 4.0 * generated), expected)


@hypothesis.given(SEEDS)
@hypothesis.settings(max_examples=30)
def test_precision_and_recall_exchange_with_the_sets(seed):
    real, generated = sets(seed)
    precision, recall = precision_recall(real, generated)
    assert precision_recall(generated, real) == (recall, precision)


@hypothesis.given(SEEDS, st.floats(-1e4, 1e4))
@hypothesis.settings(max_examples=30)
def test_equal_sets_are_perfect(seed, centre):
    real = sets(seed)[0] + centre
    precision, recall, density, coverage = scores(real, real.copy(), k=3)
    assert precision == recall == coverage == 1
    # A closed ball contains its centre and its k nearest neighbours.
    assert density == pytest.approx(4 / 3)


def test_integer_features_with_many_equal_distances_are_counted_exactly():
    generator = np.random.default_rng(0)
    real, generated = generator.integers(0, 3, (40, 5)).astype(float), generator.integers(0, 3, (30, 5)).astype(float)
    np.testing.assert_allclose(scores(real, generated), scores_of_all_distances(real, generated), rtol=1e-12)


def test_samples_that_are_all_equal_have_no_recall():
    real, generated = sets(0)
    collapsed = np.zeros_like(generated)
    precision, recall, _, coverage = scores(real, collapsed)
    assert precision == 1
    assert recall == 0
    assert coverage < 1


def test_distant_sets_have_nothing_in_common():
    real, generated = sets(0)
    np.testing.assert_array_equal(scores(real, generated + 100), 0)


def test_density_and_coverage_of_equal_distributions_have_their_expectations():
    generator = np.random.default_rng(0)
    values = np.array([density_coverage(*generator.normal(size=(2, 200, 3)), k=5) for _ in range(40)])
    # The paper's expectations: density 1, and coverage 1 - (N - 1)...(N - k) / ((2 N - 1)...(2 N - k)).
    expected = [1.0, 1 - np.prod([(200 - i) / (400 - i) for i in range(1, 6)])]
    errors = np.abs(values.mean(axis=0) - expected)
    assert np.all(errors < 4 * values.std(axis=0) / 40**0.5)


def test_bad_input_is_refused():
    real, generated = sets(0, num_generated=3)
    with pytest.raises(InputError, match="generated has 3 images; at least 4 are necessary"):
        precision_recall(real, generated)
    with pytest.raises(ValueError, match="k must be at least 1"):
        density_coverage(real, generated, k=0)
