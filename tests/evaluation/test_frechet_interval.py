import numpy as np
import pytest

from sisma_jax.errors import InputError
from sisma_jax.evaluation import frechet_interval as frechet_interval_module
from sisma_jax.evaluation.frechet import FeatureStatistics, frechet_distance
from sisma_jax.evaluation.frechet_interval import frechet_interval


def sets(seed, num_first=60, num_second=50, dimensions=4):
    generator = np.random.default_rng(seed)
    scales = np.linspace(0.5, 2, dimensions)
    first = generator.normal(size=(num_first, dimensions)) * scales
    return first, generator.normal(0.5, size=(num_second, dimensions)) * scales[::-1]


def distance(first, second):
    return frechet_distance(FeatureStatistics.from_batches([first]), FeatureStatistics.from_batches([second]))


# More images than dimensions, where the covariance of a resample is decomposed, and fewer.
@pytest.mark.parametrize("dimensions", [4, 70])
def test_the_interval_equals_that_of_resampled_features(dimensions):
    first, second = sets(0, dimensions=dimensions)
    generator = np.random.default_rng(3)
    resampled = [
        distance(*(features[generator.integers(len(features), size=len(features))] for features in (first, second)))
        for _ in range(20)
    ]
    value = distance(first, second)
    limits = np.quantile(resampled, [0.05, 0.95]) - (np.mean(resampled) - value)
    actual = frechet_interval(first, second, seed=3, num_resamples=20, level=0.9)
    np.testing.assert_allclose(actual, (value, *limits, 0.9), rtol=1e-9)


def test_dimensions_without_variance_of_their_own_do_not_matter(monkeypatch):
    monkeypatch.setattr(frechet_interval_module, "_ROWS_PER_BLOCK", 7)
    first, second = sets(0)
    # A dimension that is constant, and one that another determines: the covariances have no full rank.
    more = [np.column_stack([x, np.full(len(x), 3.0), x[:, 0] - x[:, 1]]) for x in (first, second)]
    rotation = np.eye(6)[:, [4, 5, 0, 1, 2, 3]]
    plain, rotated = (frechet_interval(*x, num_resamples=10) for x in (more, [x @ rotation for x in more]))
    np.testing.assert_allclose(rotated, plain, rtol=1e-9)
    assert plain.value == pytest.approx(distance(*more))


def test_statistics_are_kept_as_they_are():
    first, second = sets(0)
    statistics = FeatureStatistics.from_batches([second])
    fixed, both = (frechet_interval(first, x, num_resamples=100) for x in (statistics, second))
    assert fixed.value == pytest.approx(both.value)
    assert fixed.low < fixed.value < fixed.high
    assert fixed.high - fixed.low < both.high - both.low


def test_the_seed_decides_the_interval():
    first, second = sets(0)
    results = [frechet_interval(first, second, seed=seed, num_resamples=10) for seed in (0, 0, 1)]
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize(("count", "dimensions"), [(50, 3), (15, 16)])
def test_the_interval_contains_the_mean_distance_of_such_sets_at_about_its_level(count, dimensions):
    sizes = {"num_first": count, "num_second": count, "dimensions": dimensions}
    expected = np.mean([distance(*sets(10_000 + seed, **sizes)) for seed in range(300)])
    hits = 0
    for seed in range(100):
        interval = frechet_interval(*sets(seed, **sizes), seed=seed, num_resamples=60, level=0.9)
        hits += interval.low <= expected <= interval.high
    assert 0.81 < hits / 100 < 0.99  # three standard errors of 0.03


def test_bad_input_is_refused():
    first, second = sets(0)
    with pytest.raises(InputError, match="second has 1 images; at least 2"):
        frechet_interval(first, second[:1])
    with pytest.raises(ValueError, match="num_resamples must be at least 1"):
        frechet_interval(first, second, num_resamples=0)
    with pytest.raises(ValueError, match="3 dimensions"):
        frechet_interval(first[:, :3], FeatureStatistics.from_batches([second]))
