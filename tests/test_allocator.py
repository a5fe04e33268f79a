"""A program on a CPU keeps the memory that it frees."""

import subprocess
import sys
import textwrap

import pytest

SCRIPT = textwrap.dedent(
    """
    import resource, sys
    from sisma_jax.allocator import keep_freed_memory
    if sys.argv[1] == "keep":
        keep_freed_memory()
    import numpy as np
    def faults():
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**24)  # 128 MiB
    before = faults()
    for _ in range(5):
        np.ones(2**24)
    print(faults() - before)
    """
)


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are those of glibc")
def test_memory_is_not_cleared_again():
    def faults(choice: str) -> int:
        return int(subprocess.run([sys.executable, "-c", SCRIPT, choice], capture_output=True, check=True).stdout)

    # 32,768 pages of 4 KiB, or 64 of 2 MiB, in each of five calls.
    assert faults("keep") < 0.1 * faults("default")
