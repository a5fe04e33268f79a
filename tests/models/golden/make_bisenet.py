"""Writes bisenet.npz: what face-parsing.PyTorch makes of random weights; and two small files that PyTorch writes.

The peer is a PyTorch program without a package, called as it is, which the tests do without. To make the files again:

    python3.11 -m venv .venv-golden
    .venv-golden/bin/pip install torch==2.13.0
    git clone https://github.com/zllrunning/face-parsing.PyTorch CLONE     # d2e684c
    PYTHONPATH=. .venv-golden/bin/python tests/models/golden/make_bisenet.py CLONE

bisenet.npz has `shapes` (JSON of all names and shapes), `image` (uint8, NHWC) and `logits` (every fourth pixel, NHWC).
tensors.pth and tensors_legacy.pth have the same tensors in the two formats of PyTorch.
"""

import collections
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
import torch.utils.model_zoo

from tests.models.random_weights import random_weights

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    torch.utils.model_zoo.load_url = lambda *_: {}  # the network would download ResNet-18
    sys.modules["torchvision"] = types.ModuleType("torchvision")  # imported and not used
    from model import BiSeNet

    folder = Path(__file__).parent
    net = BiSeNet(19).eval()
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    weights = random_weights(shapes)
    net.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()}, strict=False)
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3)).astype(np.uint8)
    x = (torch.tensor(image / 255) - torch.tensor(MEAN)) / torch.tensor(STD)
    with torch.no_grad():
        logits = net(x.permute(0, 3, 1, 2).float())[0].permute(0, 2, 3, 1).numpy()
    np.savez_compressed(
        folder / "bisenet.npz",
        shapes=json.dumps(shapes),
        image=image,
        logits=logits[:, ::4, ::4],
        peer=f"face-parsing.PyTorch d2e684c, torch {torch.__version__}",
    )
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "plain": base.clone(),
        "transposed": base.t(),
        "part": base[1:3, 2:],
        "half": base.half(),
        "counter": torch.tensor(7),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base[0].clone()),
    }
    torch.save({"state_dict": tensors, "epoch": 3}, folder / "tensors.pth")
    # As 79999_iter.pth: the state dict of a module, which has the versions of its layers in an attribute.
    of_module = collections.OrderedDict(tensors)
    of_module._metadata = {"": {"version": 1}}
    torch.save(of_module, folder / "tensors_legacy.pth", _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    main()
