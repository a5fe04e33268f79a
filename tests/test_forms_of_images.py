"""Forms of images in calls of the pipeline: arrays, PIL images and paths go in, arrays and PIL images come out."""

import doctest

import jax
import numpy as np
import pytest
from PIL import Image

import sisma_jax
from sisma_jax.call_arguments import as_photo
from sisma_jax.data import photos
from sisma_jax.data.classes import CELEBAMASK_HQ
from sisma_jax.data.drawing import draw_face
from sisma_jax.errors import InputError
from sisma_jax.pipeline import Pipeline

KEY = jax.random.key(0)
PHOTO, MASK = draw_face(np.random.default_rng(1), 24)
REGION = np.zeros((24, 24), np.uint8)
REGION[8:16, 8:16] = 255


@pytest.fixture(scope="module")
def pipe(weights):
    return sisma_jax.load(weights)


@pytest.fixture
def files(tmp_path):
    for name, pixels in (("photo", PHOTO), ("mask", MASK), ("region", REGION)):
        (tmp_path / f"{name}.png").write_bytes(photos.encode_png(pixels))
    return tmp_path


def require_images(images, wanted):
    assert all(isinstance(image, Image.Image) for image in images)
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in images]), wanted)


def test_faces_and_streams_are_pil_images_on_request(pipe):
    wanted = pipe(MASK, key=KEY, num_samples=2)
    require_images(pipe(Image.fromarray(MASK), key=KEY, num_samples=2, output="pil"), wanted)
    *_, (step, images) = pipe.stream(MASK, key=KEY, num_samples=2, output="pil")
    assert step == pipe.config.sample.steps
    require_images(images, wanted)


def test_a_photograph_may_be_an_array_an_image_or_a_path(pipe, files):
    wanted = pipe.edit(PHOTO, MASK, region=REGION, key=KEY)
    assert (wanted != PHOTO).any()
    image, region = Image.fromarray(PHOTO), Image.fromarray(REGION)
    require_images(pipe.edit(image, Image.fromarray(MASK), region=region, key=KEY, output="pil"), wanted)
    of_files = pipe.edit(files / "photo.png", str(files / "mask.png"), region=files / "region.png", key=KEY)
    np.testing.assert_array_equal(of_files, wanted)


def test_a_predicted_mask_may_be_an_image_with_the_colours_of_the_classes(pipe, files):
    wanted = pipe.segment(PHOTO, whole=True)
    np.testing.assert_array_equal(pipe.segment(files / "photo.png", whole=True), wanted)
    image = pipe.segment(Image.fromarray(PHOTO), whole=True, output="pil")
    np.testing.assert_array_equal(np.asarray(image), wanted)
    np.testing.assert_array_equal(np.asarray(image.convert("RGB")), CELEBAMASK_HQ.colorize(wanted))


def test_an_image_is_turned_as_its_file_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    Image.fromarray(PHOTO[:10]).save(tmp_path / "turned.png", exif=exif)
    wanted = np.rot90(PHOTO[:10], -1)
    np.testing.assert_array_equal(as_photo(Image.open(tmp_path / "turned.png"), "image"), wanted)
    np.testing.assert_array_equal(as_photo(tmp_path / "turned.png", "image"), wanted)


@pytest.mark.parametrize("mode", ["1", "F", "I", "I;16", "LAB"])
def test_images_of_other_modes_are_refused(mode):
    with pytest.raises(InputError, match=f"photo is a PIL image of mode {mode}; convert it to one of the modes L, "):
        as_photo(Image.new(mode, (4, 4)), "photo")


def test_other_forms_of_results_are_refused_before_sampling(pipe):
    for call in (
        lambda: pipe(MASK, key=KEY, output="torch"),
        lambda: pipe.stream(MASK, key=KEY, output="torch"),
        lambda: pipe.edit(PHOTO, MASK, region=REGION, key=KEY, output="torch"),
        lambda: pipe.segment(PHOTO, output="torch"),
    ):
        with pytest.raises(InputError, match="output must be 'array' or 'pil', got 'torch'"):
            call()
    with pytest.raises(InputError, match="16 bits per sample"):
        pipe.edit(PHOTO.astype(np.uint16), MASK, region=REGION, key=KEY, output="pil")


def test_the_example_in_the_docstring_runs():
    names = {"sisma_jax": sisma_jax, "jax": jax, "np": np}
    [example] = doctest.DocTestFinder(recurse=False).find(Pipeline.__call__, "Pipeline.__call__", globs=names)
    assert len(example.examples) == 7
    report = []
    assert doctest.DocTestRunner(verbose=False).run(example, out=report.append).failed == 0, "".join(report)
