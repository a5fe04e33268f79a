"""The selective scan of Mamba (Gu & Dao, arXiv 2312.00752): one public function, several implementations.

`selective_scan` scans a sequence that is complete on each device. `sequence_parallel_scan` scans a sequence that is
sharded over a mesh axis.
"""

from .api import selective_scan
from .reference import CHECKPOINT_NAME
from .sequence_parallel import sequence_parallel_scan

__all__ = ["CHECKPOINT_NAME", "selective_scan", "sequence_parallel_scan"]
