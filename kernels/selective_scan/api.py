"""The public selective scan: it checks the arguments, selects an implementation and calls it."""

import functools
import logging
from types import MappingProxyType
from typing import Literal, overload

import jax

from ..arguments import check_arrays
from ..partition import split_scan
from ..typing import Array, Float, ScanArguments
from .associative import selective_scan_associative
from .mosaic_gpu import check_supported_by_mosaic_gpu, device_runs_mosaic_gpu, selective_scan_mosaic_gpu
from .pallas_gpu import check_supported_by_pallas_gpu, selective_scan_pallas_gpu
from .pallas_tpu import check_supported_by_pallas_tpu, selective_scan_pallas_tpu
from .reference import selective_scan_reference
from .xla import selective_scan_xla

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = MappingProxyType(
    {
        "pallas_tpu": selective_scan_pallas_tpu,
        "mosaic_gpu": selective_scan_mosaic_gpu,
        "pallas_gpu": selective_scan_pallas_gpu,
        "xla": selective_scan_xla,
        "associative": selective_scan_associative,
        "reference": selective_scan_reference,
    }
)

# Each check raises NotImplementedError for arguments that its implementation does not support. Implementations that are
# not listed support all arguments. The listed ones are kernels, which XLA cannot partition.
SUPPORT_CHECKS = MappingProxyType(
    {
        "pallas_tpu": check_supported_by_pallas_tpu,
        "mosaic_gpu": check_supported_by_mosaic_gpu,
        "pallas_gpu": check_supported_by_pallas_gpu,
    }
)

# Whether the default backend's device runs a kernel, which `implementation=None` also asks. A name may be given to
# compile for another device.
DEVICE_CHECKS = MappingProxyType({"mosaic_gpu": device_runs_mosaic_gpu})

# What `implementation=None` means for each `jax.default_backend()`, in order of preference. The last one is portable.
PREFERENCE = MappingProxyType(
    {"cpu": ("xla",), "tpu": ("pallas_tpu", "xla"), "gpu": ("mosaic_gpu", "pallas_gpu", "xla")}
)


@overload
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
    return_final_state: Literal[False] = False,
    implementation: str | None = None,
) -> Float[Array, "B L D"]: ...


@overload
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
    return_final_state: Literal[True],
    implementation: str | None = None,
) -> tuple[Float[Array, "B L D"], Float[Array, "B D N"]]: ...


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
    """Returns y, the output of a diagonal state-space model whose parameters depend on the token.

        Δ_t = softplus(delta_t + delta_bias)        (no softplus if delta_softplus is False)
        h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t
        y_t = (C_t · h_t + D u_t) silu(z_t)

    Inputs are bfloat16, float32 or float64. Exponentials, states and sums are float32, or float64 if one of u, delta,
    A, B and C is float64. The function is differentiable in every array argument, in forward and reverse mode and
    to any order; `jax.checkpoint` finds outputs and saved states by the name `CHECKPOINT_NAME`. The arguments are
    independent of each other: B and delta may be computed from one sequence, C and z from another.

    XLA cannot partition Pallas kernels. Under `jax.jit` with a sharded batch, set the mesh with `jax.set_mesh(mesh)`:
    each device then scans its part of the batch, and its part of the channels if the batch has too few examples for all
    devices. If the sequence is sharded, use `sequence_parallel_scan`.

    Args:
      u: input of the scan, (batch, length, d_inner). The length may be zero.
      delta: step sizes before bias and softplus, with the shape of u.
      A: diagonal of each channel's state matrix, (d_inner, d_state); negative for states that decay.
      B: input matrix of each token, (batch, length, d_state), shared by the channels.
      C: output matrix of each token, (batch, length, d_state), shared by the channels.
      D: skip weight of each channel, (d_inner,); no skip connection if None.
      z: gate before its SiLU, with the shape of u; no gate if None.
      delta_bias: added to delta, (d_inner,).
      delta_softplus: apply a softplus, which makes the step sizes positive.
      reverse: scan from the last token to the first.
      initial_state: state before the first scanned token, (batch, d_inner, d_state); zeros if None.
      return_final_state: also return the state after the last scanned token.
      implementation: "pallas_tpu" (a kernel for TPUs), "mosaic_gpu" (for CUDA GPUs with compute capability 9 or 10),
        "pallas_gpu" (for older ones, by Triton), "xla" (chunked; little memory; any platform), "associative" (parallel
        over the sequence; much memory) or "reference" (one step at a time). None selects the default
        backend's first preference that supports the arguments; give a name to compile ahead of time for another
        platform.

    Returns:
      y, with the shape and dtype of u. If return_final_state, the pair (y, final_state), where final_state is
      (batch, d_inner, d_state) in the dtype of the computation.

    Raises:
      ValueError: the shapes do not match, a dtype is not floating-point, or the implementation's name is unknown.
      NotImplementedError: the named implementation does not support the arguments, for example float64.
    """
    arguments = ScanArguments(
        u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=initial_state
    )
    check_arguments(**arguments)
    if implementation is None:
        implementation = _preferred(arguments)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation: got {implementation!r}, want one of {', '.join(map(repr, IMPLEMENTATIONS))} "
            "or None for the platform's preference"
        )
    scan = functools.partial(IMPLEMENTATIONS[implementation], delta_softplus=delta_softplus, reverse=reverse)
    # XLA partitions the other implementations by itself.
    is_kernel = implementation in SUPPORT_CHECKS
    y, final_state = split_scan(scan, arguments) if is_kernel else scan(**arguments)
    return (y, final_state) if return_final_state else y


