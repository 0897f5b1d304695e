"""The C library's memory allocator, as a program that trains wants it."""

import ctypes
import platform

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep freed memory in the process instead of handing it back page by page.

    By default glibc maps each large tensor afresh, and the kernel clears every page of it again,
    forward and backward, batch after batch. This concerns the whole process, so it is for programs
    to ask for, never for a library. Returns whether the C library is glibc and took the settings.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, LARGEST))
