"""The region of an edit, the square in which it is generated, and what is left as it was."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest

from sisma_jax.data import regions
from sisma_jax.data.faces import Square
from sisma_jax.errors import InputError


@hypothesis.given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_no_part_of_a_region_is_lost_when_it_is_resized(size, new_size, data):
    region = np.zeros((size, size), bool)
    row, column = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, size - 1))
    region[row, column] = True
    resized = regions.resize_region(region, new_size)
    assert resized.shape == (new_size, new_size)
    assert resized.any()
    inside = np.argwhere(resized).mean(0) / new_size
    assert np.abs(inside - (np.array([row, column]) + 0.5) / size).max() <= 1 / size + 1 / new_size


@hypothesis.given(hnp.arrays(bool, (9, 11)).filter(np.any), st.floats(0, 5))
def test_weights_fall_from_the_region_to_the_margin(region, margin):
    weight = regions.feather(region, margin)
    points = np.argwhere(region)
    distance = np.array([[np.hypot(*(points - [i, j]).T).min() for j in range(11)] for i in range(9)])
    np.testing.assert_allclose(weight, np.clip(1 - distance / (margin + 1), 0, 1), atol=1e-4)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("size", [4, 8, 12, 20])
def test_the_composite_keeps_every_bit_where_nothing_is_painted(size, dtype):
    rng = np.random.default_rng(0)
    most = np.iinfo(dtype).max
    photo = rng.integers(0, most, (14, 18, 3), dtype, endpoint=True)
    before = photo.copy()
    painted = rng.integers(0, 256, (size, size, 3), np.uint8)
    weight = np.zeros((12, 12), np.float32)
    weight[4:7, 2:9], weight[8, 3] = 1.0, 0.5
    result = regions.composite(photo, painted, weight, Square(1, 5, 12))
    np.testing.assert_array_equal(photo, before)
    assert result.dtype == dtype
    touched = np.zeros((14, 18), bool)
    touched[1:13, 5:17] = weight > 0
    np.testing.assert_array_equal(result[~touched], photo[~touched])
    if size == 12:
        factor = most // 255
        np.testing.assert_array_equal(result[5:8, 7:14], painted[4:7, 2:9].astype(dtype) * dtype(factor))
        middle = (painted[8, 3] * float(factor) + photo[9, 8].astype(float)) / 2
        np.testing.assert_allclose(result[9, 8], middle, atol=0.5)


def test_a_region_is_where_an_array_is_not_zero():
    expected = np.eye(3, dtype=bool)
    for value in (expected, np.eye(3), (200 * np.eye(3)).astype(np.uint16), np.eye(3).tolist()):
        np.testing.assert_array_equal(regions.as_region(value), expected)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((0, 4)), r"region must be an array \(H, W\), got float64 \(0, 4\)"),
        (np.zeros((4, 4, 3)), r"region must be an array \(H, W\), got float64 \(4, 4, 3\)"),
        (None, r"region must be an array \(H, W\), got object"),
        (np.full((4, 4), np.nan), "region has values that are not finite"),
    ],
)
def test_other_regions_are_refused_by_name(value, message):
    with pytest.raises(InputError, match=message):
        regions.as_region(value)


HEIGHT, WIDTH = 40, 80
CENTRAL = Square(0, 20, 40)


def box(top, left, bottom, right, shape=(HEIGHT, WIDTH)):
    region = np.zeros(shape, bool)
    region[top:bottom, left:right] = True
    return region


@pytest.mark.parametrize(
    ("region", "faces", "expected"),
    [
        (box(5, 30, 10, 50), [], CENTRAL),
        (box(5, 0, 10, 6), [], Square(0, 0, 40)),  # outside of the central square: as near as the photograph allows
        (box(5, 14, 10, 40), [], Square(0, 7, 40)),  # across its border: around the region
        (box(0, 0, 40, 80), [], CENTRAL),
        (box(5, 30, 10, 40), [Square(2, 28, 20)], Square(2, 28, 20)),
        (box(5, 30, 10, 50), [Square(2, 28, 20), Square(2, 32, 20)], Square(2, 28, 20)),  # both hold the most of it
        (box(5, 30, 10, 50), [Square(20, 0, 20), Square(0, 30, 25)], Square(0, 30, 25)),
        (box(5, 30, 10, 50), [Square(20, 0, 20)], CENTRAL),  # another's face
        (box(1, 3, 3, 5, (4, 8)), [], CENTRAL),  # at a lower resolution
        (box(0, 0, 8, 8, (8, 8)), [Square(0, 0, 20)], CENTRAL),  # square: of the central square
    ],
)
def test_the_square_of_an_edit_is_where_the_region_is(region, faces, expected):
    assert regions.choose_square([region], faces, HEIGHT, WIDTH) == expected


def test_one_square_holds_the_regions_of_all_masks():
    both = [box(5, 0, 10, 4), box(20, 20, 30, 30)]
    assert regions.choose_square(both, [], HEIGHT, WIDTH) == Square(0, 0, 40)


def test_a_mask_is_sampled_in_the_square(caplog):
    mask = np.arange(4 * 8).reshape(4, 8).astype(np.uint8)
    for size in (4, 8):
        repeated = mask[:, 2:6].repeat(size // 4, axis=0).repeat(size // 4, axis=1)
        np.testing.assert_array_equal(regions.sample_mask(mask, CENTRAL, HEIGHT, WIDTH, size), repeated)
        np.testing.assert_array_equal(regions.sample_mask(mask[:, 2:6], CENTRAL, HEIGHT, WIDTH, size), repeated)
    np.testing.assert_array_equal(regions.sample_mask(mask, Square(10, 50, 20), HEIGHT, WIDTH, 2), mask[1:3, 5:7])


@hypothesis.given(
    st.integers(0, 30), st.integers(0, 70), st.integers(1, 10), st.sampled_from([(40, 80), (10, 20), (80, 160)])
)
def test_what_is_cut_of_a_region_lies_where_it_lies_in_the_photograph(top, left, side, shape):
    region = np.random.default_rng(top).random(shape) < 0.5
    region[:] |= ~region.any()
    square = Square(top, left, side)
    factor = shape[0] / HEIGHT
    wanted = np.zeros((side, side), bool)  # any pixel of the region that the photograph's pixel overlaps
    for i in range(side):
        for j in range(side):
            first, last = (int((top + i) * factor), int((left + j) * factor)), max(1, int(factor))
            wanted[i, j] = region[first[0] : first[0] + last, first[1] : first[1] + last].any()
    if wanted.any():
        np.testing.assert_array_equal(regions.crop_region(region, square, HEIGHT, WIDTH), wanted)


def test_what_lies_outside_of_the_square_is_said(caplog):
    region = box(0, 3, 4, 5, (4, 8))
    np.testing.assert_array_equal(
        regions.crop_region(region, CENTRAL, HEIGHT, WIDTH), region[:, 2:6].repeat(10, axis=0).repeat(10, axis=1)
    )
    square = regions.crop_region(region[:, 2:6], CENTRAL, HEIGHT, WIDTH)
    np.testing.assert_array_equal(square, region[:, 2:6].repeat(10, axis=0).repeat(10, axis=1))
    assert not caplog.text
    region[:, :2] = True
    regions.crop_region(region, CENTRAL, HEIGHT, WIDTH)
    assert "50 % of the region lie outside of the generated square" in caplog.text
    with pytest.raises(InputError, match=r"region lies outside of Square\(top=0, left=20, side=40\)"):
        regions.crop_region(box(0, 0, 4, 2, (4, 8)), CENTRAL, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (np.zeros((4, 8), bool), "there is nothing to generate"),
        (np.ones((8, 4), bool), r"region is 4x8 pixels and the photograph 80x40"),
    ],
)
def test_regions_that_an_edit_cannot_generate_are_refused(region, message):
    with pytest.raises(InputError, match=message):
        regions.require_region(region, HEIGHT, WIDTH)


def test_a_guessed_region_is_where_a_mask_differs_by_more_than_an_outline():
    predicted = np.kron(np.arange(8).reshape(2, 4), np.ones((20, 20))).astype(np.uint8)
    edited = np.roll(predicted, 1, axis=1)  # all outlines are one pixel off
    edited[10:20, 30:50] = 9
    for mask in (edited, edited[:, 20:60]):  # of the whole photograph, and of its central square
        (region,) = regions.guessed_regions([mask], predicted)
        np.testing.assert_array_equal(region, mask == 9)


def test_masks_of_different_sizes_are_not_compared():
    mask = np.zeros((4, 4), np.uint8)
    with pytest.raises(InputError, match=r"mask is \(4, 4\) and image_mask \(5, 4\)"):
        regions.changed_regions([mask], [np.zeros((5, 4), np.uint8)])
    with pytest.raises(InputError, match="image_mask has 2 masks for 3 edited ones"):
        regions.changed_regions([mask] * 3, [mask] * 2)


@pytest.mark.parametrize("square", [Square(-1, 0, 4), Square(0, 0, 0), Square(30, 0, 11), Square(0, 70, 11)])
def test_a_square_outside_of_the_photograph_is_refused(square):
    with pytest.raises(InputError, match="does not lie inside of the photograph, which has 80x40 pixels"):
        regions.require_square(square, HEIGHT, WIDTH)
    regions.require_square(CENTRAL, HEIGHT, WIDTH)
