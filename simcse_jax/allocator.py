"""The C library's allocator, told to keep what is freed."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3)


def keep_freed_memory() -> None:
    """Lets this process keep memory that it frees, for its next step, instead of returning it to the system.

    XLA asks the C library for the temporaries of a CPU program in every call. glibc maps and unmaps blocks as large as
    those, and the kernel clears each page anew. Does nothing where the C library is another.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)
