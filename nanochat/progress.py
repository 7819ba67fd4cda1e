"""Progress with an ETA: a rich bar on a terminal, plain lines elsewhere, and a small file for the monitor.

The pipeline names the file of each stage by $NANOCHAT_PROGRESS_FILE; without it none is written.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from nanochat.env import get_dist_info, print0

PROGRESS_FILE = "NANOCHAT_PROGRESS_FILE"
SECONDS_BETWEEN_LINES, SECONDS_BETWEEN_FILES = 10.0, 2.0


def print_banner() -> None:
    """Print the project's name, once, at the start of a run: a stage of the pipeline leaves that to it."""
    if PROGRESS_FILE in os.environ:
        return
    print0("nanochat: a small assistant, trained from nothing on the card you have\n")


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
        self._last_file = -SECONDS_BETWEEN_FILES
        self._quiet = get_dist_info()[1] != 0
        self._file = Path(os.environ[PROGRESS_FILE]) if os.environ.get(PROGRESS_FILE) and not self._quiet else None
        self._rich = None
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console  # lazy: only a terminal needs it
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
        now, share = time.monotonic(), done / max(self.total, 1e-9)
        eta = (now - self._start) / max(done, 1e-9) * (self.total - done)
        if self._rich is not None:
            self._rich.update(self._task, completed=done, description=f"{self.label} {note}".rstrip())
        elif now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            print(f"{self.label}: {100 * share:.0f}% {note} ETA {format_seconds(eta)}", flush=True)
        if self._file is not None and now - self._last_file >= SECONDS_BETWEEN_FILES:
            self._last_file = now
            self._write(self._file, {"share": share, "eta_seconds": eta})

    def _write(self, path: Path, record: dict[str, float]) -> None:
        # Whole or not at all, but not synced to the disk: after a power cut nobody asks for it.
        part = path.with_suffix(".part")
        with contextlib.suppress(OSError):  # a full disk is no reason to stop
            part.write_text(json.dumps(record), encoding="utf-8")
            part.replace(path)

    def close(self) -> None:
        """Remove the bar and its file."""
        if self._rich is not None:
            self._rich.stop()
        if self._file is not None:
            self._file.unlink(missing_ok=True)


@contextlib.contextmanager
def progress(total: float, label: str) -> Iterator[Bar]:
    """`with progress(100, "evaluating") as bar: bar.advance()`."""
    bar = Bar(total, label)
    try:
        yield bar
    finally:
        bar.close()
