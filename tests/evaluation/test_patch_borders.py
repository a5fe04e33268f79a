"""Visible patches."""

import numpy as np
import pytest

from sisma_jax.evaluation.patch_borders import border_ratio


def test_the_ratio_of_differences_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 12, 8, 3), np.uint8)
    want = []
    for image in images.astype(int):
        across, inside = [], []
        for y in range(12):
            for x in range(8):
                for dy, dx in ((0, 1), (1, 0)):
                    if y + dy < 12 and x + dx < 8:
                        is_border = (y + dy) // 4 != y // 4 or (x + dx) // 4 != x // 4
                        (across if is_border else inside).append(np.abs(image[y, x] - image[y + dy, x + dx]).mean())
        want.append((across, inside))
    # Both directions have their own numbers of rows, which the definition by pixels weighs by their lengths.
    got = border_ratio(images, 4)
    assert got.shape == (3,)
    np.testing.assert_allclose(got, [np.mean(a) / np.mean(b) for a, b in want], rtol=0.02)


def test_a_grid_is_seen_and_its_absence_too():
    rng = np.random.default_rng(0)
    smooth = np.linspace(0, 255, 64)[None, :, None, None] * np.ones((1, 1, 64, 3))
    smooth = (smooth + rng.normal(0, 1, smooth.shape)).clip(0, 255).astype(np.uint8)
    offsets = rng.normal(0, 20, (1, 16, 16, 3)).repeat(4, 1).repeat(4, 2)
    patched = (smooth + offsets).clip(0, 255).astype(np.uint8)
    assert border_ratio(smooth, 4)[0] == pytest.approx(1.0, abs=0.1)
    assert border_ratio(patched, 4)[0] > 4
    assert border_ratio(np.zeros((1, 8, 8, 3), np.uint8), 4)[0] == 1
    assert border_ratio(offsets.astype(np.uint8), 4)[0] == np.inf


def test_what_is_no_image_is_refused():
    with pytest.raises(ValueError, match=r"must be uint8 \(N, H, W, C\), got float64"):
        border_ratio(np.zeros((1, 8, 8, 3)), 4)
    with pytest.raises(ValueError, match=r"patch must be 2 or more and less than the sides \(8, 8\), got 8"):
        border_ratio(np.zeros((1, 8, 8, 3), np.uint8), 8)
