"""Comparable operations on equal inputs: the selective scans of other packages, and softmax attention.

The packages use PyTorch, and this project does not depend on them: `pip install torch mambapy transformers`.
"""

import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import jax
import numpy as np

from benchmarks.measure import Candidate, compiled_candidate

if TYPE_CHECKING:
    import torch  # pyright: ignore[reportMissingImports]  optional, not in the development environment

Outputs: TypeAlias = "np.ndarray | tuple[np.ndarray, dict[str, np.ndarray]]"
"""y, or (y, {input: its gradient})."""

PACKAGES: dict[str, tuple[str, ...]] = {
    "mambapy": ("torch", "mambapy"),
    "transformers": ("torch", "transformers"),
    "attention, torch": ("torch",),
}
HEAD_CHANNELS = 64
# How many arrays of (batch, length, d_inner, d_state) exist at the same time: (in the forward pass, in the forward and
# backward pass). Counted in the packages' code, because PyTorch does not report its memory before a run.
STATE_ARRAYS = {"mambapy": (7, 10), "transformers": (4, 9)}


def absent(peers: Sequence[str] = tuple(PACKAGES)) -> list[str]:
    """Returns one message for each peer whose packages are not installed.

    Args:
      peers: keys of `PACKAGES`.
    """
    lines = []
    for peer in peers:
        missing = [package for package in PACKAGES[peer] if importlib.util.find_spec(package) is None]
        if missing:
            lines.append(
                f"peer {peer!r} left out: {' and '.join(missing)} not installed (pip install {' '.join(missing)})"
            )
    return lines


def peer_candidates(inputs: Mapping[str, jax.Array], cotangent: jax.Array | None) -> list[Candidate]:
    """Returns candidates for the selective scans of the packages that are installed.

    Args:
      inputs: u, delta, A, B and C, as for `selective_scan`; float32.
      cotangent: cotangent of y; None measures the forward pass only.
    """
    makers = {"mambapy": _mambapy, "transformers": _transformers}
    state_bytes = 4 * inputs["u"].size * inputs["A"].shape[1]
    return [
        Candidate(
            name,
            run=make(inputs, cotangent),
            group="scan",
            needed_bytes=state_bytes * STATE_ARRAYS[name][cotangent is not None],
        )
        for name, make in makers.items()
        if not absent([name])
    ]


def attention_candidates(batch: int, length: int, channels: int, backward: bool) -> list[Candidate]:
    """Returns candidates for softmax attention in float32: JAX's and, if PyTorch is installed, PyTorch's.

    Args:
      batch: number of sequences.
      length: tokens per sequence.
      channels: per token; a multiple of 64, the channels of a head, or less than 128 for one head.
      backward: compute the gradients with respect to query, key and value, too.
    """
    heads = max(channels // HEAD_CHANNELS, 1)
    shape = (batch, length, heads, channels // heads)
    q, k, v, d_out = jax.random.normal(jax.random.key(0), (4, *shape))
    name = "attention, jax"
    if backward:
        candidates = [compiled_candidate(name, _attention_and_gradients, q, k, v, d_out, group="attention")]
    else:
        candidates = [compiled_candidate(name, jax.nn.dot_product_attention, q, k, v, group="attention")]
    if not absent(["attention, torch"]):
        run = _torch_attention(q, k, v, d_out if backward else None)
        candidates.append(Candidate("attention, torch", run, group="attention"))
    return candidates


def _attention_and_gradients(
    q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    out, vjp = jax.vjp(jax.nn.dot_product_attention, q, k, v)
    return out, vjp(d_out)


def _torch_run(
    function: "Callable[..., torch.Tensor]",
    inputs: Mapping[str, jax.Array],
    cotangent: jax.Array | None,
    swap: Sequence[str],
    axes: tuple[int, int],
) -> Callable[[], Outputs]:
    """Returns a run of `function(**inputs)`; with a cotangent, the run computes the gradients, too.

    The inputs in `swap` are passed with `axes` exchanged. If there are any, the result is expected in the same layout.
    The axes are exchanged before time is measured.
    """
    import torch  # pyright: ignore[reportMissingImports]  see above

    def tensor(name: str, x: jax.Array) -> "torch.Tensor":
        copied = torch.from_numpy(np.array(x))
        copied = copied.transpose(*axes).contiguous() if name in swap else copied
        return copied.requires_grad_(cotangent is not None)

    def array(name: str, x: "torch.Tensor") -> np.ndarray:
        return (x.transpose(*axes) if name in swap else x).detach().numpy()

    result = "result" if not swap else swap[0]  # a name whose layout the result shares
    tensors = {name: tensor(name, x) for name, x in inputs.items()}
    if cotangent is None:

        def forward() -> np.ndarray:
            with torch.no_grad():
                return array(result, function(**tensors))

        return forward

    d_y = tensor(result, cotangent).detach()

    def forward_and_backward() -> tuple[np.ndarray, dict[str, np.ndarray]]:
        y = function(**tensors)
        gradients = torch.autograd.grad(y, list(tensors.values()), d_y)
        return array(result, y), {n: array(n, g) for n, g in zip(tensors, gradients, strict=True)}

    return forward_and_backward


def _mambapy(inputs: Mapping[str, jax.Array], cotangent: jax.Array | None) -> Callable[[], Outputs]:
    """Returns a run of the parallel scan of mambapy's Mamba block, with the skip weight D set to zero."""
    import torch  # pyright: ignore[reportMissingImports]  see above
    from mambapy.mamba import MambaBlock  # pyright: ignore[reportMissingImports]  optional, as torch

    D = torch.zeros(inputs["u"].shape[2])

    def scan(
        u: "torch.Tensor", delta: "torch.Tensor", A: "torch.Tensor", B: "torch.Tensor", C: "torch.Tensor"
    ) -> "torch.Tensor":
        return MambaBlock.selective_scan(None, u, delta, A, B, C, D)  # the method does not use `self`

    return _torch_run(scan, inputs, cotangent, swap=(), axes=(1, 2))


def _transformers(inputs: Mapping[str, jax.Array], cotangent: jax.Array | None) -> Callable[[], Outputs]:
    """Returns a run of the sequential scan that transformers' Mamba uses without its CUDA package."""
    from transformers.models.mamba.modeling_mamba import (  # pyright: ignore[reportMissingImports]  optional, as torch
        mamba_selective_scan,
    )

    # The wrapper would call another package's kernel if one is installed.
    recurrence = inspect.unwrap(mamba_selective_scan)

    def scan(
        u: "torch.Tensor", delta: "torch.Tensor", A: "torch.Tensor", B: "torch.Tensor", C: "torch.Tensor"
    ) -> "torch.Tensor":
        return recurrence(u, delta, A, B, C)

    return _torch_run(scan, inputs, cotangent, swap=("u", "delta", "B", "C"), axes=(1, 2))


def _torch_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array | None
) -> Callable[[], np.ndarray | tuple[np.ndarray, tuple[np.ndarray, ...]]]:
    import torch  # pyright: ignore[reportMissingImports]  see above

    def attention(query: "torch.Tensor", key: "torch.Tensor", value: "torch.Tensor") -> "torch.Tensor":
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    inputs = {"query": q, "key": k, "value": v}
    run = _torch_run(attention, inputs, d_out, swap=tuple(inputs), axes=(1, 2))

    def run_in_order() -> np.ndarray | tuple[np.ndarray, tuple[np.ndarray, ...]]:
        outputs = run()
        if isinstance(outputs, np.ndarray):
            return outputs
        y, gradients = outputs
        return y, tuple(gradients[name] for name in inputs)

    return run_in_order
