"""Structured state-space duality (SSD), the state-space model of Mamba-2 (Dao & Gu, arXiv 2405.21060).

It is a selective scan in which all channels of a head and all their states decay alike. Within a chunk of the sequence,
the output is then a product of matrices (section 6 of the paper), which matrix units compute: a token reads the earlier
tokens of its chunk with the weights C_t · B_s times the decay between them, and everything before the chunk through the
state. `jax.lax.scan` takes the state from chunk to chunk.

These are einsums in plain JAX, so that every transformation of JAX applies, and XLA partitions batch and heads.
"""

import functools
from typing import Literal, overload

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from .arguments import check_arrays
from .selective_scan import CHECKPOINT_NAME
from .selective_scan.reference import batch_zeros, compute_dtype, discretization_step, skip_and_gate
from .typing import Array, Float

# Measured on one Zen CPU core with 2 x 1,024 x 768 and heads of 64 channels, forward and with gradients: 16 steps take
# 0.72 and 0.81 of the time at N = 16, but 0.83 and 1.13 at N = 64; 64 steps take 1.41 and 1.24, and 1.11 and 1.07.
CHUNK_STEPS = 32
"""Steps of a chunk. The products within a chunk take this many multiplications per entry of u."""

# u, Δ, B and C of a chunk.
_Chunk = tuple[
    Float[Array, "B T heads channels"], Float[Array, "B T heads"], Float[Array, "B T N"], Float[Array, "B T N"]
]


@overload
def ssd(
    u: Float[Array, "B L D"],
    delta: Float[Array, "B L heads"],
    A: Float[Array, " heads"],
    B: Float[Array, "B L N"],
    C: Float[Array, "B L N"],
    D: Float[Array, " D"] | None = None,
    z: Float[Array, "B L D"] | None = None,
    delta_bias: Float[Array, " heads"] | None = None,
    *,
    delta_softplus: bool = False,
    reverse: bool = False,
    initial_state: Float[Array, "B D N"] | None = None,
    return_final_state: Literal[False] = False,
) -> Float[Array, "B L D"]: ...


@overload
def ssd(
    u: Float[Array, "B L D"],
    delta: Float[Array, "B L heads"],
    A: Float[Array, " heads"],
    B: Float[Array, "B L N"],
    C: Float[Array, "B L N"],
    D: Float[Array, " D"] | None = None,
    z: Float[Array, "B L D"] | None = None,
    delta_bias: Float[Array, " heads"] | None = None,
    *,
    delta_softplus: bool = False,
    reverse: bool = False,
    initial_state: Float[Array, "B D N"] | None = None,
    return_final_state: Literal[True],
) -> tuple[Float[Array, "B L D"], Float[Array, "B D N"]]: ...


