"""Every form of a mask gives the labels that its author drew, or the refusal that names what is wrong."""

import contextlib
import io

import cv2
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image

from sisma_jax.data.classes import CELEBAMASK_HQ, ClassSet
from sisma_jax.data.drawing import draw_face
from sisma_jax.data.masks import decode_mask, decode_part, read_masks
from sisma_jax.errors import InputError
from tests.data.encoded import exif, png, raw_png

FACE = draw_face((0, 3), 64)[1]
COLORS = np.uint8(CELEBAMASK_HQ.colors)
WHITE = 255


def decode(data: bytes, classes: ClassSet = CELEBAMASK_HQ) -> np.ndarray:
    return decode_mask(data, "mask.png", classes)


def encode(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def with_palette(indices: np.ndarray, colors: np.ndarray) -> Image.Image:
    image = Image.fromarray(indices, "P")
    image.putpalette(np.uint8(colors).ravel().tolist())
    return image


def assert_read(data: bytes, expected: np.ndarray = FACE) -> None:
    mask = decode(data)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, expected)


def test_the_face_of_these_tests_has_thin_and_wide_classes():
    assert {"skin", "hair", "l_eye", "r_brow", "u_lip"} <= {CELEBAMASK_HQ.names[label] for label in np.unique(FACE)}


def test_a_part_whose_palette_lacks_a_color_is_refused():
    with pytest.raises(InputError, match=r"part\.png is damaged: it has color 9 of a palette of 4 colors"):
        decode_part(raw_png(np.full((4, 4), 9), 8, 3, PLTE=bytes(12)), "part.png")


# Label maps.


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_grey_sample_is_the_label_at_every_depth(depth):
    mask = FACE % min(2**depth, len(CELEBAMASK_HQ))
    assert_read(raw_png(mask, depth, 0), mask)


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize(("color_type", "channels"), [(2, 3), (4, 1), (6, 3)])
def test_equal_channels_are_the_label(depth, color_type, channels):
    samples = np.repeat(FACE[..., None].astype(np.uint16), channels, -1)
    if color_type >= 4:
        samples = np.concatenate([samples, np.full_like(samples[..., :1], 2**depth - 1)], -1)
    assert_read(raw_png(samples, depth, color_type))


@pytest.mark.parametrize("kind", ["BMP", "GIF", "PPM", "TGA", "TIFF"])
def test_lossless_formats_are_read(kind):
    assert_read(encode(FACE, kind))


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_tiff_is_read_with_every_lossless_compression(compression):
    assert_read(encode(FACE, "TIFF", compression=compression))
    assert_read(encode(FACE.astype(np.uint16), "TIFF", compression=compression))


def test_lossless_webp_is_read():
    assert_read(encode(np.stack([FACE] * 3, -1), "WEBP", lossless=True))


ORIENTED = {  # what is stored, so that the orientation turns it upright
    1: FACE,
    2: FACE[:, ::-1],
    3: FACE[::-1, ::-1],
    4: FACE[::-1],
    5: FACE.T,
    6: np.rot90(FACE),
    7: FACE[::-1, ::-1].T,
    8: np.rot90(FACE, -1),
}


@pytest.mark.parametrize("orientation", ORIENTED)
@pytest.mark.parametrize("form", ["grey", "16 bits", "palette", "RGB"])
def test_every_mode_is_turned_upright(orientation, form):
    stored, chunk = np.ascontiguousarray(ORIENTED[orientation]), {"eXIf": exif(orientation)}
    if form == "palette":
        assert_read(raw_png(stored, 8, 3, PLTE=COLORS.tobytes(), **chunk))
    elif form == "RGB":
        assert_read(raw_png(COLORS[stored], 8, 2, **chunk))
    else:
        assert_read(raw_png(stored, 16 if form == "16 bits" else 8, 0, **chunk))


@pytest.mark.parametrize("depth", [8, 16])
def test_transparent_pixels_are_background(depth):
    """Whatever background is painted with."""
    opaque = 2**depth - 1
    shown = np.where(FACE == 0, np.uint16(opaque), FACE)
    samples = np.stack([shown, np.where(FACE == 0, 0, opaque)], -1)
    assert_read(raw_png(samples, depth, 4))


def test_a_transparent_colour_is_background():
    image = np.where(FACE[..., None] == 0, np.uint8(WHITE), COLORS[FACE])
    alpha = np.uint8(np.where(FACE == 0, 0, WHITE))
    assert_read(png(Image.fromarray(np.concatenate([image, alpha[..., None]], -1))))
    assert_read(raw_png(image, 8, 2, tRNS=b"\0\xff" * 3))
    palette = np.concatenate([[[WHITE] * 3], COLORS[1:]])
    assert_read(raw_png(FACE, 8, 3, PLTE=np.uint8(palette).tobytes(), tRNS=b"\0"))


