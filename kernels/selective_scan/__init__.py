"""The selective scan of Mamba (Gu & Dao, arXiv 2312.00752): one public function, several implementations.

Another takes the parts of a sequence that is split over devices.
"""

from kernels.selective_scan.api import selective_scan
from kernels.selective_scan.sequence_parallel import sequence_parallel_scan

__all__ = ["selective_scan", "sequence_parallel_scan"]
