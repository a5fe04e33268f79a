import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from sisma_jax.data.classes import CELEBAMASK_HQ
from sisma_jax.errors import InputError
from sisma_jax.evaluation import intervals
from sisma_jax.evaluation.intervals import bootstrap_interval, mean_interval, sum_interval
from sisma_jax.evaluation.mask_agreement import agreement_from_confusion, mean_iou, pixel_accuracy

SEEDS = st.integers(0, 2**32 - 1)


def confusions(seed, count=12):
    num_classes = len(CELEBAMASK_HQ)
    generator = np.random.default_rng(seed)
    rare = generator.random(num_classes) < 0.5  # absent from most images, and so from some resamples
    matrices = generator.integers(0, 50, (count, num_classes, num_classes))
    matrices[1:, rare] = 0
    return matrices


@hypothesis.given(SEEDS, st.integers(2, 30))
@hypothesis.settings(max_examples=30)
def test_the_interval_of_a_mean_equals_that_of_the_general_function(seed, count):
    values = np.random.default_rng(seed).normal(size=count)
    options = {"seed": seed, "num_resamples": 50}
    expected = bootstrap_interval(lambda indices: float(values[indices].mean()), count, **options)
    np.testing.assert_allclose(mean_interval(values, **options), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("scores", "name"), [(mean_iou, "miou"), (pixel_accuracy, "pixel_accuracy")])
def test_the_interval_of_a_ratio_equals_that_of_the_general_function(scores, name):
    matrices = confusions(0)
    expected = bootstrap_interval(
        lambda indices: getattr(agreement_from_confusion(matrices[indices].sum(axis=0), CELEBAMASK_HQ), name),
        len(matrices),
        num_resamples=100,
    )
    actual = sum_interval(matrices, scores, num_resamples=100)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
    assert actual.low < actual.value < actual.high


@hypothesis.given(SEEDS)
@hypothesis.settings(max_examples=30)
def test_scores_of_confusion_matrices_equal_those_of_mask_agreement(seed):
    matrices = confusions(seed, count=3)
    agreements = [agreement_from_confusion(matrix, CELEBAMASK_HQ) for matrix in matrices]
    np.testing.assert_allclose(mean_iou(matrices), [agreement.miou for agreement in agreements], rtol=1e-12)
    np.testing.assert_allclose(pixel_accuracy(matrices), [agreement.pixel_accuracy for agreement in agreements])


def test_matrices_without_pixels_have_no_score():
    empty = np.zeros((2, 3, 3), np.int64)
    assert np.isnan([*mean_iou(empty), *pixel_accuracy(empty)]).all()
    with pytest.raises(InputError, match="not finite"):
        sum_interval(empty, mean_iou, num_resamples=10)


def test_results_do_not_depend_on_blocks_of_resamples(monkeypatch):
    values = np.random.default_rng(0).normal(size=20)
    expected = mean_interval(values, num_resamples=30)
    monkeypatch.setattr(intervals, "_WEIGHTS_PER_BLOCK", 7 * 20)
    np.testing.assert_allclose(mean_interval(values, num_resamples=30), expected, rtol=1e-12)


def test_the_seed_decides_the_interval():
    values = np.random.default_rng(0).normal(size=20)
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)
    assert mean_interval(values, seed=3) != mean_interval(values, seed=4)


@hypothesis.given(SEEDS)
@hypothesis.settings(max_examples=30)
def test_a_higher_level_gives_a_wider_interval(seed):
    values = np.random.default_rng(seed).normal(size=20)
    results = [mean_interval(values, num_resamples=200, level=level) for level in (0.5, 0.8, 0.95)]
    assert all(wide.low <= narrow.low <= narrow.high <= wide.high for narrow, wide in itertools.pairwise(results))


def test_equal_values_have_an_interval_of_no_width():
    np.testing.assert_allclose(mean_interval(np.full(9, 2.5)), (2.5, 2.5, 2.5, 0.95), rtol=1e-12)


def test_intervals_contain_the_true_mean_at_about_their_level():
    generator = np.random.default_rng(0)
    trials = [mean_interval(generator.exponential(size=100), seed=i, num_resamples=300, level=0.9) for i in range(400)]
    rate = np.mean([interval.low <= 1.0 <= interval.high for interval in trials])
    # The standard error of the rate is 0.015. Percentiles of skewed data fall short of the level by about 0.01.
    assert 0.84 < rate < 0.94


def test_intervals_contain_the_true_ratio_at_about_their_level():
    generator = np.random.default_rng(0)
    # Of every image, a different number of pixels counts; 0.7 of them are right.
    hits = 0
    for seed in range(200):
        totals = generator.integers(1, 200, 80)
        correct = generator.binomial(totals, 0.7)
        terms = np.stack([correct, totals], axis=1)
        interval = sum_interval(terms, lambda sums: sums[:, 0] / sums[:, 1], seed=seed, num_resamples=300, level=0.9)
        hits += interval.low <= 0.7 <= interval.high
    assert 0.83 < hits / 200 < 0.96  # three standard errors of 0.021


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="at least 2 images, got 1"):
        mean_interval(np.zeros(1))
    with pytest.raises(ValueError, match="num_resamples must be at least 1"):
        mean_interval(np.zeros(5), num_resamples=0)
    with pytest.raises(ValueError, match="level must be between 0 and 1, got 95"):
        mean_interval(np.zeros(5), level=95.0)
    with pytest.raises(ValueError, match=r"values must be \(N,\)"):
        mean_interval(np.zeros((5, 2)))
    with pytest.raises(InputError, match="not finite"):
        mean_interval(np.array([0.0, np.nan]))
