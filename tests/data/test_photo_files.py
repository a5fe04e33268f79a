"""A photograph comes back from its file with every bit, its opacity and its colour profile."""

import io
import struct

import cv2
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from sisma_jax.data.photo_files import Photo, encode_photo, read_photo, save_photo, to_8_bits
from sisma_jax.errors import InputError
from tests.data.encoded import exif, jpeg, raw_png

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
DEEP = np.random.default_rng(1).integers(0, 65536, (6, 9, 3), np.uint16)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def read(tmp_path, data: bytes, name: str = "photo.png") -> Photo:
    (tmp_path / name).write_bytes(data)
    return read_photo(tmp_path / name)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def assert_same(one: Photo, other: Photo) -> None:
    np.testing.assert_array_equal(one.pixels, other.pixels)
    assert one.pixels.dtype == other.pixels.dtype
    assert (one.alpha is None) == (other.alpha is None)
    if one.alpha is not None:
        np.testing.assert_array_equal(one.alpha, other.alpha)
        assert one.alpha.dtype == other.alpha.dtype
    assert one.icc_profile == other.icc_profile


@pytest.mark.parametrize("pixels", [PIXELS, DEEP], ids=["8 bits", "16 bits"])
@pytest.mark.parametrize("has_alpha", [False, True])
@pytest.mark.parametrize("profile", [None, PROFILE])
def test_a_photograph_comes_back_from_its_file(tmp_path, pixels, has_alpha, profile):
    photo = Photo(pixels, pixels[..., 1] if has_alpha else None, profile)
    save_photo(tmp_path / "photo.png", photo)
    assert_same(read_photo(tmp_path / "photo.png"), photo)
    with Image.open(tmp_path / "photo.png") as image:  # another program reads it, too
        image.load()
        assert image.size == (9, 6)
        assert image.info.get("icc_profile") == profile


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize(("color_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_every_mode_of_png_is_read_at_its_depth(tmp_path, depth, color_type, channels):
    samples = np.random.default_rng(2).integers(0, 2**depth, (6, 9, channels))
    photo = read(tmp_path, raw_png(samples, depth, color_type))
    expected = samples[..., :3] if channels > 2 else samples[..., [0, 0, 0]]
    np.testing.assert_array_equal(photo.pixels, expected)
    assert photo.pixels.dtype == {8: np.uint8, 16: np.uint16}[depth]
    if channels % 2:
        assert photo.alpha is None
    else:
        np.testing.assert_array_equal(photo.alpha, samples[..., -1])


def test_a_palette_is_read_by_its_colours(tmp_path):
    image = Image.fromarray(PIXELS).quantize(4)
    np.testing.assert_array_equal(read(tmp_path, encode(image, "PNG")).pixels, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PNG"])
def test_lossless_formats_are_read(tmp_path, kind):
    assert_same(read(tmp_path, encode(Image.fromarray(PIXELS), kind), f"photo.{kind.lower()}"), Photo(PIXELS))


def test_lossless_webp_is_read_with_alpha(tmp_path):
    rgba = np.concatenate([PIXELS, PIXELS[..., :1] // 2 + 1], axis=-1)
    photo = read(tmp_path, encode(Image.fromarray(rgba), "WEBP", lossless=True), "photo.webp")
    assert_same(photo, Photo(PIXELS, rgba[..., 3]))


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """What Pillow makes of 8-bit pixels with this orientation."""
    image = Image.open(io.BytesIO(raw_png(pixels, 8, 2, eXIf=exif(orientation))))
    return np.asarray(ImageOps.exif_transpose(image))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_upright(tmp_path, orientation):
    expected = turned(PIXELS, orientation)
    for name, data in {
        "photo.png": raw_png(PIXELS, 8, 2, eXIf=exif(orientation)),
        "deep.png": raw_png(PIXELS.astype(np.uint16) * 257, 16, 2, eXIf=exif(orientation)),
        "photo.tif": encode(Image.fromarray(PIXELS), "TIFF", tiffinfo={274: orientation}),
        "deep.tif": deep_tiff(PIXELS.astype(np.uint16) * 257, orientation),
    }.items():
        photo = read(tmp_path, data, name)
        np.testing.assert_array_equal(to_8_bits(photo.pixels), expected, err_msg=name)
        assert (photo.pixels.dtype == np.uint16) == name.startswith("deep")
    smooth = np.kron(PIXELS, np.ones((8, 8, 1), np.uint8))
    lying = read(
        tmp_path, jpeg(smooth, quality=100, subsampling=0, exif=b"Exif\0\0" + exif(orientation)), "photo.jpg"
    ).pixels
    assert np.abs(lying.astype(int) - turned(smooth, orientation)).max() <= 3  # JPEG


def deep_tiff(pixels: np.ndarray, orientation: int) -> bytes:
    """A TIFF file of 16 bits per sample, which OpenCV writes, with an orientation in place of its resolution unit."""
    _, encoded = cv2.imencode(".tif", pixels[..., ::-1], [cv2.IMWRITE_TIFF_COMPRESSION, 1])
    data = bytearray(encoded.tobytes())
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    entries = [bytes(data[start + 2 + 12 * i : start + 14 + 12 * i]) for i in range(count)]
    kept = [entry for entry in entries if struct.unpack_from("<H", entry)[0] != 274]
    kept = sorted([*kept[: count - 1], struct.pack("<HHIHH", 274, 3, 1, orientation, 0)])
    kept.sort(key=lambda entry: struct.unpack_from("<H", entry)[0])
    struct.pack_into("<H", data, start, len(kept))
    data[start + 2 : start + 2 + 12 * len(kept)] = b"".join(kept)
    end = start + 2 + 12 * len(kept)
    data[end : end + 4] = bytes(4)
    return bytes(data)


def test_transparency_of_every_kind_is_kept(tmp_path):
    grey = PIXELS[..., 0]
    marked = read(tmp_path, raw_png(grey, 8, 0, tRNS=struct.pack(">H", int(grey[0, 0]))))
    np.testing.assert_array_equal(marked.alpha, np.where(grey == grey[0, 0], 0, 255))
    la = np.stack([grey, PIXELS[..., 1]], axis=-1)
    for kind in ("PNG", "TIFF"):
        photo = read(tmp_path, encode(Image.fromarray(la, "LA"), kind), f"photo.{kind.lower()}")
        np.testing.assert_array_equal(photo.alpha, PIXELS[..., 1])
        np.testing.assert_array_equal(photo.pixels, grey[..., None].repeat(3, -1))
    with pytest.raises(InputError, match="marks one colour of 16 bits as transparent; save it with an alpha channel"):
        read(tmp_path, raw_png(DEEP[..., 0], 16, 0, tRNS=struct.pack(">H", 7)))


def test_a_profile_of_grey_is_not_written_into_rgb(tmp_path, caplog):
    grey = bytearray(PROFILE)
    grey[16:20] = b"GRAY"
    image = Image.fromarray(PIXELS[..., 0])
    assert read(tmp_path, encode(image, "PNG", icc_profile=bytes(grey))).icc_profile is None
    assert "photo.png: its colour profile is not one of RGB colours, and is left out" in caplog.text


def test_the_profile_of_a_jpeg_is_kept(tmp_path):
    assert read(tmp_path, jpeg(PIXELS, icc_profile=PROFILE), "photo.jpg").icc_profile == PROFILE


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encode(Image.fromarray(PIXELS).convert("CMYK"), "TIFF"), "has the colour mode CMYK; convert it to RGB"),
        (encode(Image.fromarray(PIXELS).convert("CMYK"), "JPEG"), "has the colour mode CMYK; convert it to RGB"),
        (encode(Image.fromarray(PIXELS[..., 0].astype(np.float32)), "TIFF"), "has the colour mode F"),
        (
            encode(Image.fromarray(PIXELS), "TIFF", save_all=True, append_images=[Image.fromarray(PIXELS[::-1])]),
            "has 2 pages or frames; save the one that you mean",
        ),
        (encode(Image.fromarray(PIXELS), "GIF"), "is a file of the format GIF; save the photograph as PNG or JPEG"),
        (b"", "is empty"),
        (b"text", "cannot be decoded"),
        (encode_photo(Photo(DEEP))[:80], "is truncated after 80 bytes"),
    ],
    ids=["cmyk tiff", "cmyk jpeg", "float", "pages", "gif", "empty", "text", "truncated"],
)
def test_other_files_are_refused_by_name(tmp_path, data, message):
    with pytest.raises(InputError, match=rf"photo\.bin {message}"):
        read(tmp_path, data, "photo.bin")


@hypothesis.given(st.integers(0, 255))
def test_16_bits_are_rounded_to_8(value):
    pixels = np.full((1, 1, 3), value * 257, np.uint16)
    assert (to_8_bits(pixels) == value).all()
    assert to_8_bits(PIXELS) is PIXELS
