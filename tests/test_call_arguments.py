"""Arguments of calls: what is meant is taken, anything else is refused by name."""

import jax
import numpy as np
import pytest

from sisma_jax.call_arguments import finite_number, random_keys, whole_number
from sisma_jax.errors import InputError


@pytest.mark.parametrize("value", [2, np.int64(2), 2.0, np.float32(2)])
def test_whole_numbers_of_any_type_are_taken(value):
    result = whole_number(value, "num_samples", least=1)
    assert (type(result), result) == (int, 2)


@pytest.mark.parametrize("value", [0, -1, 1.5, float("nan"), float("inf"), "2", None, [2], np.array([2, 3])])
def test_other_counts_are_refused_by_name(value):
    with pytest.raises(InputError, match="num_samples must be a whole number of at least 1, got"):
        whole_number(value, "num_samples", least=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, "1", None])
def test_numbers_that_are_not_finite_are_refused_by_name(value):
    with pytest.raises(InputError, match="margin must be a non-negative number, got"):
        finite_number(value, "margin")


def test_one_key_is_folded_for_each_face():
    keys = random_keys(jax.random.key(3), 3)
    assert keys.shape == (3,)
    assert (keys[2] == jax.random.fold_in(jax.random.key(3), 2)).all()


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
def test_legacy_keys_are_the_keys_that_they_stand_for(implementation):
    key = jax.random.key(3, impl=implementation)
    data = jax.random.key_data(key)
    for legacy in (data, np.asarray(data)):
        assert (random_keys(legacy, 2) == random_keys(key, 2)).all()
    batch = jax.random.split(key, 2)
    assert (random_keys(jax.random.key_data(batch), 2) == batch).all()


@pytest.mark.parametrize("value", [0, None, "key", np.zeros(2, np.int32), np.zeros((2, 2, 2), np.uint32)])
def test_what_is_no_key_is_refused_with_how_to_make_one(value):
    with pytest.raises(InputError, match=r"key must be a key such as jax\.random\.key\(0\), got"):
        random_keys(value, 2)


def test_a_wrong_number_of_keys_is_refused():
    with pytest.raises(InputError, match=r"key has shape \(3,\); give one key, or 2 keys, one for each face"):
        random_keys(jax.random.split(jax.random.key(0), 3), 2)
