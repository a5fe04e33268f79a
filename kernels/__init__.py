"""Array operations with their own gradients. They depend on JAX and jaxtyping alone and do not know the model."""

from .depthwise_conv import depthwise_conv2d
from .selective_scan import selective_scan, sequence_parallel_scan
from .ssd import ssd

__all__ = ["depthwise_conv2d", "selective_scan", "sequence_parallel_scan", "ssd"]
