import numpy as np
import pytest

from sisma_jax.data import labels
from sisma_jax.errors import InputError
from tests.data.raw_layout import random_mask


def test_there_are_19_classes_with_a_colour_each():
    assert labels.NUM_CLASSES == len(set(labels.NAMES)) == 19
    assert len(np.unique(labels.COLORS, axis=0)) == 19


def test_flip_mirrors_and_exchanges_left_and_right():
    names = ["l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "nose", "ear_r"]
    mirrored = ["ear_r", "nose", "l_ear", "r_ear", "l_brow", "r_brow", "l_eye", "r_eye"]
    mask = np.array([[labels.INDEX[name] for name in names]], np.uint8)
    assert [labels.NAMES[index] for index in labels.flip_mask(mask)[0]] == mirrored


def test_flip_is_an_involution():
    mask = random_mask(0, 33)
    flipped = labels.flip_mask(mask)
    assert flipped.dtype == np.uint8
    assert (flipped != mask).any()
    np.testing.assert_array_equal(labels.flip_mask(flipped), mask)


def test_flip_takes_a_batch():
    masks = np.stack([random_mask(0, 8), random_mask(1, 8)])
    np.testing.assert_array_equal(labels.flip_mask(masks)[1], labels.flip_mask(masks[1]))


def test_colorize_paints_each_class_in_its_colour():
    mask = np.arange(labels.NUM_CLASSES).reshape(1, -1)
    np.testing.assert_array_equal(labels.colorize(mask)[0], labels.COLORS)


def test_check_mask_returns_uint8_and_keeps_values():
    mask = np.arange(labels.NUM_CLASSES, dtype=np.int64)[None]
    checked = labels.check_mask(mask, "m.png")
    assert checked.dtype == np.uint8
    np.testing.assert_array_equal(checked, mask)


@pytest.mark.parametrize("bad", [19, 255, -1])
def test_check_mask_names_the_file_and_the_label(bad):
    with pytest.raises(InputError, match=f"m.png: label {bad} is outside 0..18"):
        labels.check_mask(np.array([[0, bad]]), "m.png")


def test_check_mask_refuses_floats():
    with pytest.raises(InputError, match=r"m.png: .*float32"):
        labels.check_mask(np.zeros((2, 2), np.float32), "m.png")
