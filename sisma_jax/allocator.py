"""Memory of XLA's CPU backend: settings of the C library's allocator, which a program may choose and a library not."""

import ctypes
import importlib.util
import sys

# Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
# Packages that bring an accelerator to JAX.
_ACCELERATORS = ("libtpu", "jax_plugins")


def keep_freed_memory() -> None:
    """Lets the process keep the memory that it frees, where JAX computes on the CPU with glibc.

    XLA's CPU backend allocates the temporaries of a program in every call, hundreds of MiB for a training step. By
    default, glibc returns them to the kernel, which then has to clear every page again: a third of the processor time
    of a step. The peak of the memory rises by about half.

    It must be called before JAX creates its backend, whose threads have their own pools of memory otherwise.
    """
    if sys.platform != "linux" or any(map(importlib.util.find_spec, _ACCELERATORS)):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries have none
        for parameter, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1)):
            mallopt(parameter, value)
