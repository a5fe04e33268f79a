"""Axis letters and array types for the annotations of kernels: the one place that lists them.

    B  batch
    L  sequence (tokens, in the order they are scanned)
    D  inner channels
    N  state of one channel

`B` and `D` also name parameters of the state-space model, so code unpacks axes as words:
`batch, length, d_inner = u.shape`; `d_state = A.shape[1]`. A shape of one axis is written " D", with a space, since
linters take "D" for a forward reference.
"""

from jaxtyping import Array, Bool, Float

__all__ = ["Array", "Bool", "Float"]
