"""Writes inception.npz: features, resized images and an FID by other packages, for `test_inception.py`.

The peers are PyTorch packages, called as they are, which the tests do without. To make the file again:

    python3.11 -m venv .venv-golden
    .venv-golden/bin/pip install torch==2.14.1 torchvision==0.29.1
    .venv-golden/bin/pip install pytorch-fid==0.3.0 torch-fidelity==0.4.0 clean-fid==0.1.35
    .venv-golden/bin/python tests/evaluation/golden/make_inception.py

The weights are random (`random_weights.py`) and are passed to the peers as the file that they would download. clean-fid
runs its network from a TorchScript file, which cannot be made here; its resizing is therefore followed by pytorch-fid's
network, with the normalisation of clean-fid.

The file holds `source`, the versions; `shapes`, JSON of the names and shapes of all weights; `features/<resize>` of
`random_images("features", 2, 96, 80)`; `resized/<height>x<width>/<resize>`, every 13th pixel; and `fid`, between the
features `[:, ::512]` of the first and of the last 8 images of `random_images("fid", 16, 64, 64)` by pytorch-fid.
"""

import importlib.metadata
import json
import tempfile
from pathlib import Path

import cleanfid.resize
import numpy as np
import pytorch_fid.inception
import torch
from pytorch_fid.fid_score import calculate_frechet_distance
from random_weights import random_images, random_weights
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

SIZE = (299, 299)


def make_state() -> dict[str, torch.Tensor]:
    """A state dict by the names that pytorch-fid's network asks for."""
    shapes = {}

    def record(network, state, *args, **kwargs):
        shapes.update({name: tuple(x.shape) for name, x in network.state_dict().items() if x.is_floating_point()})

    load, torch.nn.Module.load_state_dict = torch.nn.Module.load_state_dict, record
    pytorch_fid.inception.load_state_dict_from_url = lambda *args, **kwargs: {}
    pytorch_fid.inception.fid_inception_v3()
    torch.nn.Module.load_state_dict = load
    return {name: torch.tensor(x) for name, x in random_weights(shapes).items()}


def channels_first(images: np.ndarray) -> torch.Tensor:
    return torch.tensor(images).permute(0, 3, 1, 2)


def resize(images: np.ndarray) -> dict[str, torch.Tensor]:
    """What each package gives to its network, NCHW."""
    pixels = channels_first(images).float()
    bilinear = torch.nn.functional.interpolate(pixels / 255, size=SIZE, mode="bilinear", align_corners=False)
    tensorflow = interpolate_bilinear_2d_like_tensorflow1x(pixels, size=SIZE, align_corners=False)
    clean = cleanfid.resize.build_resizer("clean")
    bicubic = channels_first(np.stack([clean(image) for image in images]))
    return {
        "pytorch-fid": 2 * bilinear - 1,
        "torch-fidelity": (tensorflow - 128) / 128,
        "clean-fid": (bicubic - 128) / 128,
    }


@torch.no_grad()
def main():
    packages = ("pytorch-fid", "torch-fidelity", "clean-fid", "torch", "torchvision", "pillow")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    state = make_state()
    arrays = {
        "source": np.array(", ".join(versions)),
        "shapes": np.array(json.dumps({name: list(x.shape) for name, x in state.items()})),
    }
    pytorch_fid.inception.load_state_dict_from_url = lambda *args, **kwargs: state
    by_pytorch_fid = pytorch_fid.inception.InceptionV3().eval()
    bare = pytorch_fid.inception.InceptionV3(resize_input=False, normalize_input=False).eval()
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(state, file.name)
        by_torch_fidelity = FeatureExtractorInceptionV3("inception", ["2048"], file.name)

    images = random_images("features", 2, 96, 80)
    features = {
        "pytorch-fid": by_pytorch_fid(channels_first(images).float() / 255)[0],
        "torch-fidelity": by_torch_fidelity(channels_first(images))[0],
        "clean-fid": bare(resize(images)["clean-fid"])[0],
    }
    arrays |= {f"features/{name}": x.reshape(2, -1).numpy() for name, x in features.items()}
    for height, width in ((64, 48), (401, 512)):
        resized = resize(random_images("resized", 1, height, width))
        for name, x in resized.items():
            arrays[f"resized/{height}x{width}/{name}"] = x.permute(0, 2, 3, 1)[:, ::13, ::13].numpy()
    images = random_images("fid", 16, 64, 64)
    some = by_pytorch_fid(channels_first(images).float() / 255)[0].reshape(16, -1)[:, ::512].numpy()
    moments = [moment for x in (some[:8], some[8:]) for moment in (x.mean(axis=0), np.cov(x, rowvar=False))]
    arrays["fid"] = np.float64(calculate_frechet_distance(*moments))
    np.savez_compressed(Path(__file__).with_name("inception.npz"), **arrays)


if __name__ == "__main__":
    main()
