"""Writes mamba_mixer.npz: what transformers' Mamba mixer makes of random weights, for `test_golden_mixer.py`.

The peer is a PyTorch package, called as it is, which the tests do without. It takes its own scan where the package
mamba-ssm is not installed. To make the file again:

    python3.11 -m venv .venv-golden
    .venv-golden/bin/pip install torch==2.15.0 transformers==5.23.0
    .venv-golden/bin/python tests/models/golden/make_mamba_mixer.py

In float32. The file holds `source`, `weights/<name>` as PyTorch has them, `x` and `cotangent` (batch, length, d_model),
`y`, and the gradients `d x` and `d <name>`.
"""

import importlib.metadata
from pathlib import Path

import numpy as np
import torch
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

BATCH, LENGTH, D_MODEL, D_STATE = 2, 21, 20, 4


def main():
    rng = np.random.default_rng(0)
    config = MambaConfig(hidden_size=D_MODEL, state_size=D_STATE, num_hidden_layers=1)
    mixer = MambaMixer(config, layer_idx=0)
    with torch.no_grad():
        for name, weight in mixer.named_parameters():
            noise = torch.tensor(rng.normal(size=weight.shape), dtype=torch.float32)
            # The initial values of these two mean something; all others are replaced.
            initial = weight if name in ("A_log", "dt_proj.bias") else 0.0
            weight.copy_(initial + noise * min(1.0, 2 / weight.shape[-1] ** 0.5))
    x = torch.tensor(rng.normal(size=(BATCH, LENGTH, D_MODEL)), dtype=torch.float32, requires_grad=True)
    y = mixer(x)
    cotangent = torch.tensor(rng.normal(size=y.shape), dtype=torch.float32)
    named = {"x": x, **dict(mixer.named_parameters())}
    gradients = torch.autograd.grad((y * cotangent).sum(), list(named.values()))
    source = f"transformers {importlib.metadata.version('transformers')}, torch {torch.__version__}"
    arrays = {"source": np.array(source), "x": x, "cotangent": cotangent, "y": y}
    arrays |= {f"weights/{name}": weight for name, weight in mixer.named_parameters()}
    arrays |= {f"d {name}": gradient for name, gradient in zip(named, gradients, strict=True)}
    arrays = {name: x.detach().numpy() if isinstance(x, torch.Tensor) else x for name, x in arrays.items()}
    np.savez_compressed(Path(__file__).with_name("mamba_mixer.npz"), **arrays)


if __name__ == "__main__":
    main()
