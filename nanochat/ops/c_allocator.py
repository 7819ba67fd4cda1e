"""Memory of tensors on a CPU: glibc gives every freed block above some size back to the kernel at once.

A training step allocates the same large tensors again and again, and then pays for the kernel's zeroed pages each time
(figures: dev/LOG.md, "results that stay in bfloat16").
"""

from __future__ import annotations

import contextlib
import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_KEPT = 1 << 30  # bytes


def keep_freed_memory() -> None:
    """Keep freed blocks up to 1 GiB for the next tensors of this process. Does nothing without glibc."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, LARGEST_KEPT)
