"""Operations that know nothing of faces: arrays in, arrays out. They depend on JAX and jaxtyping alone."""

from kernels.depthwise_conv import depthwise_conv2d
from kernels.selective_scan import selective_scan, sequence_parallel_scan

__all__ = ["depthwise_conv2d", "selective_scan", "sequence_parallel_scan"]
