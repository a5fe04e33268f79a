import io

import cv2
import numpy as np
import pytest
from PIL import Image

from sisma_jax.data import images, labels
from sisma_jax.errors import InputError
from tests.data.raw_layout import random_image, random_mask


def jpeg(image: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def gradient(size: int) -> np.ndarray:
    ramp = np.linspace(0, 255, size)
    return np.stack(np.broadcast_arrays(ramp, ramp[:, None], 128.0), axis=-1).astype(np.uint8)


def test_png_round_trip_keeps_rgb():
    image = random_image(0, 9)
    np.testing.assert_array_equal(images.decode_image(images.encode_png(image), "x"), image)


def test_png_round_trip_keeps_masks():
    mask = random_mask(0, 9)
    np.testing.assert_array_equal(images.decode_mask(images.encode_png(mask), "x"), mask)


def test_grey_image_becomes_rgb():
    grey = random_image(0, 8)[..., 0]
    assert images.decode_image(png(Image.fromarray(grey)), "x").shape == (8, 8, 3)


def test_large_jpeg_at_half_size_resizes_to_nearly_the_same():
    data = jpeg(gradient(256), quality=95)
    whole = images.decode_image(data, "x")
    half = images.decode_image(data, "x", size_needed=64)
    assert whole.shape == (256, 256, 3)
    assert half.shape == (128, 128, 3)
    difference = images.resize_image(half, 64).astype(int) - images.resize_image(whole, 64)
    assert np.abs(difference).max() <= 3  # JPEG's own scaling is an average in the frequency domain.


def test_small_jpeg_is_decoded_whole():
    assert images.decode_image(jpeg(gradient(256)), "x", size_needed=65).shape == (256, 256, 3)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("keep", [0, 1, 2, 20, 0.5, 0.9, -2])
def test_cut_jpeg_is_refused_by_name(keep, progressive):
    data = jpeg(random_image(0, 64), progressive=progressive)
    keep = int(keep * len(data)) if isinstance(keep, float) else keep
    with pytest.raises(InputError, match=r"face\.jpg"):
        images.decode_image(data[:keep], "face.jpg")


def test_jpeg_with_zeros_for_a_tail_is_refused():
    data = jpeg(random_image(0, 64))
    half = len(data) // 2
    with pytest.raises(InputError, match=r"face\.jpg is truncated"):
        images.decode_image(data[:half] + bytes(len(data) - half), "face.jpg")


def test_jpeg_with_a_comment_after_its_end_is_whole():
    data = jpeg(gradient(16))
    np.testing.assert_array_equal(images.decode_image(data + b"\0comment", "x"), images.decode_image(data, "x"))


@pytest.mark.parametrize("keep", [0, 4, 30, 0.5, -6])
def test_cut_png_is_refused_by_name(keep):
    data = images.encode_png(random_mask(0, 64))
    keep = int(keep * len(data)) if isinstance(keep, float) else keep
    for decode in (images.decode_image, images.decode_mask, images.decode_part):
        with pytest.raises(InputError, match=r"face\.png"):
            decode(data[:keep], "face.png")


def test_bytes_that_are_no_image_are_refused_by_name():
    for decode in (images.decode_image, images.decode_mask, images.decode_part):
        with pytest.raises(InputError, match=r"notes\.png cannot be decoded"):
            decode(b"shopping list", "notes.png")


def test_palette_mask_gives_its_indices():
    mask = random_mask(0, 16)
    picture = Image.fromarray(mask, "P")
    picture.putpalette(labels.COLORS.tobytes())
    np.testing.assert_array_equal(images.decode_mask(png(picture), "x"), mask)


def test_grey_mask_that_an_optimiser_made_a_palette_gives_its_greys():
    mask = np.array([[18, 0], [4, 18]], np.uint8)
    picture = Image.fromarray(np.array([[0, 1], [2, 0]], np.uint8), "P")
    picture.putpalette(bytes([18] * 3 + [0] * 3 + [4] * 3))
    np.testing.assert_array_equal(images.decode_mask(png(picture), "x"), mask)


def test_mask_of_three_equal_channels_is_read():
    mask = random_mask(0, 16)
    np.testing.assert_array_equal(images.decode_mask(png(Image.fromarray(np.stack([mask] * 3, -1))), "x"), mask)


def test_mask_with_alpha_is_read():
    mask = random_mask(0, 16)
    opaque = np.full_like(mask, 255)
    for channels in ([mask, opaque], [mask, mask, mask, opaque]):
        np.testing.assert_array_equal(images.decode_mask(png(Image.fromarray(np.stack(channels, -1))), "x"), mask)


def test_16_bit_mask_is_read():
    mask = random_mask(0, 16)
    np.testing.assert_array_equal(images.decode_mask(png(Image.fromarray(mask.astype(np.uint16))), "x"), mask)


def test_mask_in_colours_is_refused():
    colours = labels.colorize(random_mask(0, 16))
    with pytest.raises(InputError, match=r"mask\.png holds colours"):
        images.decode_mask(png(Image.fromarray(colours)), "mask.png")


def test_jpeg_mask_is_refused():
    with pytest.raises(InputError, match=r"mask\.jpg is a JPEG"):
        images.decode_mask(jpeg(random_mask(0, 16)), "mask.jpg")


def test_mask_with_a_label_out_of_range_is_refused():
    with pytest.raises(InputError, match=r"mask\.png: label 200 is outside"):
        images.decode_mask(images.encode_png(np.full((4, 4), 200, np.uint8)), "mask.png")


def test_part_is_any_colour_but_black():
    part = np.zeros((4, 4, 3), np.uint8)
    part[1, 2] = (0, 0, 1)
    part[3, 3] = 255
    expected = part.any(-1)
    np.testing.assert_array_equal(images.decode_part(images.encode_png(part), "x"), expected)
    np.testing.assert_array_equal(images.decode_part(images.encode_png(part.max(-1)), "x"), expected)


@pytest.mark.parametrize("size", [5, 8, 16, 23, 40])
def test_resized_mask_has_only_labels_of_the_original(size):
    mask = np.where(random_mask(0, 16) > 9, 18, 3).astype(np.uint8)
    resized = images.resize_mask(mask, size)
    assert resized.shape == (size, size)
    assert set(np.unique(resized)) <= {3, 18}


def test_resized_mask_takes_the_pixel_at_the_centre_of_each_cell():
    mask = np.broadcast_to(np.arange(9, dtype=np.uint8), (9, 9))
    assert images.resize_mask(mask, 3)[0].tolist() == [1, 4, 7]
    np.testing.assert_array_equal(images.resize_mask(mask, 27), mask.repeat(3, 0).repeat(3, 1))


def test_shrinking_averages_and_growing_keeps_a_constant():
    checkers = np.indices((8, 8)).sum(0) % 2 * 200
    image = np.repeat(checkers[..., None], 3, -1).astype(np.uint8)
    np.testing.assert_array_equal(images.resize_image(image, 4), 100)
    np.testing.assert_array_equal(images.resize_image(np.full((4, 4, 3), 37, np.uint8), 9), 37)


def test_an_oblong_image_and_its_mask_keep_the_same_square():
    mask = np.zeros((20, 40), np.uint8)
    mask[5:15, 15:25] = 18
    image = np.repeat(mask[..., None], 3, -1)
    resized = images.resize_mask(mask, 10)
    np.testing.assert_array_equal(images.resize_image(image.repeat(2, 0).repeat(2, 1), 20)[..., 0], mask[:, 10:30])
    assert (resized == 18).sum() == 25


def test_files_are_read(tmp_path):
    image, mask = random_image(0, 8), random_mask(0, 8)
    (tmp_path / "image.png").write_bytes(images.encode_png(image))
    (tmp_path / "mask.png").write_bytes(images.encode_png(mask))
    np.testing.assert_array_equal(images.read_image_file(tmp_path / "image.png"), image)
    np.testing.assert_array_equal(images.read_mask_file(str(tmp_path / "mask.png")), mask)
    assert cv2.imread(str(tmp_path / "image.png"))[0, 0].tolist() == image[0, 0, ::-1].tolist()


@pytest.mark.parametrize("read", [images.read_image_file, images.read_mask_file])
def test_missing_file_and_folder_are_refused_by_name(read, tmp_path):
    with pytest.raises(InputError, match=r"absent\.png cannot be read: No such file"):
        read(tmp_path / "absent.png")
    with pytest.raises(InputError, match=f"{tmp_path} cannot be read: Is a directory"):
        read(tmp_path)


def test_image_files_lists_a_folder_or_a_file(tmp_path):
    for name in ("b.png", "a.JPG", "notes.txt", ".hidden.png"):
        (tmp_path / name).touch()
    assert [path.name for path in images.image_files(tmp_path)] == ["a.JPG", "b.png"]
    assert images.image_files(tmp_path / "b.png") == [tmp_path / "b.png"]


def test_image_files_refuses_nothing(tmp_path):
    with pytest.raises(InputError, match="holds no image"):
        images.image_files(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        images.image_files(tmp_path / "absent")