def test_transparent_pixels_that_show_a_class_are_refused():
    samples = np.stack([FACE, np.where(FACE == CELEBAMASK_HQ.index["hair"], 0, WHITE)], -1)
    with pytest.raises(InputError, match=r"mask\.png: pixels that are fully transparent show hair; remove"):
        decode(raw_png(samples, 8, 4))
    with pytest.raises(InputError, match=r"mask\.png is fully transparent"):
        decode(raw_png(np.stack([FACE, FACE * 0], -1), 8, 4))


# Palettes.


def test_a_palette_whose_indices_are_the_classes_is_read():
    assert_read(png(with_palette(FACE, COLORS)))
    assert_read(png(with_palette(FACE, np.zeros((19, 3)))))  # of one colour
    voc = np.uint8([[(i & 1) * 128, (i >> 1 & 1) * 128, (i >> 2 & 1) * 128 + i] for i in range(19)])
    assert_read(png(with_palette(FACE, voc)))  # of colours that name no class
    assert_read(encode(with_palette(FACE, COLORS), "GIF"))


def test_a_palette_of_class_colours_in_another_order_is_read_by_its_colours():
    order = np.random.default_rng(0).permutation(19)
    indices = np.argsort(order).astype(np.uint8)[FACE]
    assert_read(png(with_palette(indices, COLORS[order])))


def test_a_palette_of_greys_is_read_by_its_greys():
    greys = np.unique(FACE)[::-1]
    indices = np.uint8([list(greys).index(label) for label in range(19) if label in greys] or [0])
    table = np.zeros(19, np.uint8)
    table[np.sort(greys)] = indices
    assert_read(png(with_palette(table[FACE], np.stack([greys] * 3, -1))))


def test_a_palette_that_could_mean_both_is_refused():
    indices = np.uint8(FACE > 0)
    palette = np.stack([COLORS[0], COLORS[CELEBAMASK_HQ.index["hair"]]])
    with pytest.raises(InputError, match=r"mask\.png: the palette's indices are classes, and its colours are those of"):
        decode(png(with_palette(indices, palette)))


# Colours.


@pytest.mark.parametrize("name", ["celebamask_hq", "gpen"])
def test_published_colours_are_read(name):
    palette = ClassSet.load(name)
    table = np.uint8([palette.colors[palette.index[class_name]] for class_name in CELEBAMASK_HQ.names])
    assert_read(png(Image.fromarray(table[FACE])))
    assert_read(raw_png(table[FACE].astype(np.uint16) * 257, 16, 2))


def test_a_class_set_of_the_users_own_is_read_by_its_colours():
    classes = ClassSet("mine", ("none", "eye", "mouth"), ((9, 9, 9), (200, 10, 10), (10, 200, 10)))
    mask = np.random.default_rng(0).integers(0, 3, (8, 8)).astype(np.uint8)
    np.testing.assert_array_equal(decode(png(Image.fromarray(classes.colorize(mask))), classes), mask)


def smoothed(mask: np.ndarray, factor: int = 4) -> np.ndarray:
    """The mask in colours with anti-aliased edges: drawn `factor` times as large, and averaged."""
    large = np.kron(mask, np.ones((factor, factor), np.uint8))
    shifted = np.pad(large, ((1, 0), (1, 0)), "edge")[:-1, :-1]  # no edge lies on the border of two pixels
    size = (mask.shape[1], mask.shape[0])
    return cv2.resize(COLORS[shifted], size, interpolation=cv2.INTER_AREA)


def test_mixed_colours_on_outlines_get_the_class_of_a_neighbour_and_are_counted(caplog):
    face = draw_face((0, 3), 256)[1]
    image = smoothed(face)
    mask = decode(png(Image.fromarray(image)))
    is_mixed = (image != COLORS[face]).any(-1)
    assert is_mixed.mean() > 0.01
    np.testing.assert_array_equal(mask[~is_mixed], face[~is_mixed])
    neighbourhood = np.stack([np.roll(face, (dy, dx), (0, 1)) for dy in range(-2, 3) for dx in range(-2, 3)])
    assert (neighbourhood == mask).any(0).mean() > 0.995  # all but parts thinner than a pixel
    assert "pixels of mixed colour on outlines got the class of a neighbour" in caplog.text


