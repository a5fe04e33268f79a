import numpy as np
import pytest
from PIL import Image

from sisma_jax.data import masks, photos
from sisma_jax.data.classes import CELEBAMASK_HQ, ClassSet
from sisma_jax.errors import InputError
from tests.data.encoded import png, png_that_declares
from tests.data.raw_layout import random_image, random_mask


def decode(data: bytes, source: str) -> np.ndarray:
    return masks.decode_mask(data, source, CELEBAMASK_HQ)


def test_png_round_trip_keeps_masks():
    mask = random_mask(0, 9)
    np.testing.assert_array_equal(decode(photos.encode_png(mask), "x"), mask)


@pytest.mark.parametrize("keep", [0, 4, 30, 0.5, -6])
def test_cut_png_is_refused_by_name(keep):
    data = photos.encode_png(random_mask(0, 64))
    keep = int(keep * len(data)) if isinstance(keep, float) else keep
    for read in (photos.decode_image, decode, masks.decode_part):
        with pytest.raises(InputError, match=r"face\.png"):
            read(data[:keep], "face.png")


def test_bytes_that_are_no_image_are_refused_by_name():
    for read in (photos.decode_image, decode, masks.decode_part):
        with pytest.raises(InputError, match=r"notes\.png cannot be decoded"):
            read(b"shopping list", "notes.png")


def test_grey_mask_that_an_optimiser_made_a_palette_gives_its_greys():
    mask = np.array([[18, 0], [4, 18]], np.uint8)
    picture = Image.fromarray(np.array([[0, 1], [2, 0]], np.uint8), "P")
    picture.putpalette(bytes([18] * 3 + [0] * 3 + [4] * 3))
    np.testing.assert_array_equal(decode(png(picture), "x"), mask)


def test_mask_with_a_label_out_of_range_is_refused():
    with pytest.raises(InputError, match=r"mask\.png: label 200 is outside"):
        decode(photos.encode_png(np.full((4, 4), 200, np.uint8)), "mask.png")


def test_part_is_any_colour_but_black():
    part = np.zeros((4, 4, 3), np.uint8)
    part[1, 2] = (0, 0, 1)
    part[3, 3] = 255
    expected = part.any(-1)
    np.testing.assert_array_equal(masks.decode_part(photos.encode_png(part), "x"), expected)
    np.testing.assert_array_equal(masks.decode_part(photos.encode_png(part.max(-1)), "x"), expected)


@pytest.mark.parametrize("size", [5, 8, 16, 23, 40])
def test_resized_mask_has_only_labels_of_the_original(size):
    mask = np.where(random_mask(0, 16) > 9, 18, 3).astype(np.uint8)
    resized = masks.resize_mask(mask, size)
    assert resized.shape == (size, size)
    assert set(np.unique(resized)) <= {3, 18}


def test_resized_mask_takes_the_pixel_at_the_centre_of_each_cell():
    mask = np.broadcast_to(np.arange(9, dtype=np.uint8), (9, 9))
    assert masks.resize_mask(mask, 3)[0].tolist() == [1, 4, 7]
    np.testing.assert_array_equal(masks.resize_mask(mask, 27), mask.repeat(3, 0).repeat(3, 1))


def test_an_oblong_image_and_its_mask_keep_the_same_square():
    mask = np.zeros((20, 40), np.uint8)
    mask[5:15, 15:25] = 18
    image = np.repeat(mask[..., None], 3, -1)
    resized = masks.resize_mask(mask, 10)
    np.testing.assert_array_equal(photos.resize_image(image.repeat(2, 0).repeat(2, 1), 20)[..., 0], mask[:, 10:30])
    assert (resized == 18).sum() == 25


def test_the_classes_decide_which_labels_there_are():
    three = ClassSet("Three", ("a", "b", "c"), ((0, 0, 0), (1, 1, 1), (2, 2, 2)), ignored=255)
    mask = np.array([[0, 2], [255, 1]], np.uint8)
    np.testing.assert_array_equal(masks.decode_mask(photos.encode_png(mask), "x", three), mask)
    picture = Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8), "P")
    picture.putpalette(bytes([0] * 3 + [2] * 3 + [255] * 3 + [1] * 3))
    np.testing.assert_array_equal(masks.decode_mask(png(picture), "x", three), mask)
    with pytest.raises(InputError, match=r"mask\.png: label 3 is outside 0\.\.2 and not the ignored label 255"):
        masks.decode_mask(photos.encode_png(mask + 1), "mask.png", three)
    with pytest.raises(InputError, match=r"mask\.png: the colour .* names no class .* class indices 0\.\.2"):
        masks.decode_mask(png(Image.fromarray(random_image(0, 4))), "mask.png", three)


def test_mask_files_are_read(tmp_path):
    mask = random_mask(0, 8)
    (tmp_path / "mask.png").write_bytes(photos.encode_png(mask))
    np.testing.assert_array_equal(masks.read_mask_file(str(tmp_path / "mask.png"), CELEBAMASK_HQ), mask)


def test_missing_file_and_folder_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"absent\.png cannot be read: No such file"):
        masks.read_mask_file(tmp_path / "absent.png", CELEBAMASK_HQ)
    with pytest.raises(InputError, match=f"{tmp_path} cannot be read: Is a directory"):
        masks.read_mask_file(tmp_path, CELEBAMASK_HQ)


@pytest.mark.parametrize("color_type", [0, 2, 3])
def test_a_mask_of_too_many_pixels_is_refused_by_its_header(color_type):
    data = png_that_declares(13_500, 13_500, color_type)
    with pytest.raises(
        InputError, match=r"^huge.png is 13500x13500 pixels, and the limit is 178,956,970 pixels; shrink"
    ):
        masks.decode_mask(data, "huge.png", CELEBAMASK_HQ)
    with pytest.raises(InputError, match=r"huge.png is 13500x13500 pixels"):
        masks.decode_part(data, "huge.png")
