from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.linalg

from sisma_jax.errors import InputError
from sisma_jax.evaluation import frechet
from sisma_jax.evaluation.frechet import FeatureStatistics, frechet_distance

GOLDEN = np.load(Path(__file__).parent / "golden" / "feature_metrics.npz")
SEEDS = st.integers(0, 2**32 - 1)


def features(seed, count, dimensions, *, shift=0.0):
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(dimensions, dimensions)) / dimensions**0.5
    return generator.normal(size=(count, dimensions)) @ mixing + shift


def statistics(*batches):
    return FeatureStatistics.from_batches(batches)


@pytest.mark.parametrize("case", ["many", "few"])
def test_the_distance_equals_that_of_torch_fidelity(case):
    real, generated = statistics(GOLDEN[f"{case}/real"]), statistics(GOLDEN[f"{case}/generated"])
    # The peer's square roots of computed eigenvalues near 0 have half of the digits in the case with few images.
    assert frechet_distance(generated, real) == pytest.approx(float(GOLDEN[f"{case}/frechet"]), rel=1e-6)


def test_the_distance_of_commuting_covariances_equals_the_formula():
    generator = np.random.default_rng(0)
    basis = np.linalg.qr(generator.normal(size=(6, 6)))[0]
    # Zeros: neither of the covariances has full rank, and their null spaces differ.
    first, second = np.array([4.0, 1.0, 0.0, 9.0, 1e-9, 0.0]), np.array([1.0, 0.0, 2.0, 16.0, 1e-9, 0.0])
    shift = generator.normal(size=6)
    expected = shift @ shift + np.sum((first**0.5 - second**0.5) ** 2)
    a, b = (FeatureStatistics(2, m, (basis * v) @ basis.T) for m, v in ((np.zeros(6), first), (shift, second)))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_the_distance_of_covariances_of_full_rank_equals_that_of_a_general_square_root():
    a, b = statistics(features(0, 100, 8)), statistics(features(1, 50, 8, shift=0.5))
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    shift = a.mean - b.mean
    expected = shift @ shift + np.trace(a.covariance + b.covariance - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


@hypothesis.given(SEEDS, st.integers(2, 20), st.integers(2, 20), st.integers(1, 12))
def test_the_distance_is_symmetric_and_zero_between_equal_sets(seed, num_first, num_second, dimensions):
    a = statistics(features(seed, num_first, dimensions))
    b = statistics(features(seed + 1, num_second, dimensions, shift=1.0))
    distance = frechet_distance(a, b)
    assert distance >= 0
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-9, abs=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12 * max(1.0, np.trace(a.covariance)))


@hypothesis.given(SEEDS)
def test_the_order_of_images_and_a_rotation_of_features_do_not_change_the_distance(seed):
    first, second = features(seed, 30, 5), features(seed + 1, 9, 5)
    generator = np.random.default_rng(seed)
    rotation = np.linalg.qr(generator.normal(size=(5, 5)))[0]
    expected = frechet_distance(statistics(first), statistics(second))
    permuted = frechet_distance(statistics(generator.permutation(first)), statistics(second))
    rotated = frechet_distance(statistics(first @ rotation), statistics(second @ rotation))
    np.testing.assert_allclose([permuted, rotated], expected, rtol=1e-9)


def test_a_shift_of_one_set_adds_its_square():
    first = features(0, 40, 6)
    shift = np.arange(6.0)
    assert frechet_distance(statistics(first), statistics(first + shift)) == pytest.approx(shift @ shift, rel=1e-12)


@hypothesis.given(SEEDS, st.lists(st.integers(0, 9), min_size=1, max_size=5), st.floats(-1e6, 1e6))
def test_batches_and_merged_parts_give_the_statistics_of_all_images_at_once(seed, sizes, shift):
    hypothesis.assume(sum(sizes) >= 2)
    whole = features(seed, sum(sizes), 4, shift=shift)
    batches = np.split(whole, np.cumsum(sizes)[:-1])
    accumulated = statistics(*batches)
    merged = statistics(*batches[:2]).merge(FeatureStatistics.empty(4)).merge(statistics(whole[:0], *batches[2:]))
    for result in (accumulated, merged):
        assert result.count == len(whole)
        np.testing.assert_allclose(result.mean, whole.mean(axis=0), rtol=1e-12, atol=1e-12)
        # Of a mean of 1e6, float64 keeps 1e-10, and the sum of x x^T would keep 1e-4.
        np.testing.assert_allclose(result.covariance, np.cov(whole, rowvar=False), rtol=1e-8, atol=1e-8)


def test_features_of_float32_are_accumulated_in_float64():
    whole = (features(0, 64, 3) + 1e4).astype(np.float32)
    np.testing.assert_allclose(
        statistics(*np.split(whole, 8)).covariance, np.cov(whole.astype(np.float64), rowvar=False), rtol=1e-9
    )


def test_bad_input_is_refused():
    two, one = statistics(features(0, 2, 4)), statistics(features(0, 1, 4))
    with pytest.raises(InputError, match="at least 2 images, got 1"):
        frechet_distance(two, one)
    with pytest.raises(ValueError, match="first has 4 dimensions, second has 3"):
        frechet_distance(two, statistics(features(0, 2, 3)))
    with pytest.raises(ValueError, match="features have 3 dimensions, the statistics have 4"):
        two.add(features(0, 2, 3))
    with pytest.raises(InputError, match="such as those of image 1"):
        statistics(np.array([[0.0, 1.0], [np.nan, 0.0]]))
    with pytest.raises(ValueError, match=r"must be \(N, D\)"):
        two.add(np.zeros(4))
    with pytest.raises(InputError, match="batches is empty"):
        statistics()


def test_a_factor_has_one_row_per_dimension_of_the_images():
    covariance = statistics(features(0, 5, 12)).covariance
    factor = frechet.covariance_factor(covariance)
    assert factor.shape == (4, 12)
    np.testing.assert_allclose(factor.T @ factor, covariance, atol=1e-12)