@pytest.mark.parametrize("color", [(51, 255, 254), (100, 0, 0), (255, 255, 255)])
@pytest.mark.parametrize("height", [2, 8])
def test_a_region_in_an_unknown_colour_is_refused(color, height):
    """(100, 0, 0) lies between the colours of background and skin, so that an outline may have it, but no region."""
    if color == (100, 0, 0) and height == 2:
        pytest.skip("as thin as an outline between background and skin")
    image = COLORS[FACE].copy()
    image[30 : 30 + height, 24:40] = color
    with pytest.raises(
        InputError, match=rf"mask\.png: the colour \({', '.join(map(str, color))}\) \(.* names no class"
    ):
        decode(png(Image.fromarray(image)))


def test_a_photograph_is_refused():
    with pytest.raises(InputError, match=r"mask\.png: the colour .* names no class"):
        decode(png(Image.fromarray(draw_face((0, 3), 64)[0])))


def test_colours_that_two_palettes_read_differently_are_refused():
    forward, backward = ClassSet.load("face_parsing_pytorch"), ClassSet.load("face_parsing_pytorch_bgr")
    both = set(forward.colors) & set(backward.colors)
    colors = [color for color in forward.colors if color in both and sum(color) not in (0, 765)]
    image = np.uint8(colors[:4] * 4).reshape(4, 4, 3).repeat(4, 0).repeat(4, 1)
    with pytest.raises(
        InputError, match=r"name different classes in the palettes of .*; say which it is with `mask_cl"
    ):
        decode(png(Image.fromarray(image)))


# What is refused by name.


def cmyk() -> bytes:
    return encode(Image.fromarray(np.stack([FACE] * 4, -1), "CMYK"), "TIFF")


def two_pages(kind: str) -> bytes:
    pages = [Image.fromarray(FACE), Image.fromarray(FACE.T.copy())]
    buffer = io.BytesIO()
    pages[0].save(buffer, kind, save_all=True, append_images=pages[1:])
    return buffer.getvalue()


