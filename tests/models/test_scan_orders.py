import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from sisma_jax.models.scan_orders import ORDERS, orders_of_layer

sides = st.integers(1, 9)


@pytest.mark.parametrize("order", ORDERS, ids=str)
@hypothesis.given(height=sides, width=sides)
@hypothesis.settings(max_examples=15)
def test_to_grid_inverts_to_sequence(order, height, width):
    x = jnp.arange(2 * height * width * 3.0).reshape(2, height, width, 3)
    np.testing.assert_array_equal(order.to_grid(order.to_sequence(x), height, width), x)


@pytest.mark.parametrize("order", ORDERS, ids=str)
@hypothesis.given(height=sides, width=sides)
@hypothesis.settings(max_examples=15)
def test_sequence_is_the_index_path(order, height, width):
    x = jnp.arange(height * width).reshape(1, height, width, 1).astype(jnp.float32)
    path = np.asarray(order.to_sequence(x))[0, :, 0]
    np.testing.assert_array_equal(path[::-1] if order.reverse else path, order.indices(height, width))


@pytest.mark.parametrize("order", ORDERS, ids=str)
@hypothesis.given(height=sides, width=sides)
@hypothesis.settings(max_examples=15)
def test_a_path_visits_every_token_once_and_only_steps_to_neighbours(order, height, width):
    path = order.indices(height, width)
    assert sorted(path) == list(range(height * width))
    rows, columns = np.divmod(path, width)
    np.testing.assert_array_equal(np.abs(np.diff(rows)) + np.abs(np.diff(columns)), 1)


def test_the_eight_orders_are_different_paths():
    assert len({tuple(order.indices(4, 6)) for order in ORDERS}) == 8


def test_layers_rotate_through_all_orders():
    assert {orders_of_layer(layer, 1)[0] for layer in range(8)} == set(ORDERS)
    assert orders_of_layer(0, 1) == orders_of_layer(8, 1)


@pytest.mark.parametrize("layer", range(8))
def test_several_orders_in_a_layer_read_from_both_ends_and_four_along_both_axes(layer):
    two, four = orders_of_layer(layer, 2), orders_of_layer(layer, 4)
    assert {order.reverse for order in two} == {False, True}
    assert len({order.lines for order in two}) == 1
    assert {(order.lines, order.reverse) for order in four} == {
        (lines, reverse) for lines in ("rows", "columns") for reverse in (False, True)
    }