def kernels_for_device() -> tuple[str, ...]:
    """Returns the names of the kernels that run on the default backend's device, in order of preference."""
    names = PREFERENCE.get(jax.default_backend(), ("xla",))[:-1]
    return tuple(name for name in names if name not in DEVICE_CHECKS or DEVICE_CHECKS[name]())


def _preferred(arguments: ScanArguments) -> str:
    """The name of the default backend's first preference that supports the arguments."""
    portable = PREFERENCE.get(jax.default_backend(), ("xla",))[-1]
    for name in kernels_for_device():
        try:
            SUPPORT_CHECKS[name](**arguments)
        except NotImplementedError as error:
            _log_once(f"selective_scan uses {portable!r} instead of {name!r}: {error}")
        else:
            return name
    return portable


@functools.cache
def _log_once(message: str) -> None:
    # Cached, because models trace the scan once per layer.
    logger.warning(message)


def check_arguments(
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
    """Checks the shapes and dtypes of the array arguments of `selective_scan`; see there for their meaning.

    The annotations have no shapes, because this function is the one that checks them for users.

    Args:
      u: wanted shape (batch, length, d_inner), which gives these three sizes.
      delta: wanted shape (batch, length, d_inner).
      A: wanted shape (d_inner, d_state), which gives d_state.
      B: wanted shape (batch, length, d_state).
      C: wanted shape (batch, length, d_state).
      D: wanted shape (d_inner,), or None.
      z: wanted shape (batch, length, d_inner), or None.
      delta_bias: wanted shape (d_inner,), or None.
      initial_state: wanted shape (batch, d_inner, d_state), or None.

    Raises:
      ValueError: a shape does not match the others, or a dtype is not floating-point.
    """
    # u and A define the sizes; every other shape follows from them.
    if u.ndim != 3:
        raise ValueError(f"u: got shape {u.shape}, want (batch, length, d_inner)")
    batch, length, d_inner = u.shape
    if A.ndim != 2 or A.shape[0] != d_inner:
        raise ValueError(f"A: got shape {A.shape}, want (d_inner, d_state) with d_inner = {d_inner} as in u {u.shape}")
    d_state = A.shape[1]
    wanted = {
        "u": (u, u.shape, "(batch, length, d_inner)"),
        "A": (A, A.shape, "(d_inner, d_state)"),
        "delta": (delta, (batch, length, d_inner), "(batch, length, d_inner)"),
        "B": (B, (batch, length, d_state), "(batch, length, d_state)"),
        "C": (C, (batch, length, d_state), "(batch, length, d_state)"),
        "D": (D, (d_inner,), "(d_inner,)"),
        "z": (z, (batch, length, d_inner), "(batch, length, d_inner)"),
        "delta_bias": (delta_bias, (d_inner,), "(d_inner,)"),
        "initial_state": (initial_state, (batch, d_inner, d_state), "(batch, d_inner, d_state)"),
    }
    check_arrays(wanted, f"u {u.shape} and A {A.shape}")
