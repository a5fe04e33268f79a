import io

import cv2
import numpy as np
import pytest
from PIL import Image

from sisma_jax.data import photos
from sisma_jax.errors import InputError
from tests.data.encoded import jpeg, png, png_that_declares
from tests.data.raw_layout import random_image


def gradient(size: int) -> np.ndarray:
    ramp = np.linspace(0, 255, size)
    return np.stack(np.broadcast_arrays(ramp, ramp[:, None], 128.0), axis=-1).astype(np.uint8)


def test_png_round_trip_keeps_rgb():
    image = random_image(0, 9)
    np.testing.assert_array_equal(photos.decode_image(photos.encode_png(image), "x"), image)


def test_grey_image_becomes_rgb():
    grey = random_image(0, 8)[..., 0]
    assert photos.decode_image(png(Image.fromarray(grey)), "x").shape == (8, 8, 3)


def test_large_jpeg_at_half_size_resizes_to_nearly_the_same():
    data = jpeg(gradient(256), quality=95)
    whole = photos.decode_image(data, "x")
    half = photos.decode_image(data, "x", size_needed=64)
    assert whole.shape == (256, 256, 3)
    assert half.shape == (128, 128, 3)
    difference = photos.resize_image(half, 64).astype(int) - photos.resize_image(whole, 64)
    assert np.abs(difference).max() <= 3  # JPEG's own scaling is an average in the frequency domain.


def test_small_jpeg_is_decoded_whole():
    assert photos.decode_image(jpeg(gradient(256)), "x", size_needed=65).shape == (256, 256, 3)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("keep", [0, 1, 2, 20, 0.5, 0.9, -2])
def test_cut_jpeg_is_refused_by_name(keep, progressive):
    data = jpeg(random_image(0, 64), progressive=progressive)
    keep = int(keep * len(data)) if isinstance(keep, float) else keep
    with pytest.raises(InputError, match=r"face\.jpg"):
        photos.decode_image(data[:keep], "face.jpg")


def test_jpeg_with_zeros_for_a_tail_is_refused():
    data = jpeg(random_image(0, 64))
    half = len(data) // 2
    with pytest.raises(InputError, match=r"face\.jpg is truncated"):
        photos.decode_image(data[:half] + bytes(len(data) - half), "face.jpg")


def test_jpeg_with_a_comment_after_its_end_is_whole():
    data = jpeg(gradient(16))
    np.testing.assert_array_equal(photos.decode_image(data + b"\0comment", "x"), photos.decode_image(data, "x"))


def test_shrinking_averages_and_growing_keeps_a_constant():
    checkers = np.indices((8, 8)).sum(0) % 2 * 200
    image = np.repeat(checkers[..., None], 3, -1).astype(np.uint8)
    np.testing.assert_array_equal(photos.resize_image(image, 4), 100)
    np.testing.assert_array_equal(photos.resize_image(np.full((4, 4, 3), 37, np.uint8), 9), 37)


def test_files_are_read(tmp_path, monkeypatch):
    image = random_image(0, 8)
    (tmp_path / "image.png").write_bytes(photos.encode_png(image))
    np.testing.assert_array_equal(photos.read_image_file(tmp_path / "image.png"), image)
    assert cv2.imread(str(tmp_path / "image.png"))[0, 0].tolist() == image[0, 0, ::-1].tolist()
    monkeypatch.setenv("HOME", str(tmp_path))
    np.testing.assert_array_equal(photos.read_image_file("~/image.png"), image)


def test_missing_file_and_folder_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"absent\.png cannot be read: No such file"):
        photos.read_image_file(tmp_path / "absent.png")
    with pytest.raises(InputError, match=f"{tmp_path} cannot be read: Is a directory"):
        photos.read_image_file(tmp_path)


def test_photograph_of_too_many_pixels_is_refused_by_its_header():
    data = png_that_declares(13_500, 13_500, color_type=2)
    message = r"^huge.png is 13500x13500 pixels, and the limit is 178,956,970 pixels; shrink it\.$"
    for size_needed in (None, 64):
        with pytest.raises(InputError, match=message):
            photos.decode_image(data, "huge.png", size_needed=size_needed)
    with pytest.raises(InputError, match=r"shrink it, or give data.stored_size"):
        photos.decode_image(data, "huge.png", stored_size=0)
    with pytest.raises(InputError, match=r"is 40000x30000 pixels, and the limit is 1,073,741,824 pixels; shrink it\.$"):
        photos.decode_image(png_that_declares(40_000, 30_000, color_type=2), "huge.png", stored_size=256)


def test_the_limit_is_one_of_pixels_in_every_format(monkeypatch):
    image = gradient(16)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "BMP")
    for data in (jpeg(image), png(Image.fromarray(image)), buffer.getvalue()):
        monkeypatch.setattr(photos, "MAX_PIXELS", 16 * 16)
        assert photos.decode_image(data, "x", size_needed=4).shape[:2] in ((16, 16), (8, 8))
        monkeypatch.setattr(photos, "MAX_PIXELS", 16 * 16 - 1)
        with pytest.raises(InputError, match="x is 16x16 pixels, and the limit is 255 pixels"):
            photos.decode_image(data, "x", size_needed=4)
        assert photos.decode_image(data, "x", stored_size=8).shape == (16, 16, 3)


def test_a_bomb_in_another_format_than_jpeg_and_png_is_refused():
    header = b"P6 14000 14000 255\n"
    with pytest.raises(InputError, match=r"huge\.ppm has more than 178,956,970 pixels"):
        photos.decode_image(header + bytes(100), "huge.ppm")


@pytest.mark.parametrize("name", [b"IDAT", b"IEND"])
def test_a_chunk_that_claims_more_than_the_file_has_is_refused_at_once(name):
    data = bytearray(photos.encode_png(np.zeros((4, 4), np.uint8)))
    at = data.find(name) - 4
    data[at : at + 4] = b"\xd0\0\0\0"  # 3.5 GB, which OpenCV would allocate
    with pytest.raises(InputError, match=r"a\.png cannot be decoded \(a chunk exceeds the file\)"):
        photos.decode_image(bytes(data), "a.png")
