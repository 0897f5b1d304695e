"""Settings of the C library's memory allocator for training."""

import ctypes
import platform

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep freed memory in the process, instead of returning it to the kernel.

    By default glibc maps new memory for each large tensor, and the kernel clears every page of it,
    in each pass of each batch. The setting applies to the whole process, so only programs should
    call this, never libraries. Returns whether the C library is glibc and accepted the settings.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, LARGEST))