RGB_FACE = np.stack([FACE] * 3, -1)
REFUSED = {
    "JPEG": (lambda: encode(FACE, "JPEG"), "is a JPEG: lossy"),
    "lossy WebP": (lambda: encode(RGB_FACE, "WEBP", quality=90), "is a lossy WebP file: lossy"),
    "lossy WebP with alpha": (
        lambda: encode(np.concatenate([RGB_FACE, RGB_FACE[..., :1]], -1), "WEBP", quality=90),
        "is a lossy WebP file",
    ),
    "AVIF": (lambda: encode(RGB_FACE, "AVIF"), "is an AVIF file"),
    "JPEG 2000": (lambda: encode(FACE, "JPEG2000"), "is a JPEG 2000 file"),
    "JPEG in TIFF": (lambda: encode(FACE, "TIFF", compression="jpeg"), r"is a TIFF file with lossy .*\(jpeg\)"),
    "CMYK": (cmyk, "has the colour mode CMYK"),
    "float TIFF": (lambda: encode(FACE.astype(np.float32), "TIFF"), "has the colour mode F"),
    "pages": (lambda: two_pages("TIFF"), "has 2 pages or frames"),
    "frames of GIF": (lambda: two_pages("GIF"), "has 2 pages or frames"),
    "frames of PNG": (lambda: two_pages("PNG"), "has 2 pages or frames"),
    "icon": (lambda: encode(FACE, "ICO"), "is a file of the format ICO"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_other_forms_are_refused_by_name(form):
    make, message = REFUSED[form]
    with pytest.raises(InputError, match=rf"mask\.png {message}"):
        decode(make())


def test_a_jpeg_is_refused_whatever_it_is_called():
    with pytest.raises(InputError, match=r"^a\.png is a JPEG"):
        decode_mask(encode(FACE, "JPEG"), "a.png", CELEBAMASK_HQ)


# Part files.


@pytest.mark.parametrize("depth", [1, 8, 16])
def test_a_part_is_what_is_neither_black_nor_transparent(depth):
    part = FACE == CELEBAMASK_HQ.index["hair"]
    for value in (1, 2**depth - 1):
        np.testing.assert_array_equal(decode_part(raw_png(part * np.uint16(value), depth, 0), "x"), part)
    if depth >= 8:
        alpha = part * np.uint16(2**depth - 1)
        samples = np.stack([np.full_like(alpha, 2**depth - 1)] * 3 + [alpha], -1)
        np.testing.assert_array_equal(decode_part(raw_png(samples, depth, 6), "x"), part)


# Values of Python.

ONE_HOT = np.eye(19, dtype=np.float32)[FACE]
VALUES = {
    "array": FACE,
    "int64": FACE.astype(np.int64),
    "big-endian": FACE.astype(">i4"),
    "lists": FACE.tolist(),
    "one channel": FACE[..., None],
    "three channels": np.stack([FACE] * 3, -1),
    "colours": COLORS[FACE],
    "one-hot": ONE_HOT,
    "boolean one-hot": ONE_HOT.astype(bool),
    "one-hot of PyTorch": ONE_HOT.transpose(2, 0, 1),
    "PIL image": Image.fromarray(FACE),
    "PIL palette": with_palette(FACE, COLORS),
    "PIL colours": Image.fromarray(COLORS[FACE]),
}


@pytest.mark.parametrize("form", VALUES)
def test_every_value_that_means_one_mask_is_one_mask(form):
    (mask,) = read_masks(VALUES[form], CELEBAMASK_HQ)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, FACE)


def test_paths_are_read(tmp_path):
    (tmp_path / "face.png").write_bytes(png(Image.fromarray(FACE)))
    for value in (tmp_path / "face.png", str(tmp_path / "face.png"), [tmp_path / "face.png"]):
        (mask,) = read_masks(value, CELEBAMASK_HQ)
        np.testing.assert_array_equal(mask, FACE)


def test_batches_are_read():
    two = np.stack([FACE, FACE[:, ::-1]])
    for value in (two, two[..., None], np.stack([two] * 3, -1), np.eye(19)[two], list(two), COLORS[two]):
        first, second = read_masks(value, CELEBAMASK_HQ)
        np.testing.assert_array_equal(first, two[0])
        np.testing.assert_array_equal(second, two[1])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((0, 0), int), r"mask has shape \(0, 0\); wanted is"),
        (np.zeros((0, 8, 8), int), r"mask has shape \(0, 8, 8\); wanted is"),
        (np.zeros(8, int), r"mask has shape \(8,\); wanted is"),
        (np.zeros((2, 2, 8, 8, 1), int), r"mask has shape \(2, 2, 8, 8, 1\); wanted is"),
        ([[0, 1], [2]], "mask has rows of different lengths; wanted is"),
        (None, "mask has NoneType of dtype object; wanted is"),
        (np.array([["a"]]), "mask has ndarray of dtype <U1; wanted is"),
        (FACE.astype(float), r"mask has dtype float64 and shape \(64, 64\)"),
        (ONE_HOT * 0.9, r"mask has dtype float32 and shape \(64, 64, 19\); of probabilities give argmax\(-1\)"),
        (FACE.astype(int) - 1, r"mask: label -1 is outside 0\.\.18"),
        (np.full((8, 8, 3), -1), r"mask has values -1\.\.-1"),
        ([FACE, FACE * 20], r"mask\[1\]: label .* is outside"),
    ],
)
def test_other_values_are_refused_by_argument_and_shape(value, message):
    with pytest.raises(InputError, match=message):
        read_masks(value, CELEBAMASK_HQ)


def test_a_pillow_image_whose_numbers_pillow_changes_is_refused(tmp_path):
    (tmp_path / "mask.png").write_bytes(raw_png(FACE % 16, 4, 0))
    with Image.open(tmp_path / "mask.png") as image, pytest.raises(InputError, match="give the file's path"):
        read_masks(image, CELEBAMASK_HQ)


@hypothesis.settings(max_examples=300)
@hypothesis.given(data=st.data())
def test_damaged_files_are_read_or_refused_and_nothing_else(data):
    make = data.draw(
        st.sampled_from(
            [
                lambda: raw_png(FACE, 8, 0, eXIf=exif(6)),
                lambda: raw_png(FACE, 8, 3, PLTE=COLORS.tobytes(), tRNS=b"\0"),
                lambda: raw_png(COLORS[FACE], 8, 2),
                lambda: encode(FACE, "TIFF", compression="tiff_lzw"),
                lambda: encode(RGB_FACE, "WEBP", lossless=True),
                lambda: encode(with_palette(FACE, COLORS), "GIF"),
                lambda: encode(FACE, "BMP"),
                lambda: encode(FACE, "PPM"),
                lambda: encode(FACE, "TGA"),
            ]
        )
    )
    content = bytearray(make())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(1, len(content)))]
    with contextlib.suppress(InputError):
        mask = decode(bytes(content))
        assert mask.ndim == 2
        assert CELEBAMASK_HQ.is_label(mask).all()
