"""The time budget of a run (`--hours`): how far it is, which step is the last, and what the end will take.

Everything counts from the moment the clock is made to the finished model on the disk: compiling, steps, waiting for
data, evaluations, samples, checkpoints; and what an interrupted run had used before, but not the time between. After a
few steps the end is rehearsed once (an evaluation, samples, a checkpoint), so that its time is measured and not
guessed. The learning rate follows the clock, and the step that is taken for the last one always ends the schedule:
it is fully decayed however the speed changes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

REHEARSE_AFTER = 3  # steps: the first ones may compile and warm up
WINDOW = 9  # steps whose median foretells the next
# A finished model is saved without the optimizer's state, at most half of a checkpoint.
FINAL_CHECKPOINT = 0.5
COARSE = 0.06  # a step longer than this share of the run makes the end miss its time by more than 3 %


@dataclass
class Clock:
    """Counts the seconds of a run. Over several ranks only rank 0's count; feed all ranks the same numbers."""

    used: float = 0.0
    """Seconds before this process."""
    now: Callable[[], float] = time.monotonic
    costs: dict[str, float] = field(default_factory=dict)
    """Seconds that evaluation, samples and checkpoint have taken."""

    def __post_init__(self) -> None:
        self.start = self.now()
        self.steps: deque[float] = deque(maxlen=WINDOW)

    def elapsed(self) -> float:
        """Seconds the run has used so far."""
        return self.used + self.now() - self.start

    @property
    def step_seconds(self) -> float | None:
        """What the next step will take; None before the first."""
        return median(self.steps) if self.steps else None

    @property
    def ending(self) -> float:
        """Seconds from the last step to the finished model."""
        share = {"checkpoint": FINAL_CHECKPOINT}
        return sum(seconds * share.get(name, 1.0) for name, seconds in self.costs.items())

    def steps_left(self, seconds: float, elapsed: float) -> float:
        """Steps that still fit when `elapsed` of `seconds` are over; endless before the first step."""
        step = self.step_seconds
        return (seconds - self.ending - elapsed) / step if step else float("inf")

    def is_last(self, seconds: float, elapsed: float) -> bool:
        """Whether the step that begins now is the last: another would end further from the time than this one."""
        return self.steps_left(seconds, elapsed) < 1.5

    def progress(self, seconds: float, elapsed: float) -> float:
        """Share of the schedule at the step that begins now: 1 at the last one."""
        if self.is_last(seconds, elapsed):
            return 1.0
        end = seconds - self.ending - (self.step_seconds or 0.0)  # where the last step begins
        return min(1.0, elapsed / max(end, 1e-9))

    def has_time_for(self, what: str, seconds: float, elapsed: float) -> bool:
        """Whether this can be done once more on the way without making the run late."""
        return self.steps_left(seconds, elapsed + self.costs.get(what, 0.0)) >= 2
