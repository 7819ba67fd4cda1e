"""A CPU's threads and memory: how many threads compute, where their workers wait, and what the allocator keeps.

torch computes with OpenMP. Each thread of a program that calls torch gets workers of its own, which wait for the next
operation by spinning, so that they start at once. As soon as there are more workers than cores, GNU's OpenMP lets all
of them sleep instead, and each operation first has to wake them: 40 µs more, which a small decode step pays 20 times.

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

# Steps between two comparisons of one thread and all, and how many steps each gets.
TRIAL_EVERY, TRIAL_STEPS = 1024, 7
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_KEPT = 1 << 30  # bytes


def release_workers() -> None:
    """Send home the workers of the calling thread, before another thread takes over; they come back when needed.

    Does nothing where OpenMP can't do it (before version 5) or is not there.
    """
    with contextlib.suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).omp_pause_resource_all(1)  # 1: what they have set up stays as it is


def keep_freed_memory() -> None:
    """Keep freed blocks up to 1 GiB for the next tensors of this process. Does nothing without glibc."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, LARGEST_KEPT)


class ThreadChoice:
    """Runs a CPU's steps with all threads or with one, whichever was faster lately.

    On a busy machine small steps lose more by waiting for each other's threads than they gain by sharing the work.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._steps, self._one_wins = 0, False
        self._seconds: tuple[list[float], list[float]] = [], []  # with all, with one

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """One step."""
        threads = torch.get_num_threads()
        if threads == 1 or self._device != "cpu":
            yield
            return
        at = self._steps % TRIAL_EVERY
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
