"""Other people's code for the scan's work, and softmax attention in its place, on equal inputs.

Peers are PyTorch packages that this project does not depend on: `pip install torch mambapy transformers`.
"""

import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from benchmarks.measure import Candidate, compiled_candidate

PACKAGES = {
    "mambapy": ("torch", "mambapy"),
    "transformers": ("torch", "transformers"),
    "attention, torch": ("torch",),
}
HEAD_CHANNELS = 64
# Arrays of (batch, length, d_inner, d_state) alive at once, read off the packages' code: PyTorch does not tell before
# it runs. [forward, forward and backward]
STATE_ARRAYS = {"mambapy": (7, 10), "transformers": (4, 9)}


def absent(peers: Sequence[str] = tuple(PACKAGES)) -> list[str]:
    """Returns a line for each peer that cannot be measured here."""
    lines = []
    for peer in peers:
        missing = [package for package in PACKAGES[peer] if importlib.util.find_spec(package) is None]
        if missing:
            lines.append(
                f"peer {peer!r} left out: {' and '.join(missing)} not installed (pip install {' '.join(missing)})"
            )
    return lines


def peer_candidates(inputs: Mapping[str, jax.Array], cotangent: jax.Array | None) -> list[Candidate]:
    """The selective scans of the installed peers.

    Args:
      inputs: u, delta, A, B, C as for `selective_scan`.
      cotangent: that of y; None for the forward pass alone.
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
    """Softmax attention over as many tokens and channels, in heads of 64, JAX's and PyTorch's."""
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


def _attention_and_gradients(q, k, v, d_out):
    out, vjp = jax.vjp(jax.nn.dot_product_attention, q, k, v)
    return out, vjp(d_out)


def _torch_run(function: Callable, inputs: Mapping[str, np.ndarray], cotangent, swap: Sequence[str], axes) -> Callable:
    """A run of `function(**inputs)` and, with a cotangent, of its gradient, as (y, {input: gradient}).

    Args:
      swap: inputs whose `axes` the function wants exchanged, as in its result. They are so before time is taken.
    """
    import torch

    def tensor(name, x):
        x = torch.from_numpy(np.array(x))
        return (x.transpose(*axes).contiguous() if name in swap else x).requires_grad_(cotangent is not None)

    def array(name, x):
        return (x.transpose(*axes) if name in swap else x).detach().numpy()

    result = "result" if not swap else swap[0]  # a name whose layout the result shares
    tensors = {name: tensor(name, x) for name, x in inputs.items()}
    if cotangent is None:

        def run():
            with torch.no_grad():
                return array(result, function(**tensors))
    else:
        d_y = tensor(result, cotangent).detach()

        def run():
            y = function(**tensors)
            gradients = torch.autograd.grad(y, list(tensors.values()), d_y)
            return array(result, y), {n: array(n, g) for n, g in zip(tensors, gradients, strict=True)}

    return run


def _mambapy(inputs, cotangent):
    """mambapy's parallel scan with what surrounds it in its Mamba block; its skip weight D is zero."""
    import torch
    from mambapy.mamba import MambaBlock

    D = torch.zeros(inputs["u"].shape[2])

    def scan(u, delta, A, B, C):
        return MambaBlock.selective_scan(None, u, delta, A, B, C, D)  # a method that reads nothing of its object

    return _torch_run(scan, inputs, cotangent, swap=(), axes=(1, 2))


def _transformers(inputs, cotangent):
    """The recurrence, a token at a time, by which transformers' Mamba runs without its CUDA package."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    # Unwrapped, for it would call another package in its place where it finds one.
    recurrence = inspect.unwrap(mamba_selective_scan)

    def scan(u, delta, A, B, C):
        return recurrence(u, delta, A, B, C)

    return _torch_run(scan, inputs, cotangent, swap=("u", "delta", "B", "C"), axes=(1, 2))


def _torch_attention(q, k, v, d_out):
    import torch

    def attention(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    inputs = {"query": q, "key": k, "value": v}
    run = _torch_run(attention, inputs, d_out, swap=("query", "key", "value"), axes=(1, 2))
    if d_out is None:
        return run

    def run_in_order():
        y, gradients = run()
        return y, tuple(gradients[name] for name in inputs)

    return run_in_order