def ssd(
    u: Float[Array, "B L D"],
    delta: Float[Array, "B L heads"],
    A: Float[Array, " heads"],
    B: Float[Array, "B L N"],
    C: Float[Array, "B L N"],
    D: Float[Array, " D"] | None = None,
    z: Float[Array, "B L D"] | None = None,
    delta_bias: Float[Array, " heads"] | None = None,
    *,
    delta_softplus: bool = False,
    reverse: bool = False,
    initial_state: Float[Array, "B D N"] | None = None,
    return_final_state: bool = False,
) -> Float[Array, "B L D"] | tuple[Float[Array, "B L D"], Float[Array, "B D N"]]:
    """Returns y, the output of a state-space model in which each head has one decay per token.

        Δ_t = softplus(delta_t + delta_bias)        (no softplus if delta_softplus is False)
        h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t
        y_t = (C_t · h_t + D u_t) silu(z_t)

    Δ and A have one value per head, and a head consists of d_inner / heads consecutive channels. The result is that of
    `selective_scan` with Δ and A repeated for all channels of a head and all states.

    Inputs are bfloat16, float32 or float64. Decays, states and sums are float32, or float64 if one of u, delta, A, B
    and C is float64. The factors of the matrix products have the widest dtype of u, B and C. The decay between two
    steps of a chunk is the exponential of a difference of sums. In float32 its relative error is about 6e-8 times the
    sum of |Δ_t A| over the chunk.

    The function is differentiable in every array argument, in forward and reverse mode and to any order. Under
    `jax.checkpoint`, outputs and the states between chunks have the name `selective_scan.CHECKPOINT_NAME`. The sequence
    must not be sharded.

    Args:
      u: input, (batch, length, d_inner). The length may be zero.
      delta: step sizes before bias and softplus, (batch, length, heads).
      A: decay rate of each head, (heads,); negative for states that decay. `heads` divides d_inner.
      B: input matrix of each token, (batch, length, d_state), shared by the heads.
      C: output matrix of each token, (batch, length, d_state), shared by the heads.
      D: skip weight of each channel, (d_inner,); no skip connection if None.
      z: gate before its SiLU, with the shape of u; no gate if None.
      delta_bias: added to delta, (heads,).
      delta_softplus: apply a softplus, which makes the step sizes positive.
      reverse: scan from the last token to the first.
      initial_state: state before the first scanned token, (batch, d_inner, d_state); zeros if None.
      return_final_state: also return the state after the last scanned token.

    Returns:
      y, with the shape and dtype of u. If return_final_state, the pair (y, final_state), where final_state is
      (batch, d_inner, d_state) in the dtype of the computation.

    Raises:
      ValueError: the shapes do not match, or a dtype is not floating-point.
    """
    _check_arguments(u, delta, A, B, C, D, z, delta_bias, initial_state)
    dtype = compute_dtype(u, delta, A, B, C)
    batch, _, d_inner = u.shape
    heads, d_state = A.shape[0], B.shape[2]
    step_size = discretization_step(delta, delta_bias, delta_softplus, dtype)
    if initial_state is None:
        state = batch_zeros(u, (batch, heads, d_inner // heads, d_state), dtype)
    else:
        state = initial_state.astype(dtype).reshape(batch, heads, d_inner // heads, d_state)
    # Nothing to loop over: y is the skip connection, and the state remains.
    if 0 in u.shape or d_state == 0:
        y = jnp.zeros(u.shape, dtype)
    else:
        y, state = _scan_chunks(reverse, u, step_size, A.astype(dtype), B, C, state)
    y = skip_and_gate(y, u, D, z)
    return (y, state.reshape(batch, d_inner, d_state)) if return_final_state else y


def _scan_chunks(
    reverse: bool,
    u: Float[Array, "B L D"],
    step_size: Float[Array, "B L heads"],
    A: Float[Array, " heads"],
    B: Float[Array, "B L N"],
    C: Float[Array, "B L N"],
    state: Float[Array, "B heads channels N"],
) -> tuple[Float[Array, "B L D"], Float[Array, "B heads channels N"]]:
    """Returns y without skip and gate, and the final state, both in the dtype of step_size."""
    batch, length, d_inner = u.shape
    heads, channels = state.shape[1:3]
    steps = min(CHUNK_STEPS, length)
    # Padding at the end in both directions: steps of size zero keep the state and add nothing.
    padding = -length % steps
    factor_dtype = jnp.result_type(u, B, C)

    def chunks(x: Float[Array, "B L _"]) -> Float[Array, "chunks B T _"]:
        x = jnp.pad(x, ((0, 0), (0, padding), (0, 0))) if padding else x
        return jnp.swapaxes(x.reshape(batch, -1, steps, x.shape[2]), 0, 1)

    # The backward pass computes a chunk again from the state before it: the chunk's decays, one per head and pair of
    # steps, would take as much memory as u.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def run(h: Float[Array, "B heads channels N"], chunk: list[Float[Array, "B T _"]]) -> tuple[Array, Array]:
        u, step_size, B, C = chunk
        h, y = _scan_chunk(reverse, A, h, (u.reshape(batch, steps, heads, channels), step_size, B, C))
        return h, y.reshape(batch, steps, d_inner)

    def step(h: Float[Array, "B heads channels N"], chunk: list[Float[Array, "B T _"]]) -> tuple[Array, Array]:
        return checkpoint_name(run(h, chunk), CHECKPOINT_NAME)

    by_chunk = [chunks(x) for x in (u.astype(factor_dtype), step_size, B.astype(factor_dtype), C.astype(factor_dtype))]
    state, y = jax.lax.scan(step, state, by_chunk, reverse=reverse)
    return jnp.swapaxes(y, 0, 1).reshape(batch, -1, d_inner)[:, :length], state


def _scan_chunk(
    reverse: bool, A: Float[Array, " heads"], h: Float[Array, "B heads channels N"], chunk: _Chunk
) -> tuple[Float[Array, "B heads channels N"], Float[Array, "B T heads channels"]]:
    """Returns the state after a chunk, and y.

    Let s_t be the sum of Δ A over the steps of the chunk up to t, in the order of the scan; s_T is that of all steps.

        y_t = exp(s_t) C_t · h + Σ_{r ≤ t} exp(s_t - s_r) Δ_r (C_t · B_r) u_r
        h  <- exp(s_T) h       + Σ_r       exp(s_T - s_r) Δ_r u_r B_r

    Args:
      reverse: direction of the scan.
      A: decay rate of each head.
      h: the state before the chunk.
      chunk: u, Δ, B and C; the dtype of the computation is that of Δ.
    """
    u, step_size, B, C = chunk
    steps, dtype, factor_dtype = u.shape[1], step_size.dtype, u.dtype
    # HIGHEST: by default TPUs and GPUs round float32 factors to bfloat16 or TF32.
    dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=dtype)
    by_head = jnp.swapaxes(step_size, 1, 2)
    sums = jax.lax.cumsum(A[None, :, None] * by_head, axis=2, reverse=reverse)
    total = sums[:, :, :1] if reverse else sums[:, :, -1:]
    # Masked before the exponential, which overflows for later tokens: they would decay backwards in time.
    differences = sums[:, :, :, None] - sums[:, :, None, :]
    is_earlier = jnp.tri(steps, dtype=bool)
    differences = jnp.where((is_earlier.T if reverse else is_earlier)[None, None], differences, -jnp.inf)
    weights = dot("btn,brn->btr", C, B)[:, None] * jnp.exp(differences) * by_head[:, :, None, :]
    y = dot("bhtr,brhe->bthe", weights.astype(factor_dtype), u)
    from_start = jnp.swapaxes(jnp.exp(sums), 1, 2)[..., None]
    y += from_start * dot("btn,bhen->bthe", C, h.astype(factor_dtype))
    to_end = jnp.swapaxes(jnp.exp(total - sums) * by_head, 1, 2)[..., None]
    h = jnp.exp(total)[..., None] * h + dot("bthe,btn->bhen", (to_end * u).astype(factor_dtype), B)
    return h, y


def _check_arguments(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    z: Array | None,
    delta_bias: Array | None,
    initial_state: Array | None,
) -> None:
    """Raises the exceptions of `ssd`. The annotations have no shapes, because this function checks them for users."""
    # u, A and B define the sizes; every other shape follows from them.
    if u.ndim != 3:
        raise ValueError(f"u: got shape {u.shape}, want (batch, length, d_inner)")
    batch, length, d_inner = u.shape
    if A.ndim != 1 or A.shape[0] == 0 or d_inner % A.shape[0]:
        raise ValueError(
            f"A: got shape {A.shape}, want (heads,) where heads divides d_inner = {d_inner} of u {u.shape}"
        )
    (heads,) = A.shape
    if B.ndim != 3:
        raise ValueError(f"B: got shape {B.shape}, want (batch, length, d_state)")
    d_state = B.shape[2]
    wanted = {
        "u": (u, u.shape, "(batch, length, d_inner)"),
        "A": (A, A.shape, "(heads,)"),
        "delta": (delta, (batch, length, heads), "(batch, length, heads)"),
        "B": (B, (batch, length, d_state), "(batch, length, d_state)"),
        "C": (C, (batch, length, d_state), "(batch, length, d_state)"),
        "D": (D, (d_inner,), "(d_inner,)"),
        "z": (z, (batch, length, d_inner), "(batch, length, d_inner)"),
        "delta_bias": (delta_bias, (heads,), "(heads,)"),
        "initial_state": (initial_state, (batch, d_inner, d_state), "(batch, d_inner, d_state)"),
    }
    check_arrays(wanted, f"u {u.shape}, A {A.shape} and B {B.shape}")
