"""Writes lpips.npz: distances by the package lpips, and features by torchvision, for `test_lpips.py`.

The peers are PyTorch packages, called as they are, which the tests do without. To make the file again:

    python3.11 -m venv .venv-golden
    .venv-golden/bin/pip install torch==2.14.1 torchvision==0.29.1 lpips==0.1.4
    .venv-golden/bin/python tests/evaluation/golden/make_lpips.py

The weights of the networks and of the heads are random (`random_weights.py`), by the names that torchvision and the
files of lpips have.

The file holds `source`, the versions; and for each network: `<network>/shapes`, JSON of the names and shapes of all
weights, and `<network>/distances` of `random_images("lpips", 3, 64, 72)` to `random_images("lpips others", 3, 64, 72)`.
And `vgg/relu3_3`: the standard deviations of the channels by torchvision's VGG16 for
`random_images("lpips", 1, 224, 224)`.
"""

import importlib.metadata
import json
from pathlib import Path

import lpips
import numpy as np
import torch
import torchvision
from random_weights import random_images, random_weights

MODELS = {"alex": torchvision.models.alexnet, "vgg": torchvision.models.vgg16}
MEAN, DEVIATION = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def channels_first(images: np.ndarray) -> torch.Tensor:
    return torch.tensor(images).permute(0, 3, 1, 2).float()


@torch.no_grad()
def main():
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("lpips", "torch", "torchvision")]
    arrays = {"source": np.array(", ".join(versions))}
    images, others = (channels_first(random_images(name, 3, 64, 72)) for name in ("lpips", "lpips others"))
    for network, make in MODELS.items():
        with torch.device("meta"):
            shapes = {key: list(x.shape) for key, x in make().state_dict().items() if key.startswith("features.")}
        heads = torch.load(Path(lpips.__file__).parent / "weights/v0.1" / f"{network}.pth", map_location="cpu")
        shapes |= {key: list(x.shape) for key, x in heads.items()}
        state = {key: torch.tensor(x) for key, x in random_weights(shapes).items()}
        distance = lpips.LPIPS(net=network, pnet_rand=True, verbose=False)
        distance.load_state_dict({key: state[key] for key in heads}, strict=False)
        for key, parameter in distance.net.named_parameters():
            _, layer, kind = key.split(".")  # slice1.0.weight is torchvision's features.0.weight
            parameter.copy_(state[f"features.{layer}.{kind}"])
        arrays[f"{network}/shapes"] = np.array(json.dumps(shapes))
        arrays[f"{network}/distances"] = distance(images / 127.5 - 1, others / 127.5 - 1).reshape(-1).numpy()
        if network == "vgg":
            stack = make(weights=None).features
            stack.load_state_dict({key.removeprefix("features."): x for key, x in state.items() if "features" in key})
            image = channels_first(random_images("lpips", 1, 224, 224)) / 255
            features = stack[:16]((image - MEAN) / DEVIATION)
            arrays["vgg/relu3_3"] = features.std(dim=(2, 3), correction=0).numpy()
    np.savez_compressed(Path(__file__).with_name("lpips.npz"), **arrays)


if __name__ == "__main__":
    main()
