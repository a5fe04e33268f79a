import numpy as np
import pytest

from sisma_jax import segmentation
from sisma_jax.data.classes import CELEBAMASK_HQ
from sisma_jax.data.faces import Square
from sisma_jax.models.face_parser import FaceParser, make_graph
from sisma_jax.segmentation import FaceMask, paint, segment


class RedIsTheClass(FaceParser):
    def predict(self, images, *, size=None, batch_size=32):
        return images[..., 0]


PARSER = RedIsTheClass(make_graph(8, 19), {}, CELEBAMASK_HQ, 16)


def test_each_face_has_the_mask_of_its_square(monkeypatch):
    photo = np.random.default_rng(0).integers(0, 19, (20, 30, 3)).astype(np.uint8)
    squares = [Square(2, 3, 10), Square(0, 20, 5)]
    monkeypatch.setattr(segmentation, "find_faces", lambda _: squares)
    faces = segment(photo, PARSER, "photo")
    assert [face.square for face in faces] == squares
    for face in faces:
        np.testing.assert_array_equal(face.mask, face.square.crop(photo[..., 0]))


def test_without_a_face_the_square_is_the_central_one_and_a_line_says_so(caplog):
    photo = np.full((20, 30, 3), 7, np.uint8)
    (face,) = segment(photo, PARSER, "a.png")
    assert face.square == Square(0, 5, 20)
    assert face.mask.shape == (20, 20)
    assert "a.png: no face is found; the mask is that of the central square" in caplog.text


def test_a_whole_mask_has_every_face_and_larger_ones_on_top():
    large = FaceMask(Square(0, 0, 4), np.pad(np.full((2, 2), 1, np.uint8), 1))
    small = FaceMask(Square(2, 2, 3), np.full((3, 3), 2, np.uint8))
    whole = paint([large, small], 6, 7)
    expected = np.zeros((6, 7), np.uint8)
    expected[2:5, 2:5] = 2
    expected[1:3, 1:3] = 1
    np.testing.assert_array_equal(whole, expected)


@pytest.mark.parametrize("side", [1, 5])
def test_a_square_photo_is_its_own_mask(side):
    mask = np.full((side, side), 3, np.uint8)
    np.testing.assert_array_equal(paint([FaceMask(Square(0, 0, side), mask)], side, side), mask)
