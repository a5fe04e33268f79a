"""The public selective scan: checks the arguments, picks an implementation and calls it."""

import functools
import logging
from types import MappingProxyType

import jax

from kernels.partition import split_scan
from kernels.selective_scan.associative import selective_scan_associative
from kernels.selective_scan.pallas_gpu import check_supported_by_pallas_gpu, selective_scan_pallas_gpu
from kernels.selective_scan.pallas_tpu import check_supported_by_pallas_tpu, selective_scan_pallas_tpu
from kernels.selective_scan.reference import selective_scan_reference
from kernels.selective_scan.xla import selective_scan_xla
from kernels.typing import Array, Float

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = MappingProxyType(
    {
        "pallas_tpu": selective_scan_pallas_tpu,
        "pallas_gpu": selective_scan_pallas_gpu,
        "xla": selective_scan_xla,
        "associative": selective_scan_associative,
        "reference": selective_scan_reference,
    }
)

# Raise NotImplementedError for arguments that their implementation does not take; the others take all.
SUPPORT_CHECKS = MappingProxyType(
    {"pallas_tpu": check_supported_by_pallas_tpu, "pallas_gpu": check_supported_by_pallas_gpu}
)

# What `implementation=None` means on each `jax.default_backend()`, the first choice first.
PREFERENCE = MappingProxyType({"cpu": ("xla",), "tpu": ("pallas_tpu", "xla"), "gpu": ("pallas_gpu", "xla")})


def selective_scan(
    u: Float[Array, "B L D"],
    delta: Float[Array, "B L D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B L N"],
    C: Float[Array, "B L N"],
    D: Float[Array, " D"] | None = None,
    z: Float[Array, "B L D"] | None = None,
    delta_bias: Float[Array, " D"] | None = None,
    *,
    delta_softplus: bool = False,
    reverse: bool = False,
    initial_state: Float[Array, "B D N"] | None = None,
    return_final_state: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B L D"] | tuple[Float[Array, "B L D"], Float[Array, "B D N"]]:
    """Returns y, the output of a diagonal state-space model whose parameters change with the token.

        Δ_t = softplus(delta_t + delta_bias)        without the softplus unless delta_softplus
        h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t
        y_t = (C_t · h_t + D u_t) silu(z_t)

    Inputs may be bfloat16, float32 or float64. Exponentials, states and sums are float32, or float64 when one of u,
    delta, A, B, C is float64. Differentiable in every array argument. No two of them need share an origin: B and delta
    may be computed from one sequence and C and z from another.

    Args:
      u: the scan's input, (batch, length, d_inner). Any length, zero included.
      delta: step sizes before bias and softplus, of u's shape.
      A: the state matrix's diagonal for each channel, (d_inner, d_state); negative where states decay.
      B: input matrix of each token, (batch, length, d_state), shared by the channels.
      C: output matrix of each token, (batch, length, d_state), shared by the channels.
      D: skip weight of each channel, (d_inner,).
      z: the gate before its SiLU, of u's shape.
      delta_bias: added to delta, (d_inner,).
      delta_softplus: whether a softplus makes the step sizes positive.
      reverse: scan from the last token to the first.
      initial_state: the state before the first scanned token, (batch, d_inner, d_state); zeros if None.
      return_final_state: whether to return the state after the last scanned token too.
      implementation: "pallas_tpu" and "pallas_gpu" (kernels for these platforms), "xla" (chunked; little memory, any
        platform), "associative" (parallel over the sequence; much memory), "reference" (one step at a time). None
        takes the first that the default backend prefers and that supports the arguments; name one to compile ahead
        of time for another platform.

    Kernels are opaque to XLA, which cannot split them over devices. Under `jax.jit` with a sharded batch they want the
    mesh in context, `jax.set_mesh(mesh)`: then each device scans its part of the batch, and of the channels where the
    batch has too few examples. For a sequence that is split see `sequence_parallel_scan`.

    Returns:
      y, of u's shape and type; with return_final_state the pair (y, final_state), the state being
      (batch, d_inner, d_state) in the type of the computation.

    Raises:
      ValueError: a shape does not fit, or there is no implementation of that name.
      NotImplementedError: the named implementation does not take such arguments, float64 for example.
    """
    check_arguments(u, delta, A, B, C, D, z, delta_bias, initial_state)
    arguments = {
        "u": u,
        "delta": delta,
        "A": A,
        "B": B,
        "C": C,
        "D": D,
        "z": z,
        "delta_bias": delta_bias,
        "initial_state": initial_state,
    }
    if implementation is None:
        implementation = _preferred(arguments)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation: got {implementation!r}, want one of {', '.join(map(repr, IMPLEMENTATIONS))} "
            "or None for the platform's preference"
        )
    scan = functools.partial(IMPLEMENTATIONS[implementation], delta_softplus=delta_softplus, reverse=reverse)
    is_kernel = implementation in SUPPORT_CHECKS
    y, final_state = split_scan(scan, arguments) if is_kernel else scan(**arguments)
    return (y, final_state) if return_final_state else y


def _preferred(arguments):
    *kernels, portable = PREFERENCE.get(jax.default_backend(), ("xla",))
    for name in kernels:
        try:
            SUPPORT_CHECKS[name](**arguments)
        except NotImplementedError as error:
            _log_once(f"selective_scan takes {portable!r} instead of {name!r}: {error}")
        else:
            return name
    return portable


@functools.cache
def _log_once(message):
    logger.warning(message)


def check_arguments(u, delta, A, B, C, D, z, delta_bias, initial_state) -> None:
    """Raises ValueError for a shape that does not fit the others, or a type that is not floating-point."""
    if u.ndim != 3:
        raise ValueError(f"u: got shape {u.shape}, want (batch, length, d_inner)")
    batch, length, d_inner = u.shape
    if A.ndim != 2 or A.shape[0] != d_inner:
        raise ValueError(f"A: got shape {A.shape}, want (d_inner, d_state) with d_inner = {d_inner} as in u {u.shape}")
    d_state = A.shape[1]
    wanted = {
        "delta": (delta, (batch, length, d_inner), "(batch, length, d_inner)"),
        "B": (B, (batch, length, d_state), "(batch, length, d_state)"),
        "C": (C, (batch, length, d_state), "(batch, length, d_state)"),
        "D": (D, (d_inner,), "(d_inner,)"),
        "z": (z, (batch, length, d_inner), "(batch, length, d_inner)"),
        "delta_bias": (delta_bias, (d_inner,), "(d_inner,)"),
        "initial_state": (initial_state, (batch, d_inner, d_state), "(batch, d_inner, d_state)"),
    }
    for name, (array, shape, axes) in wanted.items():
        if array is not None and array.shape != shape:
            raise ValueError(
                f"{name}: got shape {array.shape}, want {shape}, that is {axes} given u {u.shape}, A {A.shape}"
            )
    for name, array in {"u": u, "A": A, **{name: array for name, (array, _, _) in wanted.items()}}.items():
        if array is not None and not jax.numpy.issubdtype(array.dtype, jax.numpy.floating):
            raise ValueError(f"{name}: got dtype {array.dtype}, want a real floating-point type")
