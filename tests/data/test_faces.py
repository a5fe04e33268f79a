"""Faces are found in larger photographs, and a framed portrait is taken as it is."""

import concurrent.futures

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from sisma_jax.data import photos
from sisma_jax.data.drawing import draw_face
from sisma_jax.data.faces import Square, central_square, find_faces, square_around
from tests.data.test_celebamask_hq import SAMPLE


def scene(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A picture without a face: coarse colours with fine noise."""
    rng = np.random.default_rng(seed)
    coarse = photos.cv2.resize(rng.uniform(40, 200, (5, 7, 3)).astype(np.float32), (width, height))
    return np.clip(coarse + rng.normal(0, 6, coarse.shape), 0, 255).astype(np.uint8)


def paste(picture: np.ndarray, seed: int, square: Square) -> None:
    square.crop(picture)[...] = draw_face((0, seed), square.side)[0]


@pytest.mark.parametrize("seed", range(6))
def test_a_portrait_is_its_own_frame(seed):
    assert find_faces(draw_face((0, seed), 128)[0]) == [Square(0, 0, 128)]


@pytest.mark.parametrize("seed", range(4))
def test_a_face_in_a_larger_photograph_is_framed(seed):
    photo, square = scene(480, 640, seed), Square(60 + 40 * seed, 320 - 80 * seed, 200)
    paste(photo, seed, square)
    (found,) = find_faces(photo)
    assert abs(found.side / 200 - 1) < 0.2
    assert abs(found.top + found.side / 2 - square.top - 100) < 20
    assert abs(found.left + found.side / 2 - square.left - 100) < 20


def test_faces_are_sorted_by_size():
    photo = scene(400, 800)
    paste(photo, 0, Square(20, 30, 160))
    paste(photo, 1, Square(100, 450, 280))
    found = find_faces(photo)
    assert len(found) == 2
    assert found[0].left > 400
    assert found[0].side > found[1].side
    assert find_faces(photo) == found


@pytest.mark.parametrize("shape", [(300, 400), (1, 1), (3, 900), (5000, 20)])
def test_nothing_is_found_where_nothing_is(shape):
    assert find_faces(np.full((*shape, 3), 90, np.uint8)) == []


def test_a_large_photograph_is_searched_at_a_bounded_size():
    photo = scene(300, 400)
    paste(photo, 0, Square(90, 150, 120))
    (found,) = find_faces(photo.repeat(10, axis=0).repeat(10, axis=1))
    assert abs(found.side / 1200 - 1) < 0.2


@hypothesis.given(
    across=st.floats(-50, 150),
    down=st.floats(-50, 150),
    side=st.floats(0, 300),
    height=st.integers(1, 90),
    width=st.integers(1, 90),
)
def test_a_square_lies_inside_of_the_image(across, down, side, height, width):
    square = square_around(across, down, side, height, width)
    assert square.crop(np.zeros((height, width))).shape == (square.side, square.side)
    assert square.side == max(1, min(round(side), height, width))


def test_the_central_square_is_that_of_the_readers():
    for height, width in ((4, 9), (9, 4), (5, 5), (1, 8)):
        array = np.arange(height * width).reshape(height, width)
        np.testing.assert_array_equal(central_square(height, width).crop(array), photos.central_square(array))


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the sample of CelebAMask-HQ is not here")
def test_real_portraits_are_their_own_frames():
    paths = sorted((SAMPLE / "images").glob("*.jpg"))[:60]
    found = [find_faces(photos.read_image_file(path)) for path in paths]
    assert all(one in ([], [Square(0, 0, 128)]) for one in found)
    assert sum(map(bool, found)) >= 54


def test_threads_find_faces_at_the_same_time():
    """Of images of different sizes, with one detector, which raises errors without a lock."""
    rng = np.random.default_rng(0)
    images = [rng.integers(256, size=(size, size, 3), dtype=np.uint8) for size in (60, 400, 128, 300)] * 4
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert list(threads.map(find_faces, images)) == [find_faces(image) for image in images[:4]] * 4
