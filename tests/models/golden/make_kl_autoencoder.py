"""Writes kl_autoencoder.npz: what diffusers' AutoencoderKL makes of random weights, for `test_autoencoder.py`.

The peer is a PyTorch package, called as it is, which the tests do without. To make the file again:

    python3.11 -m venv .venv-golden
    .venv-golden/bin/pip install torch==2.15.0 diffusers==0.42.1
    .venv-golden/bin/python tests/models/golden/make_kl_autoencoder.py

Two small models, `sd` as Stable Diffusion 1 has them and `sd3` with 16 channels and no convolutions at the latent, in
float32 with weights that float16 holds: for each `config` (JSON), `weights/<name>`, `image` and `latent` (NCHW), and
`mean`, `log_variance` and `decoded`. And `shapes`: JSON of all names and shapes of Stable Diffusion's own size.
"""

import importlib.metadata
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

SMALL = {"norm_num_groups": 4, "layers_per_block": 1}
MODELS = {
    "sd": {**SMALL, "block_out_channels": (8, 12, 12), "latent_channels": 4},
    "sd3": {
        **SMALL,
        "block_out_channels": (8, 8),
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
    },
}
STABLE_DIFFUSION = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}


def make(block_out_channels, **config):
    depth = len(block_out_channels)
    return AutoencoderKL(
        block_out_channels=block_out_channels,
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        **config,
    )


@torch.no_grad()
def main():
    rng = np.random.default_rng(0)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("diffusers", "torch")]
    arrays = {"source": np.array(", ".join(versions))}
    for name, config in MODELS.items():
        model = make(**config).eval()
        for key, weight in model.named_parameters():
            noise = rng.normal(size=weight.shape)
            if weight.ndim == 1:
                values = ("norm" in key and key.endswith("weight")) + 0.2 * noise
            else:
                values = noise / np.sqrt(np.prod(weight.shape[1:]))
            weight.copy_(torch.tensor(values.astype(np.float16).astype(np.float32)))
        image = torch.tensor(rng.uniform(-1, 1, (2, 3, 16, 24)), dtype=torch.float32)
        distribution = model.encode(image).latent_dist
        latent = torch.tensor(rng.normal(size=distribution.mean.shape), dtype=torch.float32)
        # As pipelines do: latents are scaled and shifted outside of the model.
        shift = model.config.shift_factor or 0.0
        decoded = model.decode(latent / model.config.scaling_factor + shift).sample
        arrays[f"{name}/config"] = np.array(json.dumps({k: v for k, v in model.config.items() if k[0] != "_"}))
        results = {"image": image, "latent": latent, "mean": distribution.mean, "log_variance": distribution.logvar}
        arrays |= {f"{name}/{key}": x.numpy() for key, x in (results | {"decoded": decoded}).items()}
        arrays |= {f"{name}/weights/{key}": x.numpy().astype(np.float16) for key, x in model.state_dict().items()}
    with torch.device("meta"):
        shapes = {key: list(x.shape) for key, x in make(**STABLE_DIFFUSION).state_dict().items()}
    arrays["shapes"] = np.array(json.dumps(shapes))
    np.savez_compressed(Path(__file__).with_name("kl_autoencoder.npz"), **arrays)


if __name__ == "__main__":
    main()
