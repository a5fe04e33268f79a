"""Selective scans of other JAX projects on equal inputs, as candidates of `benchmarks/selective_scan.py --jax_peers`.

Two are packages: `pip install equimo ejkernel`. Three are repositories without a package, of which a folder contains
clones by these names:

    git clone https://github.com/vvvm23/mamba-jax
    git clone https://github.com/clementpoiret/jimmy
    git clone https://github.com/radarFudan/mamba-minimal-jax

They compute y with a D of zeros, because each of them demands one. Nothing of them is a part of this project.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp

from benchmarks.measure import Candidate, PyTree, compiled_candidate

Scan = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""(u, delta, A, B, C) -> y, in the shapes of `selective_scan`."""

# The file of a repository that contains its scan.
_FILES = {
    "mamba-jax": "mamba_jax/kernels/reference.py",
    "jimmy": "jimmy/ops/scan.py",
    "mamba-minimal-jax": "model.py",
}
# It unrolls one step per token; XLA compiles 1,024 of them for many minutes.
_LONGEST_UNROLLED = 256


def jax_peer_candidates(
    inputs: Mapping[str, jax.Array], cotangent: jax.Array | None, clones: Path | None
) -> list[Candidate]:
    """Returns a candidate for each project that is installed or cloned; the others say what is missing.

    Args:
      inputs: u, delta, A, B and C, as for `selective_scan`; float32.
      cotangent: cotangent of y; None measures the forward pass only.
      clones: folder with the clones; None: there are none.
    """
    length = inputs["u"].shape[1]
    candidates = []
    for name, make in _SCANS.items():
        try:
            scan = make(clones)
        except ImportError as error:
            candidates.append(_skipped(name, str(error)))
            continue
        if name == "mamba-minimal-jax" and length > _LONGEST_UNROLLED:
            candidates.append(_skipped(name, f"unrolls all {length} steps"))
        else:
            candidates.append(_candidate(name, scan, inputs, cotangent))
    return candidates


def _skipped(name: str, reason: str) -> Candidate:
    return Candidate(name, run=lambda: None, group="scan", skip=reason)


def _candidate(name: str, scan: Scan, inputs: Mapping[str, jax.Array], cotangent: jax.Array | None) -> Candidate:
    def forward(inputs: Mapping[str, jax.Array]) -> jax.Array:
        return scan(*(inputs[argument] for argument in ("u", "delta", "A", "B", "C")))

    def forward_and_backward(inputs: Mapping[str, jax.Array], cotangent: jax.Array) -> PyTree:
        y, vjp = jax.vjp(forward, inputs)
        return y, vjp(cotangent)[0]

    if cotangent is None:
        return compiled_candidate(name, forward, dict(inputs), group="scan")
    return compiled_candidate(name, forward_and_backward, dict(inputs), cotangent, group="scan")


def _module(clones: Path | None, name: str) -> ModuleType:
    file = None if clones is None else clones / name / _FILES[name]
    if file is None or not file.is_file():
        raise ImportError(f"no clone of {name}")
    spec = importlib.util.spec_from_file_location(f"peer_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _skip(u: jax.Array) -> jax.Array:
    return jnp.zeros(u.shape[-1], u.dtype)


def _equimo(_: Path | None) -> Scan:
    scan = importlib.import_module("equimo.ops.scan").selective_scan

    def run(u: jax.Array, delta: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array) -> jax.Array:
        # One example at a time, with time last.
        one = jax.vmap(lambda u, delta, B, C: scan(u, delta, A, B, C, _skip(u.T)))
        return jnp.swapaxes(one(*(jnp.swapaxes(x, 1, 2) for x in (u, delta, B, C))), 1, 2)

    return run


def _ejkernel(_: Path | None) -> Scan:
    scan = importlib.import_module("ejkernel.kernels._xla.state_space_v1").state_space_v1
    return lambda u, delta, A, B, C: scan(u, A, B, C, _skip(u), delta)[0]


def _mamba_jax(clones: Path | None) -> Scan:
    scan = _module(clones, "mamba-jax").mamba_ssm
    return lambda u, delta, A, B, C: jax.vmap(lambda u, delta, B, C: scan(u, delta, A, B, C, _skip(u)))(u, delta, B, C)


def _jimmy(clones: Path | None) -> Scan:
    scan = _module(clones, "jimmy").selective_scan

    def run(u: jax.Array, delta: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array) -> jax.Array:
        u, delta, B, C = (jnp.swapaxes(x, 1, 2) for x in (u, delta, B, C))
        return jnp.swapaxes(scan(u, delta, A, B, C, jnp.zeros(u.shape[1], u.dtype)), 1, 2)

    return run


def _mamba_minimal_jax(clones: Path | None) -> Scan:
    block = _module(clones, "mamba-minimal-jax").MambaBlock
    return lambda u, delta, A, B, C: block.selective_scan(None, u, delta, A, B, C, _skip(u))


_SCANS: dict[str, Callable[[Path | None], Scan]] = {
    "ejkernel": _ejkernel,
    "equimo": _equimo,
    "jimmy": _jimmy,
    "mamba-jax": _mamba_jax,
    "mamba-minimal-jax": _mamba_minimal_jax,
}
