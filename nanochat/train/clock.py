"""The time budget of a run (`--hours`): how far it is, which step is the last, and how long the end will take.

Everything counts from the moment the clock is made to the finished model on the disk: compiling, steps, waiting for
data, evaluations, samples, checkpoints; and the time an interrupted run had used before, but not the time between.
After a few steps the end is rehearsed once (an evaluation, samples, a checkpoint), so that its time is measured and not
guessed. The learning rate follows the clock, and the step that is taken for the last one always ends the schedule:
it is fully decayed however the speed changes.

Without a budget (`seconds` is None) the clock only counts: steps end the run, and there is always time.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median

from nanochat.ops.cpu import CONTENDED, RunDelay
from nanochat.progress import format_seconds

REHEARSE_AFTER = 3  # steps: the first ones may compile and warm up
RECENT = 3  # steps whose median is the speed of now
WINDOW = 9  # steps whose median predicts the next
# A finished model is saved without the optimizer's state, at most half of a checkpoint.
FINAL_CHECKPOINT = 0.5
COARSE = 0.06  # a step longer than this share of the run makes the end miss its time by more than 3 %


@dataclass
class Clock:
    """Counts the seconds of a run. Every decision is made from the last `tick`, which is the same on all ranks."""

    used: float = 0.0
    """Seconds before this process."""
    now: Callable[[], float] = time.monotonic
    costs: dict[str, float] = field(default_factory=dict)
    """Seconds that evaluation, samples and checkpoint have taken."""
    seconds: float | None = None
    """The run's budget."""
    agree: Callable[[float], float] = float
    """Rank 0's number on every rank (`Compute.broadcast`)."""
    ticked: float = 0.0
    """Seconds used at the last tick."""
    delay: Callable[[], float | None] = field(default_factory=RunDelay)
    """Seconds for which this process's threads were ready and other programs had their cores; None: not known."""

    def __post_init__(self) -> None:
        self.start = self.now()
        self.steps: deque[float] = deque(maxlen=WINDOW)
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT)  # tokens/s, threads that waited for a core
        self._best, self._delayed = 0.0, self.delay()

    # --- reading it ---------------------------------------------------------------------------------------------------

    def elapsed(self) -> float:
        """Seconds the run has used so far, on this rank."""
        return self.used + self.now() - self.start

    def tick(self) -> float:
        """Read the clock: rank 0's, so that every rank decides the same."""
        self.ticked = self.agree(self.elapsed())
        return self.ticked

    def count_step(self, seconds: float, tokens: int = 0) -> float:
        """Remember a step of so many tokens that has taken so long on this rank; returns rank 0's seconds."""
        self.steps.append(self.agree(seconds))
        before, self._delayed = self._delayed, self.delay()
        waited = 0.0 if before is None or self._delayed is None else self._delayed - before
        self._recent.append((tokens / max(seconds, 1e-9), waited / max(seconds, 1e-9)))
        self._best = max(self._best, self.speed())
        self.tick()
        return self.steps[-1]

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Remember how long this takes: the end of a run is made of such things."""
        start = self.tick()
        yield
        self.costs[what] = self.tick() - start

    # --- deciding by it -----------------------------------------------------------------------------------------------

    @property
    def step_seconds(self) -> float | None:
        """The time of the next step by those before it; None before the first."""
        return median(self.steps) if self.steps else None

    @property
    def ending(self) -> float:
        """Seconds from the last step to the finished model."""
        share = {"checkpoint": FINAL_CHECKPOINT}
        return sum(seconds * share.get(name, 1.0) for name, seconds in self.costs.items())

    def steps_left(self, extra: float = 0.0) -> float:
        """Steps that still fit after another `extra` seconds; endless without a budget and before the first step."""
        step = self.step_seconds
        return (self.seconds - self.ending - self.ticked - extra) / step if self.seconds and step else float("inf")

    def is_last(self) -> bool:
        """True if the step that begins now is the last: another would end further from the time than this one."""
        return self.steps_left() < 1.5

    def schedule_seconds(self) -> float:
        """The schedule's position at the step that begins now: all its seconds at the last one, 0 without a budget."""
        if self.seconds is None:
            return 0.0
        if self.is_last():
            return self.seconds
        end = self.seconds - self.ending - (self.step_seconds or 0.0)  # where the last step begins
        return self.seconds * min(1.0, self.ticked / max(end, 1e-9))

    def has_time_for(self, what: str) -> bool:
        """True if this can be done once more on the way without making the run late."""
        return self.steps_left(self.costs.get(what, 0.0)) >= 2

    def wants_rehearsal(self) -> bool:
        """True once, early in a run with a budget: the end is to be done now, to measure it."""
        return self.seconds is not None and len(self.steps) == REHEARSE_AFTER and "checkpoint" not in self.costs

    # --- for people ---------------------------------------------------------------------------------------------------

    def speed(self) -> float:
        """Tokens per second of the latest steps; 0 before there are enough."""
        return median(speed for speed, _ in self._recent) if len(self._recent) == RECENT else 0.0

    def shares_cores(self) -> bool:
        """True if the latest steps were less than half as fast as the best, with threads that had to wait for cores."""
        # Heat, a full memory and short batches make steps slow too, but nobody waits for a core then.
        return self.speed() < self._best / 2 and median(waited for _, waited in self._recent) > CONTENDED

    def left(self, steps_done: int, steps: int | None) -> float:
        """Seconds to the end of the run after `steps_done` of `steps`, as far as is known."""
        of_steps = math.inf if steps is None else self.ticked / steps_done * (steps - steps_done) + self.ending
        return min(of_steps, math.inf if self.seconds is None else self.seconds - self.ticked)

    def forecast(self) -> list[str]:
        """After the rehearsal: how many steps the budget has room for, and a warning if they are too long for it."""
        budget, step = self.seconds or 0.0, self.step_seconds or 0.0
        lines = [
            f"{step:.2f} s per step: time for about {max(0.0, self.steps_left()):,.0f} more in "
            f"{format_seconds(budget)}, besides {format_seconds(self.ending)} for the last evaluation, samples and "
            "checkpoint"
        ]
        if step > COARSE * budget or self.ending > 0.5 * budget:
            lines.append("warning: the time is short for such steps or evaluations, the end may miss it")
        return lines
