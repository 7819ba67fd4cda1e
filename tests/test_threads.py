"""The number of threads follows what was faster, and is put back after every step."""

import threading
from types import SimpleNamespace

import pytest
import torch

import nanochat.ops.cpu as threads
from nanochat.ops.cpu import TRIAL_EVERY, TRIAL_STEPS, ThreadChoice, release_workers


@pytest.fixture
def clock(monkeypatch):
    """Two threads, and a clock that only `run` moves."""
    now = [0.0]
    monkeypatch.setattr(threads, "time", SimpleNamespace(perf_counter=lambda: now[0]))
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
