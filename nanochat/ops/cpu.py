"""A CPU's threads and memory: how many threads compute, what becomes of idle workers, and what the allocator keeps.

torch computes with OpenMP. Each thread of a program that calls torch gets workers of its own, which wait for the next
operation by spinning, so that they start at once. As soon as there are more workers than cores, GNU's OpenMP puts all
of them to sleep instead, and each operation first has to wake them: 40 µs more, 20 times in a small decode step.

Neither is right everywhere. On a machine that has nothing else to do, a core that goes to sleep must be woken, and
training took up to twice as long. Beside another program, a thread that spins takes its core from the thread that it
waits for, and training fell to a tenth. So `WaitingPolicy` lets them spin until other programs want the cores.

A training step allocates the same large tensors again and again. glibc gives every freed block above some size back to
the kernel at once, and then each step pays for zeroed pages (figures: dev/LOG.md, "results that stay in bfloat16").
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

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


# --- waiting ----------------------------------------------------------------------------------------------------------

LOOK_SECONDS = 0.2  # between two looks at how long this process waits for cores
# Threads that are ready and have no core, on average. A spinning team beside one other program has 2/3 on two cores and
# nearly 1 on many; one that sleeps at once about a half. On a machine of its own it has 0.01.
CONTENDED, CALM = 0.2, 0.05
NEWEST = 0.25  # weight of a look in the mean
MOST_CORES = 128  # the sleeping team has a thread for each
FIRST_PATIENCE, MOST_PATIENCE = 2.0, 60.0  # seconds of calm before the threads may spin again
HELPER = "nanochat-helper"  # name of a thread that works for those that compute, such as a loader's


class RunDelay:
    """Counts the seconds for which threads of this process were ready while other programs had their cores.

    A loader's thread also takes cores from those that compute, a little at a time. Taken for another program it put
    them to sleep, and a model with many conversations to draw trained at half its speed.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, int]] = {}  # nanoseconds on a core and waiting for one, of each thread
        self._last, self._total = time.monotonic(), 0.0

    def __call__(self) -> float | None:
        """The seconds since the first call; None where the kernel doesn't say."""
        helpers = {str(thread.native_id) for thread in threading.enumerate() if thread.name == HELPER}
        now: dict[str, tuple[int, int]] = {}
        with contextlib.suppress(OSError):
            for task in os.listdir("/proc/self/task"):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread may end on the way
                    on_core, waited = Path(f"/proc/self/task/{task}/schedstat").read_text(encoding="ascii").split()[:2]
                    now[task] = int(on_core), int(waited)
        if not now:
            return None
        before, self._seen = self._seen, now
        last, self._last = self._last, time.monotonic()
        known = now.keys() & before.keys()
        helped = sum(now[task][0] - before[task][0] for task in known & helpers) / 1e9
        waited_for = sum(now[task][1] - before[task][1] for task in known - helpers) / 1e9
        # Not more than this: on a machine with cores to spare a busy helper has its own and takes nothing.
        helped = min(helped, CONTENDED * (self._last - last))
        self._total += max(0.0, waited_for - helped)
        return self._total


class SleepingTeam:
    """While it is held, GNU's OpenMP has more workers than cores: then none of them spins for more than 100 rounds.

    GOMP_SPINCOUNT of its manual. Nothing else lets a program change how they wait after its start.
    """

    def __init__(self) -> None:
        self._release: threading.Event | None = None

    def hold(self) -> None:
        """Make the workers, which sleep until `let_go`."""
        if self._release is None:
            self._release = threading.Event()
            threading.Thread(target=self._keep, args=(self._release,), daemon=True).start()

    def let_go(self) -> None:
        """End them."""
        if self._release is not None:
            self._release.set()
            self._release = None

    @staticmethod
    def _keep(release: threading.Event) -> None:
        openmp = ctypes.CDLL(None)
        nothing = ctypes.cast(openmp.getpid, ctypes.c_void_p)  # what each worker does once: a harmless C function
        # A team belongs to the thread that started it, and ends with it.
        openmp.GOMP_parallel(nothing, None, openmp.omp_get_num_procs() + 1, 0)
        release.wait()


class WaitingPolicy:
    """Lets OpenMP's workers spin while this process has the cores to itself, and sleep beside other programs."""

    def __init__(self, team: SleepingTeam, now: Callable[[], float] = time.monotonic) -> None:
        self._team, self._now = team, now
        self.patient = False
        """True while the workers sleep."""
        self._patience = FIRST_PATIENCE
        self._before: tuple[float, float] | None = None  # time and delay at the last look
        self._mean = 0.0  # of threads that waited, over a second or so: for a moment every machine has something else
        self._calm_since = self._spinning_since = now()

    def look(self, delay: float) -> None:
        """Decide by what a `RunDelay` has counted."""
        now = self._now()
        before, self._before = self._before, (now, delay)
        if before is None or now <= before[0]:
            return
        waiting = (delay - before[1]) / (now - before[0])
        self._mean += (waiting - self._mean) * NEWEST
        if waiting > CALM:
            self._calm_since = now
        if not self.patient and self._mean > CONTENDED:
            # Each time it was wrong to spin again so soon, wait longer before the next try.
            soon = now - self._spinning_since < 2 * self._patience
            self._patience = min(MOST_PATIENCE, 2 * self._patience) if soon else FIRST_PATIENCE
            self.patient = True
            self._team.hold()
        elif self.patient and now - self._calm_since >= self._patience:
            self.patient, self._spinning_since, self._mean = False, now, 0.0
            self._team.let_go()


_watching: threading.Thread | None = None


def watch_cores() -> None:
    """From now on let OpenMP's workers of this process wait as suits the machine, see `WaitingPolicy`.

    Does nothing where the environment says how they wait, with another OpenMP than GNU's, or without Linux's schedstat.
    """
    global _watching
    told = any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"))
    if _watching is not None or told or torch.get_num_threads() == 1 or RunDelay()() is None:
        return
    with contextlib.suppress(OSError, TypeError, AttributeError):  # as where torch has another OpenMP
        openmp = ctypes.CDLL(None)
        if hasattr(openmp, "GOMP_parallel") and openmp.omp_get_num_procs() <= MOST_CORES:
            _watching = threading.Thread(target=_watch, daemon=True)
            _watching.start()


def _watch() -> None:
    policy, delay = WaitingPolicy(SleepingTeam()), RunDelay()
    while True:
        time.sleep(LOOK_SECONDS)
        waited = delay()
        if waited is not None:
            policy.look(waited)


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
