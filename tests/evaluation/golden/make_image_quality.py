"""Writes image_quality.npz: what scikit-image gives for PSNR and SSIM, for `test_image_quality.py`.

The peer is a Python package, called as it is, which the tests do without. To make the file again:

    python3.11 -m venv .venv-golden
    .venv-golden/bin/pip install scikit-image==0.26.0
    .venv-golden/bin/python tests/evaluation/golden/make_image_quality.py

The file holds `source`, `images` and `originals`, uint8 (N, H, W, 3), and `psnr` and `ssim`, (N,): a smooth image with
noise of increasing strength, and an unrelated image as the last.
"""

import importlib.metadata
from pathlib import Path

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

HEIGHT, WIDTH, NOISE = 37, 26, (1, 5, 20, 80)


def main():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    smooth = np.stack([127 + 100 * np.sin(x / 5), 127 + 100 * np.cos(y / 7), 3.0 * x + 4.0 * y], axis=-1)
    originals = np.stack([smooth] * (len(NOISE) + 1)).round().clip(0, 255)
    images = [smooth + level * rng.normal(size=smooth.shape) for level in NOISE] + [rng.uniform(0, 255, smooth.shape)]
    originals, images = (np.stack(list(x)).round().clip(0, 255).astype(np.uint8) for x in (originals, images))
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": -1}
    pairs = list(zip(originals, images, strict=True))
    arrays = {
        "source": np.array(f"scikit-image {importlib.metadata.version('scikit-image')}"),
        "images": images,
        "originals": originals,
        "psnr": np.array([peak_signal_noise_ratio(*pair, data_range=255) for pair in pairs]),
        "ssim": np.array([structural_similarity(*pair, data_range=255, **options) for pair in pairs]),
    }
    np.savez_compressed(Path(__file__).with_name("image_quality.npz"), **arrays)


if __name__ == "__main__":
    main()
