"""Threads follow what was faster and are put back after every step; freed memory is used again without new pages."""

import os
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from nanochat.ops import cpu
from nanochat.ops.cpu import (
    CONTENDED,
    FIRST_PATIENCE,
    LOOK_SECONDS,
    MOST_PATIENCE,
    TRIAL_EVERY,
    TRIAL_STEPS,
    RunDelay,
    ThreadChoice,
    WaitingPolicy,
    release_workers,
    watch_cores,
)

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


HOLD = """
import os
import time
import torch
from nanochat.ops.cpu import SleepingTeam
torch.set_num_threads(2)
a = torch.randn(500, 500)
def spinning():
    a @ a
    start = time.process_time()
    time.sleep(0.1)
    return time.process_time() - start
def threads():
    time.sleep(0.05)
    return len(os.listdir("/proc/self/task"))
team, first = SleepingTeam(), a @ a
for attempt in range(20):  # beside other work a spinning thread may get no core
    before, spun = threads(), spinning()
    team.hold()
    held, slept = threads(), spinning()
    assert torch.equal(a @ a, first)
    team.let_go()
    after = threads()
    if held > before == after and slept < spun / 2:
        print("sleeps")
        break
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


# --- waiting ----------------------------------------------------------------------------------------------------------


class Team:
    held = False

    def hold(self):
        self.held = True

    def let_go(self):
        self.held = False


def look(policy, world, seconds, waiting):
    """Whether the workers sleep after each look, while `waiting` threads have no core."""
    slept = []
    for _ in range(round(seconds / LOOK_SECONDS)):
        world.now += LOOK_SECONDS
        world.delay += waiting * LOOK_SECONDS
        policy.look(world.delay)
        assert policy.patient == policy._team.held
        slept.append(policy.patient)
    return slept


@pytest.fixture
def world():
    return SimpleNamespace(now=100.0, delay=7.0)


def test_workers_sleep_beside_other_programs_only(world):
    policy = WaitingPolicy(Team(), now=lambda: world.now)
    assert not any(look(policy, world, 60, 0.02))
    assert all(look(policy, world, 60, 0.6)[2:])  # from the second look on
    assert all(look(policy, world, 30, 0.1))  # less, but not nothing
    slept = look(policy, world, 2 * FIRST_PATIENCE, 0.01)
    assert slept[0]
    assert not slept[-1]
    assert not any(look(policy, world, 60, 0.01))


def test_who_spins_again_too_soon_waits_longer_for_the_next_try(world):
    policy = WaitingPolicy(Team(), now=lambda: world.now)
    for _ in range(20):  # sleeping workers are calm, spinning ones are in the other program's way
        while not policy.patient:
            look(policy, world, LOOK_SECONDS, 0.6)
        start = world.now
        while policy.patient:
            look(policy, world, LOOK_SECONDS, 0.01)
    assert world.now - start == pytest.approx(MOST_PATIENCE, abs=1)
    look(policy, world, 3 * MOST_PATIENCE, 0.01)  # a long rest
    look(policy, world, 1, 0.6)
    start = world.now
    while policy.patient:
        look(policy, world, LOOK_SECONDS, 0.01)
    assert world.now - start == pytest.approx(FIRST_PATIENCE, abs=1)


def test_a_moment_without_a_core_is_no_other_program(world):
    policy = WaitingPolicy(Team(), now=lambda: world.now)
    for _ in range(20):
        assert not any(look(policy, world, LOOK_SECONDS, 0.4) + look(policy, world, 2, 0.02))


@pytest.fixture
def threads(monkeypatch, tmp_path):
    """Writes what the kernel says of each thread: {name: (seconds on a core, seconds waiting for one)}."""
    clock = SimpleNamespace(now=0.0)
    names = ["main", "worker", "loader"]

    def at(seconds, **threads):
        clock.now = seconds
        for task in tmp_path.glob("*"):
            shutil.rmtree(task)
        for name, (on_core, waited) in threads.items():
            (tmp_path / str(names.index(name))).mkdir()
            text = f"{round(on_core * 1e9)} {round(waited * 1e9)} 9\n"
            (tmp_path / str(names.index(name)) / "schedstat").write_text(text, encoding="ascii")

    helper = SimpleNamespace(name=cpu.HELPER, native_id=2)
    own = SimpleNamespace(enumerate=lambda: [SimpleNamespace(name="MainThread", native_id=0), helper])
    monkeypatch.setattr(cpu, "threading", own)
    monkeypatch.setattr(cpu, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(cpu, "os", SimpleNamespace(listdir=lambda path: [task.name for task in tmp_path.iterdir()]))
    monkeypatch.setattr(cpu, "Path", lambda path: tmp_path / path.removeprefix("/proc/self/task/"))
    return at


def test_what_a_helper_takes_is_no_other_programs(threads):
    delay = RunDelay()
    threads(0.0, main=(5, 1), worker=(5, 1), loader=(1, 9))
    assert delay() == 0
    # In each second the loader works 0.1 s, for which one of the others waits; its own waiting says nothing.
    threads(1.0, main=(5.9, 1.08), worker=(6, 1.02), loader=(1.1, 9.7))
    assert delay() == 0
    threads(2.0, main=(6.4, 1.58), worker=(6.5, 1.52), loader=(1.2, 9.9))  # now there is another program
    assert delay() == pytest.approx(0.9)
    # A helper that works all the time has a core of its own, or the threads would wait much longer.
    threads(3.0, main=(6.9, 2.08), worker=(7.0, 2.02), loader=(2.2, 9.9))
    assert delay() == pytest.approx(0.9 + 1.0 - CONTENDED)


def test_threads_that_end_or_begin_change_nothing(threads):
    delay = RunDelay()
    threads(0.0, main=(5, 1), loader=(50, 9))
    delay()
    threads(1.0, main=(6, 1))
    assert delay() == 0
    threads(2.0, main=(7, 1), worker=(20, 30))
    assert delay() == 0


@pytest.mark.skipif(RunDelay()() is None, reason="this system does not tell how long threads wait for a core")
def test_held_workers_do_not_spin():
    env = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run([sys.executable, "-c", HOLD], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["sleeps"]


@pytest.mark.parametrize(
    ("setting", "threads", "delay", "watches"),
    [(None, 2, 0.0, True), ("OMP_WAIT_POLICY", 2, 0.0, False), (None, 1, 0.0, False), (None, 2, None, False)],
    ids=["ours", "the user's own", "one thread", "no schedstat"],
)
def test_a_process_is_watched_where_that_helps(monkeypatch, clock, setting, threads, delay, watches):
    started = []
    openmp = SimpleNamespace(GOMP_parallel=None, omp_get_num_procs=lambda: 2)
    monkeypatch.setattr(cpu, "ctypes", SimpleNamespace(CDLL=lambda name: openmp))
    monkeypatch.setattr(cpu, "_watching", None)
    monkeypatch.setattr(cpu, "RunDelay", lambda: lambda: delay)
    start = SimpleNamespace(start=lambda: started.append(1))
    monkeypatch.setattr(cpu, "threading", SimpleNamespace(Thread=lambda **kwargs: start))
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    if setting:
        monkeypatch.setenv(setting, "ACTIVE")
    torch.set_num_threads(threads)
    for _ in range(2):
        watch_cores()
    assert started == [1] * watches
