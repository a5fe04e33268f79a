from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from sisma_jax.errors import InputError
from sisma_jax.evaluation import kernel_distance as module
from sisma_jax.evaluation.kernel_distance import kernel_distance, polynomial_mmd

GOLDEN = np.load(Path(__file__).parent / "golden" / "feature_metrics.npz")
CASES = ("many", "few")
SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("case", CASES)
def test_mean_and_deviation_over_subsets_equal_those_of_torch_fidelity(case):
    real, generated = GOLDEN[f"{case}/real"], GOLDEN[f"{case}/generated"]
    values = [polynomial_mmd(generated[i], real[j]) for i, j in GOLDEN[f"{case}/subsets"]]
    # The peer computes the kernel in float32 where the features are.
    np.testing.assert_allclose([np.mean(values), np.std(values)], GOLDEN[f"{case}/kernel"], rtol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_all_images_at_once_give_the_value_of_torch_fidelity(case):
    real, generated = GOLDEN[f"{case}/real"], GOLDEN[f"{case}/generated"]
    count = min(len(real), len(generated))
    mean, std = kernel_distance(generated[:count], real[:count], subset_size=None)
    assert mean == pytest.approx(float(GOLDEN[f"{case}/kernel_all"]), rel=2e-5)
    assert std == 0


def sets(seed, num_first, num_second, dimensions=6):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(num_first, dimensions)), generator.normal(0.5, 1.2, size=(num_second, dimensions))


@hypothesis.given(SEEDS, st.integers(2, 9), st.integers(2, 9))
def test_the_estimate_equals_a_loop_over_pairs(seed, num_first, num_second):
    first, second = sets(seed, num_first, num_second)

    def mean(x, y, omit):
        return np.mean(
            [(a @ b / 6 + 1) ** 3 for i, a in enumerate(x) for j, b in enumerate(y) if not (omit and i == j)]
        )

    expected = mean(first, first, True) + mean(second, second, True) - 2 * mean(first, second, False)
    assert polynomial_mmd(first, second) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@hypothesis.given(SEEDS)
def test_the_estimate_is_symmetric_and_does_not_depend_on_the_order_or_on_blocks(seed):
    first, second = sets(seed, 11, 8)
    expected = polynomial_mmd(first, second)
    others = [polynomial_mmd(second, first), polynomial_mmd(first[::-1], second)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_SIZE", 3)
        others.append(polynomial_mmd(first, second))
    np.testing.assert_allclose(others, expected, rtol=1e-9, atol=1e-12)


def test_the_estimate_has_no_bias_for_equal_distributions():
    generator = np.random.default_rng(0)
    values = [polynomial_mmd(*generator.normal(size=(2, 10, 4))) for _ in range(500)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 500**0.5  # three standard errors
    assert min(values) < 0


def test_a_larger_shift_gives_a_larger_distance():
    first, second = sets(0, 200, 200)
    distances = [kernel_distance(first, second + shift, num_subsets=5, subset_size=50).mean for shift in (0, 1, 2)]
    assert distances == sorted(distances)


def test_the_seed_decides_the_subsets():
    first, second = sets(0, 50, 60)
    options = {"num_subsets": 4, "subset_size": 20}
    assert kernel_distance(first, second, **options) == kernel_distance(first, second, **options)
    assert kernel_distance(first, second, **options) != kernel_distance(first, second, **options, seed=1)


def test_bad_input_is_refused():
    first, second = sets(0, 50, 60)
    with pytest.raises(InputError, match=r"between 2 and the number of images, 50, got 1000"):
        kernel_distance(first, second)
    with pytest.raises(InputError, match="first has 1 images; at least 2"):
        polynomial_mmd(first[:1], second)
    with pytest.raises(ValueError, match="first has 6 dimensions, second has 5"):
        polynomial_mmd(first, second[:, 1:])
    with pytest.raises(ValueError, match="num_subsets must be at least 1"):
        kernel_distance(first, second, num_subsets=0, subset_size=10)
    with pytest.raises(ValueError, match="real numbers"):
        polynomial_mmd(first + 1j, second)


def test_the_interval_is_as_wide_as_the_spread_of_estimates_over_fresh_sets():
    generator = np.random.default_rng(0)

    def sets(count):
        return generator.normal(size=(count, 4)), generator.normal(0.3, 1, size=(count, 4))

    estimates = [module.polynomial_mmd(*sets(80)) for _ in range(300)]
    widths = []
    for seed in range(10):
        first, second = sets(80)
        value = module.polynomial_mmd(first, second)
        interval = module.kernel_interval(first, second, value, seed=seed)
        assert interval.low < value < interval.high
        widths.append(interval.high - interval.low)
    low, high = np.quantile(estimates, [0.025, 0.975])
    assert 0.7 < np.median(widths) / (high - low) < 1.4


def test_the_interval_of_many_images_is_that_of_some_of_them_scaled(monkeypatch):
    generator = np.random.default_rng(1)
    first, second = generator.normal(size=(400, 3)), generator.normal(0.3, 1, size=(400, 3))
    whole = module.kernel_interval(first, second, 0.0)
    monkeypatch.setattr(module, "_MOST_RESAMPLED", 100)
    some = module.kernel_interval(first, second, 0.0)
    assert 0.6 < (some.high - some.low) / (whole.high - whole.low) < 1.6


def test_a_few_images_have_an_interval_too():
    generator = np.random.default_rng(2)
    interval = module.kernel_interval(generator.normal(size=(2, 3)), generator.normal(size=(3, 3)), 0.5)
    assert interval.low <= 0.5 <= interval.high
