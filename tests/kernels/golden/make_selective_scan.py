"""Writes selective_scan.npz: results and gradients of other people's selective scans, for `test_golden.py`.

The peers are PyTorch packages, called as they are, which the tests do without. To make the file again:

    python3.11 -m venv .venv-golden
    .venv-golden/bin/pip install torch==2.15.0 mambapy==1.2.0 transformers==5.23.0 einops==0.8.2
    .venv-golden/bin/pip install --no-deps mamba-ssm-macos==1.0.2
    .venv-golden/bin/python tests/kernels/golden/make_selective_scan.py

- mambapy: `MambaBlock.selective_scan`, a parallel scan with a hand-written gradient, in float64. It knows u, delta, A,
  B, C and D, and gives no final state.
- transformers: the PyTorch recurrence of its Mamba in float64, with every option but an initial state. It casts u and B
  to float32 on the way, so that their gradients are rounded to float32.
- mamba-ssm-macos: `selective_scan_ref` of the paper's authors (state-spaces/mamba), which this package ships in a form
  that imports without CUDA, in float32 as it is written. Same options.

The file holds for each peer: `<peer>/source`, `<peer>/inputs/<argument>`, `<peer>/cotangents/<result>`,
`<peer>/results/<result>` and `<peer>/results/d <argument>`, in this project's layout (batch, length, channels).
"""

import importlib.metadata
import inspect
from pathlib import Path

import numpy as np
import torch
from mamba_ssm.ops.selective_scan_interface import selective_scan_ref
from mambapy.mamba import MambaBlock
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

BATCH, LENGTH, D_INNER, D_STATE = 2, 45, 6, 4


def mambapy_scan(u, delta, A, B, C, D):
    return {"y": MambaBlock.selective_scan(None, u, delta, A, B, C, D)}  # a method that reads nothing of its object


def channels_first_scan(scan):
    """A scan in the layout of state-spaces/mamba, (batch, channels, length), in ours."""

    def run(u, delta, A, B, C, D, z, delta_bias):
        u, delta, B, C, z = (x.transpose(1, 2) for x in (u, delta, B, C, z))
        y, final_state = scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus=True, return_last_state=True)
        return {"y": y.transpose(1, 2), "final_state": final_state}

    return run


# Unwrapped, for transformers would call a faster package in its place where it finds one.
PEERS = {
    "mambapy": ("mambapy", mambapy_scan, torch.float64),
    "transformers": ("transformers", channels_first_scan(inspect.unwrap(mamba_selective_scan)), torch.float64),
    "state-spaces": ("mamba-ssm-macos", channels_first_scan(selective_scan_ref), torch.float32),
}


def make_inputs(rng: np.random.Generator, arguments) -> dict[str, np.ndarray]:
    """Values exact in float32, so that every precision solves the same problem."""
    sequence, state = (BATCH, LENGTH, D_INNER), (BATCH, LENGTH, D_STATE)
    delta = rng.normal(size=sequence) - 1  # before the softplus, where there is one
    arrays = {
        "u": rng.normal(size=sequence),
        "delta": delta if "delta_bias" in arguments else np.exp(delta),
        "A": -np.exp(rng.normal(size=(D_INNER, D_STATE))),
        "B": rng.normal(size=state),
        "C": rng.normal(size=state),
        "D": rng.normal(size=D_INNER),
        "z": rng.normal(size=sequence),
        "delta_bias": rng.normal(size=D_INNER),
    }
    return {name: arrays[name].astype(np.float32) for name in arguments}


def main():
    arrays = {}
    for seed, (peer, (package, scan, dtype)) in enumerate(PEERS.items()):
        rng = np.random.default_rng(seed)
        inputs = make_inputs(rng, inspect.signature(scan).parameters)
        tensors = {name: torch.tensor(x, dtype=dtype, requires_grad=True) for name, x in inputs.items()}
        results = scan(**tensors)
        cotangents = {name: rng.normal(size=x.shape).astype(np.float32) for name, x in results.items()}
        loss = sum((x * torch.tensor(cotangents[name], dtype=dtype)).sum() for name, x in results.items())
        gradients = torch.autograd.grad(loss, list(tensors.values()))
        results |= {f"d {name}": gradient for name, gradient in zip(tensors, gradients, strict=True)}
        source = f"{package} {importlib.metadata.version(package)}, torch {torch.__version__}, {dtype}"
        arrays[f"{peer}/source"] = np.array(source)
        arrays |= {f"{peer}/inputs/{name}": x for name, x in inputs.items()}
        arrays |= {f"{peer}/cotangents/{name}": x for name, x in cotangents.items()}
        arrays |= {f"{peer}/results/{name}": x.detach().numpy() for name, x in results.items()}
    np.savez_compressed(Path(__file__).with_name("selective_scan.npz"), **arrays)


if __name__ == "__main__":
    main()
