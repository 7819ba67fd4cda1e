"""Progress with an ETA: a rich bar on a terminal, plain lines elsewhere (a log file, a pipe)."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from nanochat.env import get_dist_info

SECONDS_BETWEEN_LINES = 10.0


def format_seconds(seconds: float) -> str:
    """75 -> 1m15s, 3700 -> 1h01m."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


class Bar:
    """Counts to `total`; only rank 0 shows it."""

    def __init__(self, total: float, label: str) -> None:
        self.total, self.label = total, label
        self.done = 0.0
        self._start = self._last_line = time.monotonic()
        self._quiet = get_dist_info()[1] != 0
        self._rich = None
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._rich = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._rich.add_task(label, total=total)
            self._rich.start()

    def advance(self, n: float = 1, note: str = "") -> None:
        """Count `n` more; `note` (loss, speed) stands behind the label."""
        self.set(self.done + n, note)

    def set(self, done: float, note: str = "") -> None:
        """Set the count to `done`."""
        self.done = done
        if self._quiet:
            return
        if self._rich is not None:
            self._rich.update(self._task, completed=done, description=f"{self.label} {note}".rstrip())
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(f"{self.label}: {100 * done / max(self.total, 1e-9):.0f}% {note} {self._eta()}", flush=True)

    def _eta(self) -> str:
        used = time.monotonic() - self._start
        return f"ETA {format_seconds(used / max(self.done, 1e-9) * (self.total - self.done))}"

    def close(self) -> None:
        """Remove the bar."""
        if self._rich is not None:
            self._rich.stop()


@contextlib.contextmanager
def progress(total: float, label: str) -> Iterator[Bar]:
    """`with progress(100, "evaluating") as bar: bar.advance()`."""
    bar = Bar(total, label)
    try:
        yield bar
    finally:
        bar.close()
