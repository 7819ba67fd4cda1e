"""A run that is asked to stop finishes its step and saves; asked a second time it exits at once.

SIGTERM (a scheduler, `kill`), SIGINT (Ctrl-C) and SIGUSR1 (Slurm's warning before a time limit) all ask. The process
then exits with EXIT_STOPPED, which distinguishes "stopped on request, the same command resumes" from an error.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

# sysexits.h: EX_TEMPFAIL, "the user is invited to retry".
EXIT_STOPPED = 75
# torchrun passes a Ctrl-C on to its workers, which have had it from the terminal already: one request, not two.
SAME_REQUEST_SECONDS = 1.0
ASKING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
"""The signals that ask to stop, of this system."""


class Stopped(SystemExit):
    """The run was asked to stop, and has saved; ends the process with EXIT_STOPPED."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED)


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within `with`, the signals that ask to stop go to `handler`; only in the main thread, as Python requires."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in ASKING}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class StopRequest:
    """Within `with`, a signal only sets `requested`; a second one ends the process with 128 + its number."""

    def __init__(self) -> None:
        self._asked = False
        self._parent = os.getppid()
        self._since = 0.0
        self._handled = handled(self._handle)

    @property
    def requested(self) -> bool:
        """True after a signal, or when torchrun has died, since nothing would supervise the ranks any more."""
        return self._asked or ("RANK" in os.environ and os.getppid() != self._parent)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._asked:
            self._asked, self._since = True, time.monotonic()
            self._say(f"{signal.Signals(number).name}: finishing the step and saving; once more leaves at once")
        elif time.monotonic() - self._since > SAME_REQUEST_SECONDS:
            self._say("leaving at once; the checkpoints that are there stay good")
            os._exit(128 + number)

    @staticmethod
    def _say(text: str) -> None:
        # os.write: print could be interrupted in the middle of a print by this very handler.
        if int(os.environ.get("RANK", "0")) == 0:
            with contextlib.suppress(OSError):
                os.write(2, f"\n{text}\n".encode())

    def __enter__(self) -> StopRequest:
        self._handled.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._handled.__exit__(kind, error, tb)
