"""A CPU's threads and memory: how many threads compute, what becomes of idle workers, and what the allocator keeps.

torch computes with OpenMP. Each thread of a program that calls torch gets workers of its own, which wait for the next
operation by spinning, so that they start at once. As soon as there are more workers than cores, GNU's OpenMP puts all
of them to sleep instead, and each operation first has to wake them: 40 µs more, 20 times in a small decode step.

A training step allocates the same large tensors again and again. glibc gives every freed block above some size back to
the kernel at once, and then each step pays for zeroed pages (figures: dev/LOG.md, "results that stay in bfloat16").
"""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import sys
import time
from collections.abc import Iterator

import torch

# One thread and all threads are compared again after so many steps, with so many steps each.
TRIAL_EVERY, TRIAL_STEPS = 1024, 7
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_KEPT = 1 << 30  # bytes


def release_workers() -> None:
    """End the OpenMP workers of the calling thread before another thread takes over; they are restarted when needed.

    Does nothing without OpenMP 5.
    """
    with contextlib.suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).omp_pause_resource_all(1)  # 1, "soft": thread-private data survives


def keep_freed_memory() -> None:
    """Let this process keep freed blocks of up to 1 GiB for its next tensors. Does nothing without glibc."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, LARGEST_KEPT)


class ThreadChoice:
    """Runs steps on a CPU with all threads or with one, whichever was faster in the last comparison.

    On a busy machine, small steps lose more by waiting for the slowest thread than they gain by sharing the work.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._steps, self._one_wins = 0, False
        self._seconds: tuple[list[float], list[float]] = [], []  # with all, with one

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """A context for one step."""
        threads = torch.get_num_threads()
        if threads == 1 or self._device != "cpu":
            yield
            return
        at = self._steps % TRIAL_EVERY
        # In a comparison the two take turns, so that other load on the machine hits both alike.
        one = at % 2 == 1 if at < 2 * TRIAL_STEPS else self._one_wins
        if one:
            torch.set_num_threads(1)
        start = time.perf_counter()
        try:
            yield
        finally:
            torch.set_num_threads(threads)
        self._steps += 1
        if at < 2 * TRIAL_STEPS:
            self._seconds[one].append(time.perf_counter() - start)
        if at == 2 * TRIAL_STEPS - 1:
            with_all, with_one = (statistics.median(seconds) for seconds in self._seconds)
            self._one_wins = with_one < with_all
            self._seconds = [], []
