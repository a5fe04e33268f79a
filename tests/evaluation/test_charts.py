import re
from xml.etree import ElementTree

import numpy as np
import pytest

from sisma_jax.evaluation.charts import Curve, binned, bullet, line_chart

STEPS = np.array([0.0, 1000.0, 2500.0, 4000.0])


def chart(*curves: Curve, **options):
    return ElementTree.fromstring(line_chart(curves, x_label="step", y_label="loss", **options))


def elements(svg, name, *classes):
    return [element for element in svg.iter(name) if set(classes) <= set(element.get("class", "").split())]


def from_ticks(svg, axis):
    """Returns the line from coordinates to values through the labels of an axis' ticks, as a reader finds it."""
    ticks = elements(svg, "text", axis, "tick")
    values = [float(tick.text.replace("−", "-").replace("k", "e3").replace("M", "e6")) for tick in ticks]
    assert len(values) >= 3
    slope, offset = np.polyfit([float(tick.get(axis)) for tick in ticks], values, 1)
    return lambda coordinate: slope * coordinate + offset


def test_points_are_where_the_axes_say():
    values = np.array([0.91, -0.2, 0.33, 0.12])
    svg = chart(Curve("loss", STEPS, values, has_points=True))
    # The labels of the horizontal axis are below the ticks, at the same x; those of the vertical one at the same y.
    to_step, to_value = from_ticks(svg, "x"), from_ticks(svg, "y")
    points = elements(svg, "circle")
    shown = np.array([(to_step(float(p.get("cx"))), to_value(float(p.get("cy")))) for p in points])
    np.testing.assert_allclose(shown[:, 0], STEPS, atol=15)  # coordinates have one decimal
    np.testing.assert_allclose(shown[:, 1], values, atol=0.005)
    assert [p.find("title").text for p in points] == [
        "loss, step 0: 0.91",
        "loss, step 1,000: -0.2",
        "loss, step 2,500: 0.33",
        "loss, step 4,000: 0.12",
    ]
    (line,) = elements(svg, "path", "line")
    assert re.findall(r"[\d.]+ [\d.]+", line.get("d")) == [f"{p.get('cx')} {p.get('cy')}" for p in points]


def test_values_that_are_not_finite_leave_gaps():
    svg = chart(Curve("loss", np.arange(7.0), np.array([1, 2, np.nan, 3, np.inf, 4, 5])))
    assert len(elements(svg, "path", "line")) == 2
    assert len(elements(svg, "circle")) == 1  # one value between two gaps


@pytest.mark.parametrize("values", [[], [np.nan, np.inf]])
def test_a_curve_without_values_gives_no_chart(values):
    values = np.array(values)
    assert line_chart([Curve("loss", np.arange(float(len(values))), values)], x_label="", y_label="") == ""


@pytest.mark.parametrize("value", [0.0, 3.0, -2e-9, 1e12])
def test_one_value_or_equal_ones_have_an_axis(value):
    for count in (1, 3):
        svg = chart(Curve("loss", STEPS[:count], np.full(count, value), has_points=True))
        assert len(elements(svg, "circle")) == count
        assert len({tick.text for tick in elements(svg, "text", "y", "tick")}) >= 3


def test_tick_labels_are_short_and_distinct():
    for last in (7, 420, 40_000, 400_000, 3_000_000):
        svg = chart(Curve("loss", np.array([0.0, last]), np.array([1e-4, 3e-4])))
        for axis in "xy":
            labels = [tick.text for tick in elements(svg, "text", axis, "tick")]
            assert len(set(labels)) == len(labels) >= 3
            assert max(map(len, labels)) <= 7


def test_what_is_above_the_limit_does_not_extend_the_axis():
    svg = chart(Curve("loss", STEPS, np.array([100.0, 0.5, 0.4, 0.3])), y_limit=0.5)
    assert max(float(tick.text) for tick in elements(svg, "text", "y", "tick")) <= 0.6


def test_labels_are_escaped():
    svg = chart(Curve('<b>"&', STEPS, STEPS, has_points=True))
    assert svg.get("aria-label").startswith('<b>"&: 0 at step 0')


def test_a_long_series_becomes_points_with_the_range_of_its_values():
    x = np.arange(1000.0)
    raw = np.where(x == 500, np.nan, np.sin(x))
    steps, values, low, high = binned(x, x / 2, raw)
    assert len(steps) == 200
    np.testing.assert_array_equal(values, steps / 2)
    assert steps[-1] == 999
    np.testing.assert_allclose(low[0], raw[:5].min())
    np.testing.assert_allclose(high[0], raw[:5].max())
    assert np.isfinite(low).all()
    for array in binned(x[:0], x[:0], x[:0]):
        assert array.shape == (0,)


def test_a_bullet_has_the_widths_of_its_values():
    svg = ElementTree.fromstring(bullet(0.523, 0.61, 0.2))
    widths = {rect.get("class"): float(rect.get("width")) for rect in svg.iter("rect")}
    assert widths == {"value": 52.3, "ceiling": 61.0}
    (floor,) = svg.iter("line")
    assert floor.get("x1") == floor.get("x2") == "20.00"
    assert list(ElementTree.fromstring(bullet(None, None, None))) == []
