import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from sisma_jax.models.scan_orders import ORDERS, orders_of_layer, paths_of_layers
from tests.kernels.transforms import AUTO, CHECKS, ON_MESHES, Subject, check, first_derivatives

sides = st.integers(1, 9)


@pytest.mark.parametrize("order", ORDERS["interleaved"], ids=str)
@hypothesis.given(height=sides, width=sides)
@hypothesis.settings(max_examples=15)
def test_to_grid_inverts_to_sequence(order, height, width):
    x = jnp.arange(2 * height * width * 3.0).reshape(2, height, width, 3)
    path = order.path(height, width)
    np.testing.assert_array_equal(path.to_grid(path.to_sequence(x), height, width), x)


@pytest.mark.parametrize("order", ORDERS["interleaved"], ids=str)
@hypothesis.given(height=sides, width=sides)
@hypothesis.settings(max_examples=15)
def test_the_sequence_runs_along_the_path_and_its_gradient_back(order, height, width):
    x = jnp.arange(height * width).reshape(1, height, width, 1).astype(jnp.float32)
    path = order.path(height, width)
    sequence, vjp = jax.vjp(path.to_sequence, x)
    np.testing.assert_array_equal(sequence[0, :, 0], path.tokens)
    np.testing.assert_array_equal(vjp(sequence)[0], x)


@pytest.mark.parametrize("order", ORDERS["interleaved"], ids=str)
@hypothesis.given(height=sides, width=sides)
@hypothesis.settings(max_examples=15)
def test_a_path_visits_every_token_once_and_only_steps_to_neighbours(order, height, width):
    path = order.path(height, width).tokens
    assert sorted(path) == list(range(height * width))
    rows, columns = np.divmod(path, width)
    np.testing.assert_array_equal(np.abs(np.diff(rows)) + np.abs(np.diff(columns)), 1)


def test_the_eight_orders_are_different_paths():
    assert len({tuple(order.path(4, 6).tokens) for order in ORDERS["interleaved"]}) == 8


@pytest.mark.parametrize("rotation", ORDERS)
def test_layers_rotate_through_all_orders(rotation):
    assert {orders_of_layer(layer, 1, rotation)[0] for layer in range(8)} == set(ORDERS["interleaved"])
    assert orders_of_layer(0, 1, rotation) == orders_of_layer(8, 1, rotation)


def test_neighbouring_layers_read_along_the_other_axis_or_are_grouped_by_it():
    lines = {name: [order.lines for order in orders] for name, orders in ORDERS.items()}
    assert lines == {"interleaved": ["rows", "columns"] * 4, "grouped": ["rows"] * 4 + ["columns"] * 4}


@pytest.mark.parametrize("layer", range(0, 8, 2))
def test_two_grouped_orders_read_from_both_ends_of_an_axis(layer):
    two, four = orders_of_layer(layer, 2, "grouped"), orders_of_layer(layer, 4, "grouped")
    assert {(order.lines, order.reverse) for order in two} == {(two[0].lines, False), (two[0].lines, True)}
    assert len({(order.lines, order.reverse) for order in four}) == 4


@pytest.mark.parametrize("layer", range(8))
def test_several_orders_in_a_layer_read_from_both_ends_and_four_along_both_axes(layer):
    two, four = orders_of_layer(layer, 2), orders_of_layer(layer, 4)
    assert {order.reverse for order in two} == {False, True}
    assert len({order.lines for order in two}) == 1
    assert {(order.lines, order.reverse) for order in four} == {
        (lines, reverse) for lines in ("rows", "columns") for reverse in (False, True)
    }


def test_layers_have_the_paths_of_their_orders():
    paths = paths_of_layers(range(3, 13), 2, 4, 6)
    for place, layer in enumerate(range(3, 13)):
        for stacked, order in zip(paths, orders_of_layer(layer, 2), strict=True):
            np.testing.assert_array_equal(stacked.tokens[place], order.path(4, 6).tokens)
            np.testing.assert_array_equal(stacked.places[place], order.path(4, 6).places)


def grid_to_sequence_and_back():
    path = ORDERS["interleaved"][3].path(3, 4)
    inputs = {"x": np.random.default_rng(0).normal(size=(2, 3, 4, 2))}

    def function(inputs):
        sequence = path.to_sequence(inputs["x"])
        return sequence, path.to_grid(sequence**2, 3, 4)

    def plain(inputs):
        return inputs["x"].reshape(2, 12, 2)[:, path.tokens], inputs["x"] ** 2

    return Subject("scan order", function, plain, inputs)


@pytest.mark.parametrize("transform", CHECKS | ON_MESHES)
def test_every_transformation_of_an_order(transform):
    (CHECKS | ON_MESHES)[transform](grid_to_sequence_and_back())


@pytest.mark.parametrize("order", ORDERS["interleaved"][:4], ids=str)
def test_derivatives_of_an_order_whose_rows_are_sharded(order):
    """In forward and reverse mode, through the exchange of tokens between the devices."""
    subject = grid_to_sequence_and_back()
    path = order.split_path(4, 4, 2)
    subject = dataclasses.replace(
        subject,
        formula=str(order),
        plain=lambda inputs: inputs["x"] ** 2,
        inputs={"x": np.random.default_rng(0).normal(size=(2, 4, 4, 2))},
    )
    mesh = jax.make_mesh((2,), ("seq",), (AUTO,), devices=jax.devices()[:2])
    rows = jax.P(None, "seq")
    mapped = jax.shard_map(
        lambda x, path: path.to_rows(path.to_sequence(x) ** 2, 4),
        mesh=mesh,
        in_specs=(rows, path.specs()),
        out_specs=rows,
    )
    check(subject, first_derivatives, function=lambda inputs: mapped(inputs["x"], path))
