"""Axis letters and types for the annotations of `kernels`. This is the only place that defines them.

    B  batch
    L  sequence length (tokens in scan order)
    D  inner channels
    N  state entries per channel
    T  time steps of one chunk of the sequence
    P  parts of a sequence that is sharded over a mesh axis, one part per device
    H W    height and width of an image
    KH KW  height and width of a convolution kernel

Axes that exist only inside one kernel, such as `blocks` and `tiles`, have a word instead of a letter.

`B` and `D` also name parameters of the state-space model, so code unpacks axes as words:
`batch, length, d_inner = u.shape`; `d_state = A.shape[1]`. A shape with a single axis is written " D", with a space,
because linters read "D" as a forward reference.
"""

from typing import Any, TypedDict

import jax
from jaxtyping import Array, Bool, Float, Int

Index = int | Int[Array, ""]
"""A loop counter, grid index or offset: a Python int, or a traced scalar inside `jax.lax.fori_loop` and kernels."""

Size = Any
"""Length of an axis: int, or an expression of symbolic lengths (`jax.export`), whose class JAX does not publish."""

Ref = jax.Ref
"""A Pallas reference: the block of an operand that `pallas_call` gives to one program, or a scratch buffer.

`ref[...]` loads values, `ref[...] = x` stores them. The annotation does not check shapes. The block shape and memory
space of each reference are stated where its block spec is built: `pallas_tpu_layout.py`, `pallas_gpu_layout.py` and
`mosaic_gpu_layout.py`.
"""


class _ScanInputs(TypedDict):
    """The array arguments of `selective_scan` by name, without the initial state; None for absent ones."""

    u: Array
    delta: Array
    A: Array
    B: Array
    C: Array
    D: Array | None
    z: Array | None
    delta_bias: Array | None


class ScanArguments(_ScanInputs):
    """The array arguments of `selective_scan`, by name, as a caller passes them."""

    initial_state: Array | None


class ScanArrays(_ScanInputs):
    """The array arguments of `selective_scan`, by name, or their gradients. The initial state is always present."""

    initial_state: Array


__all__ = ["Array", "Bool", "Float", "Index", "Int", "Ref", "ScanArguments", "ScanArrays", "Size"]
