"""Peak rates of devices by their vendors' data sheets, the work of an operation, and its time at the peak rates."""

import dataclasses
from typing import TypedDict


@dataclasses.dataclass(frozen=True)
class Peaks:
    """Peak rates of a device, per second.

    Attributes:
      num_bytes: bytes of device memory (HBM) read or written.
      matmul_flops: floating-point operations in dense bfloat16 matrix products.
      vector_flops: floating-point operations of the float32 units outside matrix products; None if not published.
      exponentials: float32 exponentials in hardware; None if not published.
    """

    num_bytes: float
    matmul_flops: float
    vector_flops: float | None = None
    exponentials: float | None = None


def _hopper(num_bytes: float, matmul_flops: float, vector_flops: float) -> Peaks:
    # A multiprocessor has 128 float32 lanes, each with 2 FLOP per cycle, and computes 16 exponentials per cycle (CUDA
    # programming guide, arithmetic instructions, compute capability 9.0).
    return Peaks(num_bytes, matmul_flops, vector_flops, vector_flops / 16)


def _ampere(num_bytes: float) -> Peaks:
    # As above with 64 lanes, compute capability 8.0.
    return Peaks(num_bytes, 312e12, 19.5e12, 19.5e12 / 8)


_V5E, _V5P, _V6E = Peaks(819e9, 197e12), Peaks(2765e9, 459e12), Peaks(1640e9, 918e12)

PEAKS = {
    "NVIDIA H100 80GB HBM3": _hopper(3.35e12, 989e12, 67e12),
    "NVIDIA H100 PCIe": _hopper(2.0e12, 756e12, 51e12),
    "NVIDIA H200": _hopper(4.8e12, 989e12, 67e12),
    "NVIDIA A100-SXM4-40GB": _ampere(1.555e12),
    "NVIDIA A100-PCIE-40GB": _ampere(1.555e12),
    "NVIDIA A100-SXM4-80GB": _ampere(2.039e12),
    "NVIDIA A100 80GB PCIe": _ampere(1.935e12),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
}
"""By `jax.Device.device_kind`. GPUs: NVIDIA's data sheets. TPUs: https://cloud.google.com/tpu/docs, which does not give
the rates of the vector units."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What every implementation of an operation has to do at least.

    Attributes:
      num_bytes: arguments read once and results written once.
      matmul_flops: floating-point operations in matrix products.
      vector_flops: other floating-point operations.
      exponentials: number of exponentials.
    """

    num_bytes: int
    matmul_flops: int = 0
    vector_flops: int = 0
    exponentials: int = 0


class Roofline(TypedDict):
    """The JSON record of a lower bound: the time that each kind of work takes at its peak rate, and the longest."""

    secs_by_bound: dict[str, float]
    bound: str
    secs: float


def roofline(work: Work, device_kind: str) -> Roofline | None:
    """Returns the lower bound on the time of an operation, or None if the device's peak rates are not known.

    Args:
      work: of the operation.
      device_kind: as `jax.Device.device_kind`.
    """
    if (peaks := PEAKS.get(device_kind)) is None:
        return None
    rates = {
        "bytes": (work.num_bytes, peaks.num_bytes),
        "matmul": (work.matmul_flops, peaks.matmul_flops),
        "vector": (work.vector_flops, peaks.vector_flops),
        "exp": (work.exponentials, peaks.exponentials),
    }
    secs = {bound: amount / rate for bound, (amount, rate) in rates.items() if rate is not None and amount}
    longest = max(secs, key=lambda bound: secs[bound])
    return {"secs_by_bound": secs, "bound": longest, "secs": secs[longest]}


def scan_work(batch: int, length: int, d_inner: int, d_state: int, itemsize: int, *, backward: bool) -> Work:
    """Returns the work of `selective_scan` with D, delta_bias and a softplus, as the denoiser calls it.

    Per state and step, the forward pass takes 6 operations: Δ A; Δu B; h = decay h + Δu B; C h. The backward pass
    computes decays and states again, since to keep them would move d_state times the bytes of u, which takes 4 of these
    and the exponential; and 14 more: the adjoint g = decay g + C dy (3), and the products and sums of the gradients of
    C, B and Δu (2 each), and of the decay, Δ and A (5).

    Args:
      batch: number of sequences.
      length: tokens per sequence.
      d_inner: channels.
      d_state: states per channel.
      itemsize: bytes per entry of u, delta, B and C.
      backward: include the backward pass.
    """
    sequence, states = batch * length * d_inner, batch * length * d_inner * d_state
    moved = itemsize * (3 * sequence + 2 * batch * length * d_state) + 4 * d_inner * (d_state + 2)
    if not backward:
        return Work(moved, vector_flops=6 * states, exponentials=states)
    # Backward: the inputs again and the cotangent in place of y, and a gradient of each input.
    return Work(
        2 * moved + itemsize * 2 * (sequence + batch * length * d_state),
        vector_flops=24 * states,
        exponentials=2 * states,
    )


def attention_work(batch: int, length: int, channels: int, heads: int, itemsize: int, *, backward: bool) -> Work:
    """Returns the work of softmax attention that does not keep its weights, such as flash attention.

    Args:
      batch: number of sequences.
      length: tokens per sequence.
      channels: of a token, in all heads.
      heads: number of heads.
      itemsize: bytes per entry.
      backward: include the backward pass, with five matrix products for the two of the forward pass.
    """
    sequence, scores = itemsize * batch * length * channels, batch * heads * length**2
    products = 7 if backward else 2
    return Work(
        (12 if backward else 4) * sequence,
        matmul_flops=products * 2 * batch * length**2 * channels,
        exponentials=(2 if backward else 1) * scores,
    )
