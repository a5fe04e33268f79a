import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from sisma_jax.errors import InputError
from sisma_jax.evaluation import neighbours
from sisma_jax.evaluation.neighbours import DistanceBlocks, nearest_neighbours, square_bounds

# The shapes are few, because each is compiled.
SEEDS = st.integers(0, 2**32 - 1)


def all_distances(queries, references):
    return np.sqrt(((queries[:, np.newaxis] - references[np.newaxis]) ** 2).sum(axis=-1))


def check(queries, references, k):
    distances, indices = nearest_neighbours(queries, references, k)
    expected = all_distances(queries, references)
    np.testing.assert_allclose(distances, np.sort(expected, axis=1)[:, :k], rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(np.take_along_axis(expected, indices, axis=1), distances, rtol=1e-12, atol=1e-300)
    assert all(len(set(row)) == k for row in indices.tolist())


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(neighbours, "_ROWS_PER_BLOCK", 8)
    monkeypatch.setattr(neighbours, "_COLUMNS_PER_BLOCK", 16)
    monkeypatch.setattr(neighbours, "_DIFFERENCES_PER_BLOCK", 100)


@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.usefixtures("small_blocks")
def test_neighbours_equal_those_of_all_distances_over_several_blocks(k):
    generator = np.random.default_rng(0)
    check(generator.normal(size=(19, 5)), generator.normal(size=(40, 5)), k)


@hypothesis.given(SEEDS, st.floats(-1e8, 1e8), st.sampled_from([1e-150, 1e-20, 1.0, 1e20]))
@hypothesis.settings(max_examples=30)
def test_neighbours_are_exact_wherever_the_features_are_and_whatever_their_scale(seed, centre, scale):
    generator = np.random.default_rng(seed)
    check((generator.normal(size=(6, 4)) + centre) * scale, (generator.normal(size=(30, 4)) + centre) * scale, 2)


@hypothesis.given(SEEDS)
@hypothesis.settings(max_examples=30)
def test_neighbours_are_exact_where_float32_does_not_distinguish_them(seed):
    generator = np.random.default_rng(seed)
    # All references are equal up to 1e-9 as seen from the queries, because one is far away.
    references = np.concatenate([1e-9 * generator.normal(size=(29, 4)), np.full((1, 4), 1e3)])
    check(1e-9 * generator.normal(size=(6, 4)), references, 2)


def test_equal_references_are_all_found():
    references = np.repeat(np.arange(3.0), 20)[:, np.newaxis]
    distances, indices = nearest_neighbours(np.array([[0.9]]), references, 25)
    np.testing.assert_allclose(distances[0], [0.1] * 20 + [0.9] * 5, rtol=1e-12)
    assert set(indices[0, :20]) == set(range(20, 40))


def test_a_copy_of_a_reference_is_at_distance_zero():
    references = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32) + 1000
    distances, indices = nearest_neighbours(references[[4, 31]], references, 2)
    np.testing.assert_array_equal(indices[:, 0], [4, 31])
    np.testing.assert_array_equal(distances[:, 0], 0)
    assert np.all(distances[:, 1] > 0)


@hypothesis.given(SEEDS, st.floats(-100, 100))
@hypothesis.settings(max_examples=30)
def test_bounds_contain_the_distances(seed, centre):
    generator = np.random.default_rng(seed)
    rows, columns = generator.normal(centre, 1, (9, 64)), generator.normal(0, 3, (13, 64))
    blocks = DistanceBlocks(rows, columns)
    lower, upper = (np.asarray(x) for x in jax.jit(square_bounds)(*blocks.operands(slice(0, 9), slice(0, 13))))
    squares = blocks.scaled(all_distances(rows, columns) ** 2)
    assert np.all((lower <= squares) & (squares <= upper))
    assert np.all(upper - lower < 1e-4 * 64)  # in units in which no value is greater than 1


def test_bad_input_is_refused():
    features = np.zeros((3, 2))
    with pytest.raises(InputError, match="references has 3 images; 4 neighbours need at least 4"):
        nearest_neighbours(features, features, 4)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        nearest_neighbours(features, features, 0)
    with pytest.raises(ValueError, match="queries has 1 dimensions, references has 2"):
        nearest_neighbours(features[:, :1], features, 1)
