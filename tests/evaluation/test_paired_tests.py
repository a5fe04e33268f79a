import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from sisma_jax.errors import InputError
from sisma_jax.evaluation import paired_tests
from sisma_jax.evaluation.intervals import mean_interval
from sisma_jax.evaluation.mask_agreement import mean_iou
from sisma_jax.evaluation.paired_tests import paired_bootstrap, paired_means, paired_sums, sign_flip_p_value

SEEDS = st.integers(0, 2**32 - 1)


def confusions(seed, accuracy, count=40):
    """Confusion matrices of 3 classes, with `accuracy` of the pixels right."""
    generator = np.random.default_rng(seed)
    return generator.poisson(100 * (accuracy * np.eye(3) + (1 - accuracy) / 2 * (1 - np.eye(3))), (count, 3, 3))


def test_sums_equal_the_general_function():
    first, second = confusions(0, 0.8), confusions(1, 0.78)
    runs = [lambda indices, m=m: float(mean_iou(m[indices].sum(axis=0)[np.newaxis])[0]) for m in (first, second)]
    expected = paired_bootstrap(*runs, len(first), num_resamples=100, seed=5)
    actual = paired_sums(first, second, mean_iou, num_resamples=100, seed=5)
    np.testing.assert_allclose(actual.difference, expected.difference, rtol=1e-9)
    assert actual.p_value == expected.p_value


def test_a_clear_difference_is_significant_and_none_is_not():
    better = paired_sums(confusions(0, 0.9), confusions(1, 0.6), mean_iou)
    assert better.difference.low > 0
    assert better.p_value == pytest.approx(2 / 1001)
    same = paired_sums(confusions(0, 0.9), confusions(0, 0.9), mean_iou)
    assert same.difference[:3] == (0, 0, 0)
    assert same.p_value == 1


def test_what_both_runs_have_in_common_cancels():
    generator = np.random.default_rng(0)
    difficulty = generator.normal(0, 10, 50)
    first, second = difficulty + generator.normal(0.5, 1, 50), difficulty + generator.normal(0, 1, 50)
    paired = paired_means(first, second).difference
    assert paired.value == pytest.approx(first.mean() - second.mean())
    assert paired.high - paired.low < 0.3 * np.ptp(mean_interval(first)[1:3])


@hypothesis.given(SEEDS)
@hypothesis.settings(max_examples=30)
def test_exchanged_runs_have_the_opposite_difference_and_the_same_p_value(seed):
    first, second = np.random.default_rng(seed).normal(size=(2, 9))
    there, back = paired_means(first, second), paired_means(second, first)
    np.testing.assert_allclose(
        [there.difference.value, there.difference.low, there.difference.high],
        [-back.difference.value, -back.difference.high, -back.difference.low],
        rtol=1e-9,
        atol=1e-12,
    )
    assert there.p_value == back.p_value


@hypothesis.given(st.lists(st.integers(-5, 5), min_size=1, max_size=8))
@hypothesis.settings(max_examples=30)
def test_few_differences_give_the_exact_fraction_of_all_signs(differences):
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    expected = np.mean([abs(total) >= abs(sum(differences)) for total in sums])
    # Tenths have rounding errors, and equal sums must count as equal in spite of them.
    assert sign_flip_p_value(np.array(differences) / 10) == expected


def test_random_signs_approximate_all_signs():
    differences = np.random.default_rng(0).normal(0.4, 1, 14)
    exact = sign_flip_p_value(differences, num_permutations=2**14)
    sampled = sign_flip_p_value(differences, num_permutations=10_000)
    assert sampled != exact
    assert sampled == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 10_000) ** 0.5)  # four standard errors


def test_signs_do_not_depend_on_blocks(monkeypatch):
    differences = np.random.default_rng(0).normal(0.4, 1, 20)
    expected = sign_flip_p_value(differences, num_permutations=1000)
    monkeypatch.setattr(paired_tests, "_SIGNS_PER_BLOCK", 20 * 300)
    assert sign_flip_p_value(differences, num_permutations=1000) == expected


def test_the_seed_decides_the_random_signs():
    differences = np.random.default_rng(0).normal(0.4, 1, 20)
    options = {"num_permutations": 500}
    assert sign_flip_p_value(differences, **options) == sign_flip_p_value(differences, **options)
    assert len({sign_flip_p_value(differences, seed=seed, **options) for seed in range(5)}) > 1


def test_p_values_are_uniform_if_the_runs_are_equally_good():
    generator = np.random.default_rng(0)
    signs = [sign_flip_p_value(generator.normal(size=30), seed=i, num_permutations=200) for i in range(400)]
    pairs = generator.normal(size=(400, 2, 60))
    sums = [paired_sums(*pair, lambda total: total, seed=i, num_resamples=200).p_value for i, pair in enumerate(pairs)]
    for p_values in (signs, sums):
        for level in (0.05, 0.2, 0.5):
            error = 3 * (level * (1 - level) / 400) ** 0.5
            # The bootstrap of 60 images rejects slightly too often.
            assert np.mean(np.array(p_values) <= level) == pytest.approx(level, abs=error + 0.02)


def test_the_interval_contains_the_true_difference_at_about_its_level():
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(300):
        difficulty = generator.normal(0, 3, 80)
        first, second = difficulty + generator.normal(0.5, 1, 80), difficulty + generator.normal(0, 1, 80)
        interval = paired_means(first, second, seed=seed, num_resamples=300, num_permutations=1, level=0.9).difference
        hits += interval.low <= 0.5 <= interval.high
    assert 0.84 < hits / 300 < 0.95  # three standard errors of 0.017


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="evaluate both runs on the same masks"):
        paired_means(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="evaluate both runs on the same masks"):
        paired_sums(np.zeros(3), np.zeros(4), lambda total: total)
    with pytest.raises(ValueError, match="num_permutations must be at least 1"):
        sign_flip_p_value(np.ones(3), num_permutations=0)
    with pytest.raises(ValueError, match=r"differences must be \(N,\)"):
        sign_flip_p_value(np.ones((3, 1)))
    for values in (np.zeros(0), np.array([1.0, np.nan])):
        with pytest.raises(InputError, match="all finite"):
            sign_flip_p_value(values)
