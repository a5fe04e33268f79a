from pathlib import Path

import hypothesis
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest

from sisma_jax.errors import InputError
from sisma_jax.evaluation.image_quality import psnr, ssim

GOLDEN = np.load(Path(__file__).parent / "golden" / "image_quality.npz")
IMAGES = hnp.arrays(np.uint8, (2, 13, 12, 3))


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_values_equal_those_of_scikit_image(metric):
    np.testing.assert_allclose(metric(GOLDEN["images"], GOLDEN["originals"]), GOLDEN[metric.__name__], rtol=1e-9)


@hypothesis.given(IMAGES)
def test_an_image_equal_to_its_original_has_the_highest_values(images):
    np.testing.assert_array_equal(psnr(images, images), 100.0)
    np.testing.assert_allclose(ssim(images, images), 1.0, rtol=1e-9)


@hypothesis.given(IMAGES, IMAGES)
def test_values_are_symmetric_within_range_and_per_image(images, originals):
    for metric, low, high in ((psnr, 0.0, 100.0), (ssim, -1.0, 1 + 1e-9)):
        values = metric(images, originals)
        assert np.all((values >= low) & (values <= high))
        np.testing.assert_allclose(metric(originals, images), values, rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(metric(images[1:], originals[1:]), values[1:])


def test_a_constant_error_of_one_level_has_a_known_psnr():
    images = np.full((1, 4, 4, 3), 100, np.uint8)
    assert psnr(images, images + 1)[0] == pytest.approx(20 * np.log10(255))


def test_a_single_channel_is_the_mean_of_equal_channels():
    images, originals = GOLDEN["images"][..., :1], GOLDEN["originals"][..., :1]
    np.testing.assert_allclose(ssim(images, originals), ssim(images.repeat(3, -1), originals.repeat(3, -1)), rtol=1e-12)


def test_no_images_have_no_values():
    assert (
        psnr(*np.zeros((2, 0, 16, 16, 3), np.uint8)).shape == ssim(*np.zeros((2, 0, 16, 16, 3), np.uint8)).shape == (0,)
    )


def test_bad_input_is_refused():
    images = np.zeros((2, 10, 16, 3), np.uint8)
    with pytest.raises(InputError, match="at least 11 x 11 pixels, got 10 x 16"):
        ssim(images, images)
    with pytest.raises(ValueError, match="images must be uint8"):
        psnr(images / 255.0, images)
    with pytest.raises(ValueError, match="they must be equal"):
        psnr(images, images[:1])
