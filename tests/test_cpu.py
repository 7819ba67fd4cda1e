"""Threads follow what was faster and are put back after every step; freed memory is used again without new pages."""

import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from nanochat.ops import cpu
from nanochat.ops.cpu import TRIAL_EVERY, TRIAL_STEPS, ThreadChoice, release_workers

FAULTS = """
import ctypes
import resource
from nanochat.ops.cpu import keep_freed_memory
if {keep}:
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def faults_of_a_block():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(48 << 20)
    libc.memset(block, 1, 48 << 20)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults_of_a_block()
print(faults_of_a_block())
"""


@pytest.fixture
def clock(monkeypatch):
    """Two threads, and a clock that only `run` moves."""
    now = [0.0]
    monkeypatch.setattr(cpu, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield now
    torch.set_num_threads(before)


def run(choice, clock, steps, seconds):
    """The number of threads in each of some steps that take `seconds[threads]`."""
    used = []
    for _ in range(steps):
        with choice():
            used.append(torch.get_num_threads())
            clock[0] += seconds[used[-1]]
        assert torch.get_num_threads() == 2
    return used


def test_the_faster_number_wins_until_the_next_comparison(clock):
    choice = ThreadChoice()
    used = run(choice, clock, TRIAL_EVERY, {1: 1.0, 2: 3.0})
    assert used[: 2 * TRIAL_STEPS] == [2, 1] * TRIAL_STEPS
    assert set(used[2 * TRIAL_STEPS :]) == {1}
    used = run(choice, clock, TRIAL_EVERY, {1: 3.0, 2: 1.0})
    assert set(used[2 * TRIAL_STEPS :]) == {2}


def test_a_step_that_fails_leaves_the_number_as_it_was(clock):
    choice = ThreadChoice()
    run(choice, clock, 1, {1: 1.0, 2: 1.0})

    def fail():
        with choice():
            raise ValueError("failed")

    with pytest.raises(ValueError, match="failed"):
        fail()
    assert torch.get_num_threads() == 2


def test_work_goes_on_after_the_workers_were_released(clock):
    x = torch.randn(300, 300)
    expected = x @ x
    release_workers()
    results = [x @ x]
    thread = threading.Thread(target=lambda: results.append(x @ x))
    thread.start()
    thread.join()
    assert all(torch.equal(r, expected) for r in results)


def faults(keep):
    done = subprocess.run([sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's switches")
def test_freed_memory_is_kept():
    assert faults(keep=False) >= 20  # 12288, or 24 where the kernel gives pages of 2 MiB
    assert faults(keep=True) < 10
