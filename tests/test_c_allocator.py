"""Freed tensors are used again without asking the kernel for new pages."""

import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from nanochat.c_allocator import keep_freed_memory
if {keep}:
    keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    a = [torch.full((4 << 20,), 1.0) for _ in range(3)]  # 16 MiB each
    return sum(t[0] for t in a)
for _ in range(3):
    step()
before = faults()
for _ in range(4):
    step()
print(faults() - before)
"""


def faults(keep):
    done = subprocess.run([sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's switches")
def test_freed_memory_is_kept():
    given_back, kept = faults(keep=False), faults(keep=True)
    assert kept < 0.2 * max(given_back, 5000)
