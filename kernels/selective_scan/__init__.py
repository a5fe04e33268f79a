"""The selective scan of Mamba (Gu & Dao, arXiv 2312.00752): one public function, several implementations."""

from kernels.selective_scan.api import selective_scan

__all__ = ["selective_scan"]
