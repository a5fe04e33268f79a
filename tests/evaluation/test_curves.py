import numpy as np

from sisma_jax.evaluation.curves import series, smooth


def test_a_series_has_the_lines_with_the_metric():
    steps, values = series([{"step": 1, "loss": 2.0}, {"step": 2}, {"step": 3, "loss": 1.0}], "loss")
    np.testing.assert_array_equal(steps, [1, 3])
    np.testing.assert_array_equal(values, [2, 1])
    assert series([], "loss")[0].shape == (0,)


def test_smoothing_is_the_mean_of_the_finite_neighbours():
    values = np.array([1.0, 2.0, np.nan, 6.0, 4.0])
    np.testing.assert_allclose(smooth(values, reach=1), [1.5, 1.5, 4.0, 5.0, 5.0])
    np.testing.assert_array_equal(smooth(np.array([np.nan] * 3), reach=1), [np.nan] * 3)
    np.testing.assert_array_equal(smooth(values, reach=0), values)
